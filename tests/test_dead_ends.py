"""Whoever is refused can go on: thresholds that cannot be are found before training and can be set anew, and a run is
judged where its table is not."""
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomdx.cli import main
from anomdx.cohorts import phantom
from anomdx.datasets import LeakError
from anomdx.experiment import load_config, run, run_config
from anomdx.loaders import DataError, keyed_hash
from anomdx.reports import report_run
from anomdx.runs import calibrate, evaluate, open_run, predict

SMALL = ["transform.size=32", "transform.augment=false", "train.epochs=1", "train.batch_size=8",
         "model.name=ae", "eval.n_boot=20"]


def cohort(folder, val=20):
    "8 scans to train on, `val` to calibrate on, 4 healthy and 4 anomalous to test; the lines of their table"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,label,patient,split"]
    for i in range(16 + val):
        sick, split = i >= 12 + val, "train" if i < 8 else "val" if i < 8 + val else "test"
        Image.fromarray(np.uint8(255 * phantom(i, size=32, lesion=sick)[0][0])).save(folder/f"{i}.png")
        lines.append(f"{i}.png,{int(sick)},P{i},{split}")
    (folder/"t.csv").write_text("\n".join(lines))
    return lines


def call(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    out, err = capsys.readouterr()
    return e.value.code or 0, out, [l for l in err.splitlines() if l.startswith("anomdx:")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run that is trained and calibrated, and never evaluated; nobody changes it"
    world = tmp_path_factory.mktemp("hospital_a")
    lines = cohort(world)
    folder = run(load_config("chest_xray", [f"data.table={world/'t.csv'}", *SMALL]), world/"run")
    calibrate(open_run(folder))
    return world, lines


@pytest.fixture
def here(trained, tmp_path):
    "A copy of the run beside its table"
    shutil.copytree(trained[0], tmp_path/"a")
    config = tmp_path/"a"/"run"/"config.yaml"
    config.write_text(config.read_text().replace(str(trained[0]), str(tmp_path/"a")))
    return tmp_path/"a"/"run", trained[1]


@pytest.fixture
def away(here, tmp_path):
    "The run folder alone, and a table of scans it has not seen"
    folder, lines = here
    shutil.move(folder, tmp_path/"b")
    (tmp_path/"scans").mkdir()
    for i in range(28, 36): shutil.copy(tmp_path/"a"/f"{i}.png", tmp_path/"scans")
    shutil.rmtree(tmp_path/"a")
    rows = [l.rsplit(",", 1)[0] for l in (lines[0], *lines[29:])]
    (tmp_path/"scans"/"x.csv").write_text("\n".join(rows))
    return tmp_path/"b", tmp_path/"scans"/"x.csv"


@pytest.mark.parametrize("n, most", [(10, .909), (18, .947), (1, .5)])
def test_too_few_scans_are_found_first(capsys, tmp_path, n, most):
    "config check and train say the same, and nothing is made; the advice is good"
    cohort(tmp_path, val=n)
    args = ["chest_xray", f"data.table={tmp_path/'t.csv'}", *SMALL]
    for command in (["config", "check", *args], ["train", *args, "--out", tmp_path/"run"]):
        status, _, lines = call(capsys, *command)
        assert status == 1 and f"needs at least 19 healthy validation scans, got {n}" in lines[0]
        assert f"at most {most}: eval.target_specificity={most} " in lines[0]
        assert f"anomdx calibrate RUN --specificity {most}" in lines[0]
        assert not (tmp_path/"run").exists()
    status, out, _ = call(capsys, "config", "check", *args, f"eval.target_specificity={most}")
    assert status == 0 and "nothing to object to" in out
    assert call(capsys, "train", *args, f"eval.target_specificity={most}", "--out", tmp_path/"run")[0] == 0
    assert json.loads((tmp_path/"run"/"threshold.json").read_text())["n"] == n


@pytest.mark.parametrize("change, status, words", [
    ("eval.target_specificity=95", 2, "target_specificity must lie between 0 and 1, got 95"),
    ("eval.target_specificity=1", 2, "must lie between 0 and 1, got 1"),
    ("eval.pixel_specificity=0", 2, "pixel_specificity must lie between 0 and 1, got 0"),
    ("eval.pixel_specificity=.99999", 1, "healthy pixels, got 20480"),
    ("eval.target_specificity=.96", 1, "needs at least 24 healthy validation scans, got 20")])
def test_what_cannot_be_asked_for(capsys, trained, tmp_path, change, status, words):
    for command in (["config", "check"], ["train"]):
        got = call(capsys, *command, "chest_xray", f"data.table={trained[0]/'t.csv'}", *SMALL, change,
                   *(["--out", tmp_path/"run"] if command == ["train"] else []))
        assert got[0] == status and words in got[2][0] and not (tmp_path/"run").exists()


def test_made_cohorts_are_counted_before_they_are_made(capsys, tmp_path):
    for command, out in ((["config", "check"], []), (["train"], ["--out", tmp_path/"run"])):
        got = call(capsys, *command, "atlas", "data.n_val=3", "data.slices=2", *out)
        assert got[0] == 1 and "got 6" in got[2][0] and not (tmp_path/"run").exists()


def test_thresholds_anew(capsys, here):
    "Both ways lead to the same, and evaluate, report and predict follow"
    folder, _ = here
    first = json.loads((folder/"threshold.json").read_text())
    weights = (folder/"checkpoints"/"last"/"state.pt").read_bytes()
    evaluate(folder)
    assert "aims at specificity 95%" in report_run(folder).read_text()
    assert call(capsys, "calibrate", folder, "--specificity", .5)[0] == 0
    scores = pd.read_csv(folder/"validation.csv", float_precision="round_trip").score
    now = json.loads((folder/"threshold.json").read_text())
    assert now["value"] == np.sort(scores)[10] < first["value"]
    np.testing.assert_allclose(now["pixel"], first["pixel"], rtol=1e-5)   # the maps are made anew
    assert now["target_specificity"] == .5
    assert "aims at specificity 50%" in report_run(folder).read_text()   # evaluated again
    assert json.loads((folder/"metrics.json").read_text())["threshold"]["value"] == now["value"]
    validation = [folder.parent/f"{i}.png" for i in range(8, 28)]
    got = predict(folder, validation, folder.parent/"maps")
    assert abs(int(got.flagged.sum()) - 9) <= 1   # 11 of 20 pass; the one on the threshold rounds otherwise
    args = ["train", "chest_xray", f"data.table={folder.parent/'t.csv'}", *SMALL, "--out", folder]
    assert call(capsys, *args, "eval.target_specificity=.9", "eval.pixel_specificity=.9", "--resume")[0] == 0
    last = json.loads((folder/"threshold.json").read_text())
    assert (last["target_specificity"], last["pixel_specificity"]) == (.9, .9)
    assert last["pixel"] < first["pixel"]
    assert weights == (folder/"checkpoints"/"last"/"state.pt").read_bytes()
    refused = call(capsys, *args, "train.lr=.5", "--resume")
    assert refused[0] == 2 and "holds another run: its train.lr" in refused[2][0]


def test_an_old_run_that_asked_too_much_goes_on(capsys, here):
    "A run that was trained before anybody counted: no thresholds, and a specificity that cannot be"
    folder, _ = here
    for name in ("threshold.json", "validation.csv", "reference.npz"): (folder/name).unlink()
    config = folder/"config.yaml"
    config.write_text(re.sub(r"target_specificity: .*", "target_specificity: 0.99", config.read_text()))
    one = [folder.parent/"0.png", "--out", folder.parent/"maps"]
    for command in (["evaluate", folder], ["report", folder], ["predict", folder, *one]):
        status, _, lines = call(capsys, *command)
        assert status == 1 and "anomdx calibrate RUN --specificity 0.952" in lines[0]
    assert call(capsys, "calibrate", folder, "--specificity", .952)[0] == 0
    assert evaluate(folder)["threshold"]["target_specificity"] == .952
    assert run_config(folder).eval.target_specificity == .952


def test_judged_where_the_table_is_not(capsys, trained, away, tmp_path):
    "The figures are those of home, baselines included, and a patient it has learned from is still known"
    folder, table = away
    shutil.copytree(trained[0]/"run", tmp_path/"home")
    home, there = evaluate(tmp_path/"home"), evaluate(folder, table)
    for name in ("baselines", "auroc", "threshold"):
        assert there[name] == home[name]
    for patient in ("P3", "P20"):   # of train and of val
        leak = table.parent/"leak.csv"
        leak.write_text(table.read_text().replace("28.png,0,P28", f"28.png,0,{patient}"))
        with pytest.raises(LeakError, match=f"1 patients of .*leak.csv are in train.*{keyed_hash(patient)}"):
            evaluate(folder, leak)
    with pytest.raises(DataError, match="not on this machine; copy it here and write its place into "
                                        ".*config.yaml"):
        evaluate(folder)
    for command in (["evaluate", folder], ["report", folder]):
        status, out, lines = call(capsys, *command)
        assert status == 1 and len(lines) == 1 and "is not on this machine" in lines[0]
    status, _, _ = call(capsys, "calibrate", folder, "--specificity", .5)
    assert status == 0   # the scores of the validation scans are kept
    status, _, lines = call(capsys, "calibrate", folder, "--pixel-specificity", .5)
    assert status == 1 and "is not on this machine" in lines[0]
    assert len(predict(folder, [table.parent/"30.png"], tmp_path/"maps")) == 1


def test_an_old_run_away_from_home(capsys, away, caplog):
    "What needs the table is named and absent, everything else is given"
    folder, table = away
    (folder/"reference.npz").unlink()
    status, out, _ = call(capsys, "evaluate", folder, "--table", table, "--json")
    result = json.loads(out)
    assert status == 0 and result["n"] == 8 and result["baselines"] == {}
    assert set(result["absent"]) == {"baselines", "check that no patient was trained on"}
    said = [r.levelname for r in caplog.records if "absent are baselines and the check" in r.getMessage()]
    assert said == ["WARNING"]
    assert "no baselines" in call(capsys, "evaluate", folder, "--table", table)[1]


def test_a_run_keeps_nobody_by_name(trained):
    with np.load(trained[0]/"run"/"reference.npz") as z: kept = {k: z[k] for k in z}
    assert set(kept["patients/train"]) == {keyed_hash(f"P{i}") for i in range(8)}
    assert len(kept["patients/val"]) == 20
    assert re.findall(r"\bP\d+\b", (trained[0]/"run"/"validation.csv").read_text()) == []
