"""Nothing is left out without a word: every file and row is used, litter, or counted by kind in one line."""
import json
import logging
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom.data
import pytest
from PIL import Image
from scans import block, write_series

from anomdx.cli import main
from anomdx.cohorts import phantom
from anomdx.datasets import TableData, load_row, load_table, read_table, scans_below
from anomdx.loaders import DataError, load_scan
from anomdx.runs import find_scans

LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", "._a.png", ".hidden/b.png", "__MACOSX/c.mha")


def save(path, i=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.uint8(255 * phantom(i, size=32)[0][0])
    if path.suffix == ".gz":
        volume = np.uint8(255 * phantom(i, 16, spatial_dims=3)[0][0])
        nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    else:
        Image.fromarray(x).save(path, format=None if path.suffix else "PNG")
    return x


def touch(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(b"not a scan")


@pytest.fixture
def said(caplog):
    "What the rooms say of files and rows"
    caplog.set_level(logging.INFO)
    lines = lambda: [r.getMessage() for r in caplog.records if r.name == "anomdx.datasets"]
    return lambda word="are not": [l for l in lines() if word in l]


def test_bitmaps_beside_png(tmp_path, said):
    for name in ("healthy", "anomalous"):
        for i in range(7):
            save(tmp_path/name/(f"{i}.bmp" if i < 4 else f"{i}.BMP" if i == 4 else f"{i}.png"), i)
    table = read_table(tmp_path)
    assert table.label.value_counts().to_dict() == {0: 7, 1: 7}
    assert said() == [] and table.attrs["passed"] == {}
    for path in table.path:
        np.testing.assert_array_equal(load_scan(path)[0], save(tmp_path/"again.png", int(path[-5])))


@pytest.mark.parametrize("suffix", [".mha", ".img", ".gif", ".webp", ".txt", ".JSON", ".npz", ".nii.bz2", ""])
def test_other_formats_are_counted(tmp_path, said, suffix):
    for name in ("healthy", "anomalous"): save(tmp_path/name/"0.png")
    touch(tmp_path/"healthy", *(f"a{i}{suffix}" for i in range(5)), *LITTER)
    table = read_table(tmp_path)
    kind = {"": "without a suffix", ".nii.bz2": ".bz2"}.get(suffix, suffix.lower())
    assert len(table) == 2 and said() == [f"{tmp_path}: 5 files are not read: 5 {kind} in healthy/"]
    assert table.attrs["passed"] == {f"{kind} in healthy/": 5}


def test_analyze_beside_nifti(tmp_path, said):
    for name in ("healthy", "anomalous"):
        for i in range(3): save(tmp_path/name/f"{i}.nii.gz", i)
        touch(tmp_path/name, *(f"b{i}{s}" for i in range(3) for s in (".hdr", ".img")))
    assert len(read_table(tmp_path)) == 6
    (line,) = said()
    assert line.startswith(f"{tmp_path}: 12 files are not read: ")
    for kind in (".hdr in healthy/", ".img in healthy/", ".hdr in anomalous/", ".img in anomalous/"):
        assert f"3 {kind}" in line


def test_nothing_but_what_is_not_read(tmp_path):
    for name in ("healthy", "anomalous"): touch(tmp_path/name, "a.mha", "b.mha")
    with pytest.raises(DataError, match=r"holds no scans, but what is not read: 2 .mha in \w+/, 2 .mha"):
        read_table(tmp_path)


def test_files_without_a_suffix(tmp_path, said):
    "Known by what they hold: a DICOM file, a picture, a volume, a text"
    for name in ("healthy", "anomalous"): save(tmp_path/name/"0.png")
    x = save(tmp_path/"healthy"/"picture", 3)
    write_series(tmp_path/"one", block(1, 9, 9))
    shutil.move(next((tmp_path/"one").iterdir()), tmp_path/"healthy"/"IM0001")
    (tmp_path/"one").rmdir()
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path/"v.nii")
    shutil.move(tmp_path/"v.nii", tmp_path/"healthy"/"volume")
    touch(tmp_path/"healthy", "README")
    table = read_table(tmp_path)
    assert sorted(p.rsplit("/", 1)[1] for p in table.path[table.label == 0]) == ["0.png", "IM0001", "picture"]
    (line,) = said()
    for words in ("2 files are", "1 NIfTI without its suffix in healthy/", "1 without a suffix in healthy/"):
        assert words in line
    np.testing.assert_array_equal(load_scan(tmp_path/"healthy"/"picture")[0], x)


def test_sub_folders_of_a_folder_pair(tmp_path, said):
    "Looked into; whether they are patients is not guessed; a DICOM series in one is one scan"
    for i in range(4): save(tmp_path/"healthy"/f"p{i % 2}"/f"{i}.png", i)
    save(tmp_path/"anomalous"/"0.png")
    write_series(tmp_path/"healthy"/"ct", block(4, 9, 9))
    table = read_table(tmp_path)
    assert len(table) == table.patient.nunique() == 6 and str(tmp_path/"healthy"/"ct") in set(table.path)
    (line,) = said("sub-folder")
    assert "2 sub-folders, such as healthy/p0, hold several" in line and "column 'patient'" in line


def test_masks_as_bitmaps(tmp_path):
    mask = save(tmp_path/"x.png") > 128
    for mode, name in (("1", "one.bmp"), ("L", "eight.bmp")):
        Image.fromarray(np.uint8(255 * mask)).convert(mode).save(tmp_path/name)
        (tmp_path/"t.csv").write_text(f"path,label,mask\nx.png,1,{name}")
        np.testing.assert_array_equal(load_row(read_table(tmp_path/"t.csv").iloc[0])[1][0], mask)


def test_dicom_tree(tmp_path, said):
    "Reports, previews, damaged files and other objects of a tree are counted"
    write_series(tmp_path/"a", block(5, 9, 9))
    write_series(tmp_path/"b", block(5, 9, 9), SeriesInstanceUID="1.2.3")
    save(tmp_path/"a"/"preview.jpg")
    touch(tmp_path, "a/report.pdf", "b/report.pdf", "notes.xml", "b/cut.dcm")
    table = read_table(tmp_path, healthy="modality == 'CT'")
    assert len(table) + len(table.attrs["refused"]) == 2
    (line,) = said("not read")
    for words in ("1 .pdf in a/", "1 .pdf in b/", "1 .xml", "1 damaged DICOM in b/", "1 .jpg beside DICOM"):
        assert words in line


def test_bids_and_lists(tmp_path, said):
    for s in (1, 2):
        for kind in ("T1w", "FLAIR"):
            save(tmp_path/"bids"/f"sub-0{s}"/"anat"/f"sub-0{s}_{kind}.nii.gz", s)
    touch(tmp_path/"bids", "sub-01/anat/sub-01_T1w.json", "sub-01/anat/sub-01_T2w.mgz")
    (tmp_path/"bids"/"participants.tsv").write_text("participant_id\tgroup\nsub-01\tc\nsub-02\tc\nsub-03\tc")
    read_table(tmp_path/"bids", suffix="T1w", healthy="group == 'c'")
    (line,) = said()
    for words in ("2 FLAIR", "1 .mgz", "1 participants without a scan"):
        assert words in line
    for i in range(3): save(tmp_path/"task"/"imagesTr"/f"{i}.nii.gz", i)
    listed = dict(training=["imagesTr/0.nii.gz", "imagesTr/1.nii.gz"])
    (tmp_path/"task"/"dataset.json").write_text(json.dumps(listed))
    read_table(tmp_path/"task", healthy="part == 'training'")
    assert said()[1] == f"{tmp_path/'task'}: 1 files are not read: 1 in imagesTr/ not in the list"


def test_rows_that_no_split_uses(tmp_path, said):
    x = np.stack([save(tmp_path/"x.png", i) for i in range(6)])
    np.savez(tmp_path/"m.npz", train_images=x, train_labels=np.zeros(6), val_images=x,
             val_labels=[0, 0, 1, 1, 0, 2], test_images=x, test_labels=np.arange(6), extra=x)
    table = load_table(TableData(str(tmp_path/"m.npz")))
    assert said("not read") == [f"{tmp_path/'m.npz'}: 1 files are not read: 1 array 'extra'"]
    assert said("not used")[0].startswith(f"{tmp_path/'m.npz'}: 3 of 18 rows are not used: 3 anomalous")
    assert sum(table.attrs["unused"].values()) == 3
    lines = ["path,label,split", *(f"{i}.png,{-(i > 7)},{'train' if i < 4 else 'val'}" for i in range(10))]
    for i in range(10): save(tmp_path/f"{i}.png", i)
    (tmp_path/"t.csv").write_text("\n".join(lines))
    load_table(TableData(str(tmp_path/"t.csv")))
    assert said("not used")[1] == f"{tmp_path/'t.csv'}: 2 of 10 rows are not used: 2 with an unknown label"


def test_a_scanner_folder(tmp_path, said):
    "DICOM without suffixes and a preview: both, not the preview alone"
    write_series(tmp_path/"made", block(3, 9, 9))
    (tmp_path/"s").mkdir()
    for i, f in enumerate(sorted((tmp_path/"made").iterdir())):
        shutil.move(f, tmp_path/"s"/f"IM{i:06}")
    save(tmp_path/"s"/"preview.jpg")
    found = find_scans([tmp_path/"s"])
    assert found == [str(tmp_path/"s"), str(tmp_path/"s"/"preview.jpg")]
    assert load_scan(found[0]).shape == (1, 9, 9, 3)
    assert said() == []


def test_pictures_below(tmp_path, said):
    for name in ("top.png", "sub/0.png", "sub/1.png", "sub/2.png", "sub/deep/er/x.nii.gz"):
        save(tmp_path/name)
    touch(tmp_path, "sub/a.mha", *LITTER)
    assert len(find_scans([tmp_path])) == 5
    assert said() == [f"{tmp_path}: 1 files are not read: 1 .mha in sub/"]


def test_given_files_are_taken_or_refused(tmp_path):
    "A file that a user names is never passed over"
    touch(tmp_path, "a.mha", "Thumbs.db")
    (tmp_path/"empty").mkdir()
    given = [tmp_path/"a.mha", tmp_path/"Thumbs.db", tmp_path/"empty", tmp_path/"gone.png"]
    assert find_scans(given) == [str(p) for p in given]
    for p in given:
        with pytest.raises(DataError, match=p.name): load_scan(p)


def test_what_anomdx_wrote_is_no_scan(tmp_path, said):
    for name in ("a.png", "out/maps/a.tiff", "run/data/x/images/1.png"):
        save(tmp_path/name)
    touch(tmp_path, "out/scores.csv", "run/config.yaml", "run/provenance.json")
    assert find_scans([tmp_path]) == [str(tmp_path/"a.png")]
    (line,) = said()
    assert "3 written by anomdx in run/" in line and "2 written by anomdx in out/" in line


def test_a_known_tree(said):
    "pydicom's own, with a DICOMDIR: every file of it belongs to a series, or is counted"
    tree = Path(pydicom.data.get_testdata_file("dicomdirtests/DICOMDIR", download=False)).parent
    below = scans_below(tree)
    # lists of files
    files = {f for f in tree.rglob("*") if f.is_file() and not f.name.startswith("DICOMDIR")}
    used = {f for s in below.series for f in s.files}
    assert len(files) == len(used) + sum(below.passed.values()) and used <= files and not below.files


def test_the_command_line_says_it_once(capsys, tmp_path, said):
    "config check counts what is left out instead of objecting to nothing"
    for name in ("healthy", "anomalous"):
        for i in range(40 if name == "healthy" else 4):
            save(tmp_path/name/f"{i}.png", i)
    touch(tmp_path/"healthy", "a.mha")
    with pytest.raises(SystemExit) as e:
        main(["config", "check", "chest_xray", f"data.table={tmp_path}", "data.val=.5", "model.name=ae"])
    assert not e.value.code and "but 1 files that are not read" in capsys.readouterr().out


def test_masks_beside_scans_are_no_scans(tmp_path, said):
    for i in range(3):
        save(tmp_path/"images"/f"{i}.png", i)
        save(tmp_path/"Masks"/f"{i}.png", i)
    assert [Path(f).name for f in find_scans([tmp_path])] == ["0.png", "1.png", "2.png"]
    assert all("images" in f
               for f in find_scans([tmp_path])) and "3 by the name of their folder masks" in said()[0]
    assert len(find_scans([tmp_path/"Masks"])) == 3   # asked for by name
