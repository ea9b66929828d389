"""Presets against other people's code (torchio, MONAI, SimpleITK), in processes of their own, and on real images where ANOMDX_DATA names a folder of them."""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Affine
from scipy import ndimage

from anomdx.anatomy import body_mask, eye_curve, lung_box, marker_mask, retina_rows, rpe_path, vary
from anomdx.cohorts import phantom
from anomdx.config import ConfigError
from anomdx.intensity import match_landmarks, standard_landmarks
from anomdx.loaders import DataError, load_scan, to_scan
from anomdx.transforms import PRESETS, create_preset

DATA = os.environ.get("ANOMDX_DATA", "")
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(.3, -.2, .15) @ np.diag([-1.1, 1.4, 2.5]), [40, -30, 10])


def real(folder, pattern, count):
    "Some real images, evenly spread over the folder"
    if not (Path(DATA)/folder).is_dir() or not DATA: pytest.skip(f"ANOMDX_DATA names no folder with {folder}/")
    paths = sorted((Path(DATA)/folder).glob(pattern))
    return [load_scan(p) for p in paths[::max(1, len(paths) // count)][:count]]


def volume(unit="a.u.", affine=OBLIQUE, n=36, seed=0):
    x = phantom(seed, n, 3)[0][:, :, 3:, 7:]
    x = 1200 * x - 1000 if unit == "HU" else 700 * x
    return to_scan(x, "volume.nii.gz", affine, np.linalg.norm(affine[:3, :3], axis=0), unit=unit, oriented=True)


def retina(slices=0, height=96, width=80, seed=0):
    t = np.linspace(-1, 1, width)
    z = np.arange(height)[:, None] - (60 - 14 * t ** 2 + 5 * t)
    x = .06 + .55 * ((z > -27) & (z < -22)) + .3 * ((z >= -22) & (z < -4)) + .8 * ((z >= -4) & (z < 0)) + .25 * (z >= 0) * np.exp(-z.clip(0) / 9)
    x = (x[..., None].repeat(slices, -1) if slices else x)[None]
    x = x + np.random.default_rng(seed).normal(0, .05, x.shape)
    return to_scan(x, "macula", np.diag([.004, .012, .12, 1]), (.004, .012, .12)[:x.ndim - 1], unit="uint8", oriented=False)


def slide(seed=0, n=80):
    rng = np.random.default_rng(seed)
    cells, pink = (ndimage.gaussian_filter(rng.normal(size=(n, n)), s) for s in (2, 5))
    amount = np.stack([1.4 * (cells > cells.std()) + .15, .5 + .2 * pink / pink.std()]).clip(0)
    x = 239 * np.exp(-np.einsum("sc,shw->chw", np.array([[.65, .7, .29], [.2, .99, .25]]), amount))
    return to_scan(x.round(), "slide.svs", np.eye(4), (1, 1), unit="uint8", oriented=False)


def picture(unit="uint8", seed=0):
    x = phantom(seed, 70)[0][:, 4:, 9:]
    x = 1200 * x - 1000 if unit == "HU" else 255 * x
    return to_scan(x, "picture.png", np.eye(4), (1, 1), unit=unit, oriented=False)


WORLDS = {   # every preset with each of its options, in 2D and in 3D
    "mri 2D": ("mri", dict(), picture()), "mri 2D crop": ("mri", dict(foreground="crop"), picture()),
    "mri 2D spacing": ("mri", dict(spacing=1.5), picture()),
    "mri 3D": ("mri", dict(spatial_dims=3), volume()), "mri 3D mask": ("mri", dict(spatial_dims=3, foreground="mask"), volume()),
    "mri 3D crop, nyul": ("mri", dict(spatial_dims=3, foreground="crop", normalise="nyul"), volume()),
    "mri 3D LPS": ("mri", dict(spatial_dims=3, orientation="LPS"), volume()),
    "ct 2D": ("ct", dict(), picture("HU")), "ct 3D": ("ct", dict(spatial_dims=3), volume("HU")),
    "ct 3D crop": ("ct", dict(spatial_dims=3, foreground="crop", windows=["bone", "lung"], channels=2), volume("HU")),
    "ct 3D keep": ("ct", dict(spatial_dims=3, foreground="keep"), volume("HU")),
    "chest 2D": ("chest_xray", dict(), picture()), "chest 2D mask": ("chest_xray", dict(foreground="mask"), picture()),
    "chest 2D crop": ("chest_xray", dict(foreground="crop"), picture()),
    "oct 2D": ("oct", dict(), retina()), "oct 2D keep": ("oct", dict(foreground="keep", flatten=False, denoise=False), retina()),
    "oct 3D": ("oct", dict(spatial_dims=3), retina(7)),
    "histopathology": ("histopathology", dict(), slide()), "histopathology reinhard": ("histopathology", dict(stain="reinhard"), slide()),
    "histopathology none": ("histopathology", dict(stain="none"), slide()),
}


def made(name, **more):
    if name == "histopathology": pytest.importorskip("torchstain")
    preset, options, scan = WORLDS[name]
    preset = create_preset(preset, **dict(size=48) | options | more)
    return preset.fit([scan]) if preset.needs_fit else preset, scan


@pytest.mark.parametrize("name", WORLDS)
def test_range_unit_and_repeats(name):
    preset, scan = made(name)
    before, (x, none) = scan.clone(), preset(scan)
    assert none is None and x.shape == (preset.cfg.channels, *[48] * preset.cfg.spatial_dims) and x.dtype == torch.float32
    assert x.min() >= 0 and x.max() <= 1 and x.std() > .01
    assert x.meta["unit"] == PRESETS[preset.cfg.preset].unit and x.meta["source"] == scan.meta["source"]
    torch.testing.assert_close(preset(scan)[0].as_tensor(), x.as_tensor(), rtol=0, atol=0)
    torch.testing.assert_close(scan.as_tensor(), before.as_tensor(), rtol=0, atol=0)
    assert scan.meta["unit"] == before.meta["unit"] and scan.applied_operations == []


@pytest.mark.parametrize("elastic", (0., .04))
@pytest.mark.parametrize("name", WORLDS)
def test_augmentation_is_seeded(name, elastic):
    preset, scan = made(name, elastic=elastic)
    x, mask = preset(scan, (scan[:1] > scan.mean()).float())
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    (y, m), (again, m2), (other, _) = [preset.augment(x, mask, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert torch.equal(y, again) and torch.equal(m, m2) and not torch.equal(y, other)
    assert y.shape == x.shape and m.shape == mask.shape and y.min() >= 0 and y.max() <= 1 and set(m.unique().tolist()) <= {0, 1}
    assert (np.random.get_state()[1] == states[0]).all() and (torch.get_rng_state() == states[1]).all()


@pytest.mark.parametrize("name", WORLDS)
def test_a_marker_returns_to_its_voxels(name):
    "An asymmetric block goes through the whole chain as a mask and comes back to where it was"
    preset, scan = made(name)
    shape = tuple(scan.shape[1:])
    corner = [int(f * n) for f, n in zip((.52, .38, .3), shape)]
    marker = torch.zeros(1, *shape)
    marker[(0, *[slice(c, c + w) for c, w in zip(corner, (7, 5, 4))])] = 1
    x, moved = preset(scan, marker)
    back = preset.restore(moved.as_tensor(), x)
    assert back.shape == marker.shape and set(moved.unique().tolist()) == {0, 1}
    np.testing.assert_allclose(back.affine, scan.affine, atol=1e-5)
    center = lambda m: np.array(ndimage.center_of_mass(m[0].numpy()))
    assert np.abs(center(back) - center(marker)).max() < 1


def test_the_chest_and_the_belly_are_never_mirrored():
    for name, mirrored in (("chest 2D", False), ("ct 2D", False), ("mri 2D", True), ("oct 2D", True)):
        preset, scan = made(name)
        x, _ = preset(scan)
        left = torch.zeros_like(x); left[..., :12] = 1   # only the left edge is bright
        sides = [float(y[..., :24].sum() > y[..., 24:].sum()) for y in (preset.augment(left, None, np.random.default_rng(s))[0] for s in range(12))]
        assert (min(sides) == 0) == mirrored, name


def test_affine_is_monais():
    "A turn, a zoom and a shift at once, as MONAI's own Affine makes them"
    x = torch.from_numpy(phantom(2, 64)[0])
    for seed in range(4):
        rng = np.random.default_rng(seed)
        turn, zoom, shift = rng.uniform(-.1, .1, 1), rng.uniform(.95, 1.05), rng.uniform(-.06, .06, 2)
        ours, _ = vary(x, None, np.random.default_rng(seed), tone=0.)
        c, s = np.cos(turn[0]), np.sin(turn[0])
        move = np.array([[c, -s], [s, c]]) * zoom   # of (column, row); MONAI counts rows first, in pixels
        matrix = np.eye(3); matrix[:2, :2] = move[::-1, ::-1]; matrix[:2, 2] = (move @ shift)[::-1] * 32
        theirs, _ = Affine(affine=matrix, mode="bilinear", padding_mode="border", image_only=False)(x)
        torch.testing.assert_close(ours, torch.as_tensor(theirs).clip(0, 1), rtol=0, atol=2e-5)


def test_landmarks_are_torchios(tmp_path):
    "Nyúl's histogram matching undoes what was done to the contrast, and agrees with torchio on the foreground"
    tio = pytest.importorskip("torchio")
    train = [phantom(s, 40, 3)[0] for s in range(4)]
    for i, x in enumerate(train): nib.save(nib.Nifti1Image(x[0], np.eye(4)), tmp_path/f"{i}.nii")
    inside = lambda t: (t > t.float().mean()).numpy() if isinstance(t, torch.Tensor) else t > t.mean()
    learned = tio.HistogramStandardization.train([tmp_path/f"{i}.nii" for i in range(4)], masking_function=inside, progress=False)
    bent = (phantom(9, 40, 3)[0] * 3) ** 1.5
    theirs = tio.HistogramStandardization({"scan": learned}, masking_method=lambda t: t > t.float().mean())(
        tio.Subject(scan=tio.ScalarImage(tensor=torch.from_numpy(bent)))).scan.data.numpy()
    ours = match_landmarks(bent, standard_landmarks(train))
    tissue = (bent > np.percentile(bent[bent > bent.mean()], 10)) & (bent < np.percentile(bent[bent > bent.mean()], 90))
    fit = np.polyfit(theirs[tissue], ours[tissue], 1)   # torchio's scale is 0 to 100 from another percentile on
    assert np.corrcoef(theirs[tissue], ours[tissue])[0, 1] > .998 and np.abs(np.polyval(fit, theirs[tissue]) - ours[tissue]).max() < .03


def test_n4_needs_simpleitk_and_repeats():
    pytest.importorskip("SimpleITK")
    preset = create_preset("mri", size=32, bias_field=True)
    x = phantom(0, 48)[0] * np.exp(np.linspace(-.5, .5, 48, dtype=np.float32))
    scan = to_scan(x, "t1.png", np.eye(4), (1, 1), unit="a.u.", oriented=False)
    plain = create_preset("mri", size=32)
    torch.testing.assert_close(preset(scan)[0].as_tensor(), preset(scan)[0].as_tensor(), rtol=0, atol=0)
    inside = slice(8, 24)
    drift = lambda x: abs(x[0, inside, 8:16].mean() - x[0, inside, 16:24].mean())
    assert drift(preset(scan)[0]) < .6 * drift(plain(scan)[0])


@pytest.mark.parametrize("name", ("mri 3D crop, nyul", "histopathology reinhard"))
def test_what_was_learned_travels_as_json(name, tmp_path):
    preset, scan = made(name)
    (tmp_path/"preset.json").write_text(json.dumps(preset.state_dict()))
    kind, options, _ = WORLDS[name]
    again = create_preset(kind, size=48, **options)
    assert again.needs_fit and again.key() != preset.key()
    with pytest.raises(ConfigError, match="preset.fit"): again(scan)
    again.load_state_dict(json.loads((tmp_path/"preset.json").read_text()))
    assert again.key() == preset.key()
    torch.testing.assert_close(again(scan)[0].as_tensor(), preset(scan)[0].as_tensor(), rtol=0, atol=0)


def test_another_process_prepares_the_same_images(tmp_path):
    "Also a spawned one, which gets the preset by pickle"
    code = ("import pickle, sys, torch\npreset, scan = pickle.load(open(sys.argv[1], 'rb'))\n"
            "x, _ = preset(scan)\npickle.dump((x.as_tensor(), preset.restore(x[:1].as_tensor(), x).as_tensor()), open(sys.argv[1] + '.out', 'wb'))")
    preset, scan = made("mri 3D crop, nyul")
    (tmp_path/"preset").write_bytes(pickle.dumps((preset, scan)))
    subprocess.run([sys.executable, "-c", code, str(tmp_path/"preset")], check=True, timeout=300)
    x, back = pickle.loads((tmp_path/"preset.out").read_bytes())
    assert torch.equal(x, preset(scan)[0].as_tensor()) and torch.equal(back, preset.restore(preset(scan)[0][:1], preset(scan)[0]).as_tensor())


def test_refusals(tmp_path):
    mr, empty = volume(), volume("HU"); empty[:] = -1000
    with pytest.raises(DataError, match="ct preset needs HU, volume.nii.gz is in 'a.u.'"): create_preset("ct", spatial_dims=3)(mr)
    nib.save(nib.Nifti1Image(mr[0].numpy(), OBLIQUE), tmp_path/"mr.nii.gz")
    with pytest.raises(DataError, match="mr.nii.gz is called CT but holds no negative number"): create_preset("ct", spatial_dims=3)(load_scan(tmp_path/"mr.nii.gz", "ct"))
    with pytest.raises(DataError, match="volume.nii.gz shows no body"): create_preset("ct", spatial_dims=3)(empty)
    specks = volume("HU"); specks[:] = -1000; specks[0, 4, 4, 4] = 50
    with pytest.raises(DataError, match="volume.nii.gz shows no body"): create_preset("ct", spatial_dims=3)(specks)
    blank = picture(); blank[:] = 0
    for preset, options, words in (("mri", {}, "one value only"), ("mri", dict(foreground="mask"), "shows no head"), ("chest_xray", {}, "one value only"),
                                   ("chest_xray", dict(foreground="crop"), "no exposed field"), ("oct", {}, "shows no retina")):
        with pytest.raises(DataError, match=f"picture.png.*{words}"): create_preset(preset, **options)(blank)
    glass = slide(); glass[:] = 245
    with pytest.raises(DataError, match="slide.svs shows no tissue"): create_preset("histopathology", stain="none")(glass)
    with pytest.raises(DataError, match="needs 3 channel"): create_preset("histopathology", stain="none")(picture())
    side = picture(); side.meta["view"] = "LL"
    with pytest.raises(DataError, match="picture.png is 'LL'"): create_preset("chest_xray")(side)
    with pytest.raises(ConfigError, match="stain is not used by 'oct'; it belongs to 'histopathology'"): create_preset("oct", stain="none")
    with pytest.raises(ConfigError, match="there is no window 'brian'.*did you mean 'brain'"): create_preset("ct", windows=["brian"], channels=1)


# --- real images

def test_real_chests():
    "Letters are small, lung boxes plausible, and nothing is refused"
    scans = [s for s in real("chest_xray_talo", "images/*", 60) if len(s) == 1]
    preset, found = create_preset("chest_xray", size=64, foreground="crop"), 0
    for scan in scans:
        assert marker_mask(scan.numpy()).mean() < .06
        rows, columns = lung_box(scan.numpy())
        h, w = (s.stop - s.start for s in (rows, columns))
        assert h > .3 * scan.shape[1] and w > .4 * scan.shape[2]
        found += h * w < .9 * scan[0].numel()
        x, _ = preset(scan)
        assert 0 <= x.min() and x.max() <= 1 and x.std() > .05
    assert found > .7 * len(scans)   # elsewhere the whole field is kept


def test_real_ct():
    "The body, and not the table below it"
    for scan in (load_scan(p, "ct") for p in sorted((Path(DATA)/"ct3d_chest_samples").glob("*.nii.gz"))) if real("ct3d_chest_samples", "*.nii.gz", 1) else ():
        mask = body_mask(scan.numpy(), int(np.abs(np.asarray(scan.affine)[2, :3]).argmax()))
        assert .3 < mask.mean() < .75 and np.bincount(ndimage.label(mask)[0].ravel())[1:].max() > .999 * mask.sum()
        x, _ = create_preset("ct", size=64, spatial_dims=3, foreground="crop")(scan)
        assert x.shape == (4, 64, 64, 64) and all(.02 < c.mean() < .98 for c in x)


def test_real_retinas():
    "Flattening leaves a straighter retina, and its rows hold what is bright"
    straighter = []
    for scan in real("oct_srf", "images/*", 30):
        scan = scan[:1, 10:-25, 25:-12]   # without the white frame that these pictures have
        preset = create_preset("oct", size=128)
        x, _ = preset(scan)
        assert 0 <= x.min() and x.max() <= 1
        bend = lambda y: np.ptp(eye_curve(rpe_path(y)))
        pixels, flatten = (next(s for s in preset.steps if type(s).__name__ == name) for name in ("Pixels", "Flatten"))
        flat = flatten(dict(image=pixels(dict(image=scan))["image"]))["image"].numpy()
        straighter.append(bend(flat) < max(4, .5 * bend(scan.numpy())))
        bright = scan[0].numpy() > .5 * scan.max().item()
        assert bright[retina_rows(scan.numpy())[0]].sum() > .9 * bright.sum()
    assert np.mean(straighter) > .85


def test_real_heads():
    "Landmarks learned from healthy scans bring another scan's histogram to theirs"
    scans = real("brain3d_t1_openneuro", "volumes/*", 5)
    preset = create_preset("mri", size=64, spatial_dims=3, normalise="nyul").fit(scans[:4])
    plain = create_preset("mri", size=64, spatial_dims=3)
    deciles = lambda p, s: np.percentile(p(s)[0][p(s)[0] > .1], (25, 50, 75))
    spread = [np.std([deciles(p, s) for s in scans], axis=0).mean() for p in (preset, plain)]
    assert spread[0] < spread[1]
