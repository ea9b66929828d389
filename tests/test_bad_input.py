"""What a user gets wrong: one readable line that names the file or key, the right exit status, and nothing half made."""
import csv
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from anomdx.cli import main
from anomdx.cohorts import phantom

SMALL = ["transform.size=32", "transform.augment=false", "train.epochs=1", "train.batch_size=8", "model.name=ae", "eval.n_boot=20"]


@pytest.fixture
def world(tmp_path):
    "A folder of phantoms and the rows of its table: 8 to train on, 20 to calibrate on, 4 + 4 to test."
    rows = []
    for i in range(36):
        sick = i >= 32
        x, _ = phantom(i, size=32, lesion=sick)
        Image.fromarray(np.uint8(255 * x[0])).save(tmp_path/f"{i}.png")
        rows.append(dict(path=f"{i}.png", label=int(sick), patient=f"P{i}", split="train" if i < 8 else "val" if i < 28 else "test"))
    return tmp_path, rows


def table(folder, rows):
    with open(folder/"table.csv", "w", newline="") as f:
        w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    return folder/"table.csv"


def call(capsys, *args):
    "Exit status and the two streams of a command."
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    out, err = capsys.readouterr()
    return e.value.code or 0, out, err


def train(capsys, folder, rows, *changes, preset="chest_xray", out="run"):
    return call(capsys, "train", preset, f"data.table={table(folder, rows)}", *SMALL, *changes, "--out", folder/out)


def refused(result, status, *words):
    code, _, err = result
    lines = [l for l in err.splitlines() if l.startswith("anomdx:")]
    assert code == status and len(lines) == 1 and "Traceback" not in err, result
    assert all(w in lines[0] for w in words), lines[0]


def test_good_table_trains(capsys, world):
    folder, rows = world
    assert train(capsys, folder, rows)[0] == 0 and json.loads((folder/"run"/"threshold.json").read_text())["n"] == 20


def test_missing_table(capsys, world):
    folder, _ = world
    refused(call(capsys, "train", "chest_xray", f"data.table={folder/'nowhere.csv'}", "--out", folder/"run"), 1, "nowhere.csv", "does not exist")
    refused(call(capsys, "train", "chest_xray", "--out", folder/"run"), 2, "data.table must be given")


def test_missing_file(capsys, world):
    folder, rows = world
    (folder/"3.png").unlink()
    refused(train(capsys, folder, rows), 1, "3.png", "do not exist")


def test_truncated_file(capsys, world):
    folder, rows = world
    (folder/"3.png").write_bytes((folder/"3.png").read_bytes()[:200])
    refused(train(capsys, folder, rows), 1, "3.png")
    Image.fromarray(np.uint8(255 * phantom(3, size=32)[0][0])).save(folder/"3.png")   # mended, the same command goes through
    assert train(capsys, folder, rows)[0] == 0


def test_anomalous_row_in_training(capsys, world):
    folder, rows = world
    rows[2]["label"] = 1
    refused(train(capsys, folder, rows), 1, "healthy scans only", "label 1")


def test_patient_in_two_splits(capsys, world):
    folder, rows = world
    rows[30]["patient"] = "P0"
    result = train(capsys, folder, rows)
    refused(result, 1, "more than one split", "train")
    assert "P0" not in result[2]   # hashed


def test_unknown_key(capsys, world):
    folder, rows = world
    refused(train(capsys, folder, rows, "train.epoch=3"), 2, "train.epoch", "did you mean 'train.epochs'")


def test_unused_key(capsys, world):
    folder, rows = world
    refused(train(capsys, folder, rows, "model.noise_std=.1"), 2, "noise_std", "dae")


def test_wrong_type(capsys, world):
    folder, rows = world
    refused(train(capsys, folder, rows, "train.epochs=many"), 2, "train.epochs", "many")
    refused(train(capsys, folder, rows, "train.schedule=cosine"), 2, "schedule", "cosine")


def test_empty_healthy_set(capsys, world):
    folder, rows = world
    refused(train(capsys, folder, [r for r in rows if r["split"] != "train"]), 1, "no healthy scan in split 'train'")
    refused(train(capsys, folder, [r for r in rows if r["split"] != "val"]), 1, "no healthy scan in split 'val'")


def test_nan_image(capsys, world):
    folder, rows = world
    x = phantom(1, size=32, spatial_dims=3)[0][0]
    x[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(x, np.eye(4)), folder/"nan.nii.gz")
    rows[1]["path"] = "nan.nii.gz"
    refused(train(capsys, folder, rows), 1, "nan.nii.gz")


def test_channels(capsys, world):
    folder, rows = world
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder/"colour.png")
    rows[1]["path"] = "colour.png"
    refused(train(capsys, folder, rows), 1, "colour.png", "3")


def test_another_run_in_the_folder(capsys, world):
    folder, rows = world
    assert train(capsys, folder, rows)[0] == 0
    before = {p: p.read_bytes() for p in (folder/"run").rglob("*") if p.is_file()}
    refused(train(capsys, folder, rows, "train.lr=.5"), 2, "holds another run", "train.lr")
    refused(train(capsys, folder, rows), 2, "--resume")
    assert before == {p: p.read_bytes() for p in (folder/"run").rglob("*") if p.is_file()}
    (folder/"other").mkdir(); (folder/"other"/"thesis.docx").write_text("mine")
    refused(train(capsys, folder, rows, out="other"), 2, "holds files")
    assert (folder/"other"/"thesis.docx").read_text() == "mine"


def test_debug_shows_the_traceback(world):
    folder, _ = world
    with pytest.raises(Exception, match="does not exist"): main(["train", "chest_xray", f"data.table={folder/'no.csv'}", "--debug"])
