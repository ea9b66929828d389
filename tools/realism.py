"""How well can a classifier tell the borders of planted lesions from those of real ones?

    python tools/realism.py table.csv [--lesions tumour nsa …] [--split val] [--contrast -0.4] [--seed 0] [--json out.json]

`table.csv` lists brain slices: path, label, mask, patient (paths relative to it). Slices with label 1 and a mask are real lesions; every kind of
planted lesion is planted, with the sizes of the real ones, in the healthy slices of the same patients, so that scanner and patient say nothing.
From each lesion's border, profiles are sampled along its normals (10 pixels to either side, five of them side by side), in units of the scan's own
brain (median 0, 1st to 99th percentile 1). Gradient-boosted trees learn to tell the two apart; patients in the test fold are never in training.

0.5 is perfect: planted borders look like real ones; 1 means that every border is recognised. Two controls frame the figures: `nothing` lays the
contours of real lesions on healthy slices in which nothing was planted, `real` calls half of the patients' real lesions planted."""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import GroupKFold

from anomdx.eval import detection_figures
from anomdx.lesions import NoRoom, brain, levels, smooth_noise
from anomdx.loaders import load_scan

ALONG, BESIDE = np.arange(-10, 11), (-4, -2, 0, 2, 4)   # pixels along the normal and along the border
POINTS = 12         # profiles per lesion
READER = 1.         # pixels, standard deviation of how far a reader's contour strays; planted contours are exact and get it added


def profiles(x, region, inside, rng, reader):
    "Features (POINTS, …) along the border of `region` in the scan x (H, W), or None when too little of it lies in the brain"
    far = ndimage.distance_transform_edt(region) - ndimage.distance_transform_edt(~region)
    far = ndimage.gaussian_filter(far, 1.5)
    if reader: far = far + reader * smooth_noise(x.shape, (8, 8), int(rng.integers(2**31)))
    border = np.argwhere((np.abs(far) < .7) & inside)
    if len(border) < 8: return None
    normal = np.stack(np.gradient(ndimage.gaussian_filter(far, 2)))
    normal /= np.linalg.norm(normal, axis=0) + 1e-6
    middle, span = (v[0] for v in levels(x[None], inside))
    z, rows = (x - middle) / span, []
    for r, c in border[rng.choice(len(border), POINTS, replace=len(border) < POINTS)]:
        n = normal[:, r, c]; t = np.array([-n[1], n[0]])
        at = np.array([r, c])[:, None, None] + n[:, None, None] * ALONG[:, None] + t[:, None, None] * np.array(BESIDE)
        patch = ndimage.map_coordinates(z, at, order=1, mode="nearest")   # (along, beside)
        mean = patch.mean(1)
        rows.append(np.concatenate([patch.ravel(), mean, np.diff(mean), patch.std(1), [patch[:9].std(), patch[12:].std(), np.abs(np.diff(mean)).max()]]))
    return np.array(rows, np.float32)


def picture(path): return load_scan(path).numpy().astype(np.float32)


def real_borders(table, folder, rng):
    "Profiles, patients and regions of the real lesions"
    found = []
    for row in table[(table.label == 1) & table["mask"].ne("")].itertuples():
        x, region = picture(folder/row.path), picture(folder/row.mask)[0] > 0
        f = profiles(x[0], region, brain(x) | region, rng, 0)
        if f is not None: found.append((f, row.patient, region))
    return found


def planted_borders(name, table, folder, regions, rng, **options):
    "Profiles and patients of lesions planted in healthy slices, with the sizes of the real ones"
    from anomdx.planting import LESIONS, plant
    found, healthy = [], table[table.label == 0]
    for k in range(-(-len(regions) // len(healthy))):
        for row in healthy.itertuples():
            x, region = picture(folder/row.path), regions[rng.integers(len(regions))]
            inside = brain(x)
            if name != "nothing":
                size = {} if name == "spots" else dict(diameter=2 * np.sqrt(region.sum() / np.pi))
                try: planted = plant(name, x_tensor(x), rng, tissue=inside, **size, **options)
                except NoRoom: continue
                region = LESIONS[name].apply(x, planted.params, inside)[1] > .5   # without the tissue that was only pushed aside
                x = planted.image.numpy()
            f = profiles(x[0], region & inside, inside, rng, READER)
            if f is not None: found.append((f, row.patient))
    return found


def x_tensor(x):
    import torch
    return torch.from_numpy(x)


def told_apart(real, planted, seed):
    "AUROC of planted against real, per border patch (with its interval over patients) and per lesion"
    x = np.concatenate([f for f, *_ in planted + real])
    y = np.repeat([1] * len(planted) + [0] * len(real), POINTS)
    patient = np.repeat([p for _, p, *_ in planted + real], POINTS)
    score = np.zeros(len(y))
    for train, test in GroupKFold(5, shuffle=True, random_state=seed).split(x, y, patient):
        trees = HistGradientBoostingClassifier(max_iter=150, max_leaf_nodes=15, l2_regularization=1., random_state=seed)
        score[test] = trees.fit(x[train], y[train]).decision_function(x[test])
    whole = lambda v: v.reshape(-1, POINTS).mean(1)
    patch, lesion = (detection_figures(a, b, c, n_boot=300)["auroc"] for a, b, c in ((y, score, patient), (whole(y).round().astype(int), whole(score), patient[::POINTS])))
    return dict(patch=patch["value"], ci=patch["ci"], lesion=lesion["value"], planted=len(planted), real=len(real))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", type=Path); p.add_argument("--lesions", nargs="*"); p.add_argument("--contrast", type=float); p.add_argument("--split")
    p.add_argument("--seed", type=int, default=0); p.add_argument("--json", type=Path)
    a = p.parse_args()
    from anomdx.planting import LESIONS
    names = a.lesions or [n for n, l in LESIONS.items() if "mri" in l.modalities]
    table = pd.read_csv(a.table, keep_default_na=False); folder = a.table.parent
    if a.split: table = table[table.split == a.split]   # a choice made on val does not touch test
    table = table[table.patient.isin(table[table.label == 1].patient)]   # patients that have real lesions: both kinds come from the same people
    rng = np.random.default_rng(a.seed)
    real = real_borders(table, folder, rng)
    regions, out = [r for *_, r in real], {}
    some = set(rng.permutation(sorted({p for _, p, _ in real}))[::2])
    print(f"{len(real)} real lesions of {len({p for _, p, _ in real})} patients, {int((table.label == 0).sum())} healthy slices of the same\n{'lesion':14s} per border patch      per lesion", flush=True)
    for name in [*names, "nothing", "real"]:
        if name == "real": made, against = [r[:2] for r in real if r[1] in some], [r for r in real if r[1] not in some]
        else: made, against = planted_borders(name, table, folder, regions, rng, **({} if a.contrast is None or name == "nothing" else dict(contrast=a.contrast))), real
        out[name] = f = told_apart(against, made, a.seed)
        print(f"{name:14s} {f['patch']:.3f} [{f['ci'][0]:.3f}, {f['ci'][1]:.3f}]   {f['lesion']:.3f}   ({f['planted']} planted, {f['real']} real)", flush=True)
    if a.json: a.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__": sys.exit(main())
