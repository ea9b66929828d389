"""What a file says about its patient goes nowhere: a mark is planted in every text a file can hold, and looked for in all that comes out.

Good and damaged files of each format are loaded, saved, tabled and scored while logs (down to DEBUG), warnings, both streams, exceptions as
a traceback prints them, scan metadata, tables, caches and written files are searched."""
import logging
import re
import traceback
import warnings
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom import config
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from anomdx.loaders import ALLOW, DataError, load_scan, save_map, save_mask
from scans import (block, image_header, write_enhanced, write_mosaic, write_series,
                   write_tomogram, write_vframe)

WORD, UID, NUMBER, DATE = "ZQXDOE", "1.2.826.0.1.770077007700", "770077.25", "19430711"   # WORD fits the shortest text field
MARKS = re.compile("|".join(map(re.escape, (WORD, "7700770077", "770077", DATE))), re.I)
MARK_OF = dict(AE=WORD, CS=WORD, LO=WORD, LT=WORD, PN=f"{WORD}^Jane", SH=WORD, ST=WORD, UC=WORD, UR=f"http://{WORD}", UT=WORD, UI=UID,
               DS=NUMBER, IS="770077", DA=DATE, DT=f"{DATE}101112", TM="770077", AS="077Y")
READ = {"SOPClassUID", "SpecificCharacterSet", "PhotometricInterpretation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "PixelSpacing", "ImagePositionPatient",
        "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices", "ImagerPixelSpacing",
        "NominalScannedPixelSpacing", "PixelAspectRatio",
        "EstimatedRadiographicMagnificationFactor"}   # a scan needs these as they are


# Planting ----------------------------------------------------------------------------------------------------------------------
config.settings.writing_validation_mode = config.settings.reading_validation_mode = config.IGNORE   # while planting
TEXTS = [(tag, vr.split(" or ")[0], keyword) for tag, (vr, _, _, _, keyword) in DicomDictionary.items()
         if vr.split(" or ")[0] in MARK_OF and tag >> 16 not in (0x0000, 0x0002, 0x0006, 0x5200, 0xFFFE)]
FEW = [*{vr: (tag, vr, keyword) for tag, vr, keyword in TEXTS}.values(), *(t for t in TEXTS if re.search("Patient|Physician|Institution|Comments|Description|UID$|Date$", t[2]) and t[0] < 0x00400000)]


def mark(d, tags=FEW, keep=READ, inner=True):
    "Text elements of the dictionary, private ones, and sequences that hold the same again"
    for tag, vr, keyword in tags:
        if keyword not in keep: put(d, tag, vr, MARK_OF[vr])
    for i, vr in enumerate(MARK_OF): put(d, 0x00091010 + i, vr, MARK_OF[vr])
    put(d, 0x00090010, "LO", WORD)
    if inner:
        deep = pydicom.Dataset(); deep.PatientComments = WORD; deep.ConceptCodeSequence = pydicom.Sequence([mark(pydicom.Dataset(), tags, {"SpecificCharacterSet"}, False)])
        for keyword in ("RequestAttributesSequence", "OtherPatientIDsSequence"): setattr(d, keyword, pydicom.Sequence([deep]))
    return d


def put(d, tag, vr, text):
    b = text.encode() + b" " * (len(text) % 2)
    d[Tag(tag)] = RawDataElement(Tag(tag), vr, len(b), b, 0, False, True)


def marked(folder, files=None, tags=FEW):
    for p in files or sorted(folder.iterdir()):
        d = mark(pydicom.dcmread(p), tags)
        d.SeriesInstanceUID, d.Modality = UID, "CT"
        d.save_as(p)


def dicom_files(folder):
    "Good and damaged: every field that is read holds the mark once, and files end too early"
    v = block(3, 9, 10)
    write_series(folder/"all", v); marked(folder/"all", tags=TEXTS)
    write_series(folder/"series", v); marked(folder/"series")
    write_enhanced(folder/"enhanced.dcm", v); marked(folder, [folder/"enhanced.dcm"])
    for write in (write_mosaic, write_vframe, write_tomogram):
        write(folder/f"{write.__name__}.dcm", v)
        marked(folder, [folder/f"{write.__name__}.dcm"])
    for options in (dict(syntax="JPEGLSLossless"), dict(syntax="RLELossless"), dict(drop=(1,)), dict(tilt=15.), dict(PatientID=lambda k: f"{WORD}{k}"),
                    dict(SeriesInstanceUID=lambda k: f"{UID}.{k}"), dict(BurnedInAnnotation="YES")):
        name = "_".join(options) + str(len(list(folder.iterdir())))
        write_series(folder/name, v if "drop" not in options else block(5, 9, 10), **options)
        marked(folder/name) if "PatientID" not in options and "SeriesInstanceUID" not in options else None
    plain = sorted((folder/"series").iterdir())
    good = plain[0].read_bytes()
    (folder/"one.dcm").write_bytes(good)
    for n in (200, 400, 2000, len(good) // 2, len(good) - 100): (folder/f"cut{n}.dcm").write_bytes(good[:n])
    for keyword in [*READ - {"SOPClassUID"}, "Modality", "Rows", "BitsAllocated", "PixelRepresentation", "SamplesPerPixel", "PlanarConfiguration", "ImageType", "PixelData", "Columns", "BurnedInAnnotation"]:
        for suffix, files in ((".dcm", plain[:1]), ("", plain)):   # a file, and a series with one such slice
            target = folder/f"bad_{keyword}{suffix}"
            if not suffix: target.mkdir()
            for i, p in enumerate(files):
                d = pydicom.dcmread(p); tag = Tag(keyword)
                if i == 0: put(d, tag, pydicom.datadict.dictionary_VR(tag).split(" or ")[0], WORD)
                d.save_as(target/p.name if not suffix else target)
    swapped = good.replace(b"CS", b"DS").replace(b"LO", b"US").replace(b"PN", b"SQ"); (folder/"wrong_vr.dcm").write_bytes(swapped)
    d = pydicom.dcmread(plain[0]); d.file_meta.TransferSyntaxUID = UID; d.save_as(folder/"syntax.dcm", implicit_vr=False, little_endian=True)
    return sorted(folder.iterdir())


def nifti_files(folder):
    img = nib.Nifti1Image(block(5, 6, 7), np.diag([2., 3, 4, 1])); img.set_qform(img.affine, 1); img.set_sform(img.affine, 1)
    h = img.header
    for key in ("descrip", "aux_file", "db_name", "intent_name"): h[key] = WORD.encode()
    for code in ("comment", "afni", "xcede", 44): h.extensions.append(nib.nifti1.Nifti1Extension(code, f"<x>{WORD}</x>".encode()))
    h.extensions.append(nib.nifti1.Nifti1DicomExtension(2, mark(pydicom.Dataset(), keep={"SpecificCharacterSet"}, inner=False)))
    for suffix in (".nii", ".nii.gz"): nib.save(img, folder/f"good{suffix}")
    other = img.affine.copy(); other[0, 3] = 50; img.set_qform(other, 1); nib.save(img, folder/"two.nii"); img.set_qform(None, 0); img.set_sform(None, 0); nib.save(img, folder/"none.nii")
    good = (folder/"good.nii").read_bytes()
    for n in (100, 300, 360, len(good) - 50): (folder/f"cut{n}.nii").write_bytes(good[:n])
    (folder/"cut.nii.gz").write_bytes((folder/"good.nii.gz").read_bytes()[:300])
    for at, name in ((0, "size"), (40, "dim"), (70, "datatype"), (76, "pixdim"), (108, "offset"), (123, "units"), (280, "srow"), (344, "magic"), (352, "extension"), (356, "code")):
        (folder/f"bad_{name}.nii").write_bytes(good[:at] + WORD.encode() + good[at + len(WORD):])
    return sorted(folder.iterdir())


def nrrd_files(folder):
    head = f"NRRD0005\n# {WORD}\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 7 6 5\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nkinds: domain domain domain\nendian: little\n" \
           f"encoding: raw\nspace origin: (1,2,3)\nlabels: \"{WORD}\" \"{WORD}\" \"{WORD}\"\ncontent: {WORD}\nspace units: \"mm\" \"mm\" \"mm\"\n{WORD}:={WORD}\nDICOM_0010_0010:={WORD}\n"
    write = lambda name, text: (folder/name).write_bytes(text.encode() + b"\n" + block(5, 6, 7).tobytes())
    write("good.nrrd", head)
    for field in ("type", "dimension", "space", "sizes", "space directions", "kinds", "endian", "encoding", "space origin", "space units"):
        write(f"bad_{field.replace(' ', '_')}.nrrd", re.sub(rf"^{field}: .*$", f"{field}: {WORD}", head, flags=re.M))
    write("bad_line.nrrd", head + f"{WORD}\n"); write("bad_field.nrrd", head + f"{WORD}: {WORD}\n"); write("bad_file.nrrd", head + f"data file: {WORD}\n")
    (folder/"cut.nrrd").write_bytes((folder/"good.nrrd").read_bytes()[:-50]); (folder/"head.nrrd").write_bytes(head.encode()[:90])
    return sorted(folder.iterdir())


def picture_files(folder):
    x = np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8)
    text = PngImagePlugin.PngInfo(); text.add_text("Title", WORD); text.add_text(WORD, WORD, zip=True); text.add_itxt("Author", WORD, zip=True)
    exif = Image.Exif()
    for tag in (270, 271, 272, 305, 306, 315, 316, 33432): exif[tag] = WORD
    exif.get_ifd(0x8769)[37510] = WORD.encode()
    Image.fromarray(x).save(folder/"good.png", pnginfo=text, exif=exif)
    Image.fromarray(x).save(folder/"good.jpg", exif=exif, comment=WORD)
    tags = {270: WORD, 271: WORD, 272: WORD, 305: WORD, 306: WORD, 315: WORD, 316: WORD, 33432: WORD, 700: WORD.encode(), 65000: WORD}
    for packing in ("raw", "tiff_lzw", "tiff_deflate"): Image.fromarray(x).save(folder/f"good_{packing}.tif", tiffinfo=tags, compression=packing)
    Image.fromarray(x).save(folder/"pages.tif", tiffinfo=tags, save_all=True, append_images=[Image.fromarray(x)])
    for p in list(folder.iterdir()):
        b = p.read_bytes()
        for part in (.3, .6, .95): (folder/f"cut{int(part * 100)}_{p.name}").write_bytes(b[:int(part * len(b))])
        for i, dice in enumerate([np.random.default_rng(j) for j in range(6)]):
            bad = bytearray(b)
            for at in dice.integers(8, min(len(b), 300), 4): bad[at] ^= 1 << int(dice.integers(8))
            (folder/f"flip{i}_{p.name}").write_bytes(bad)
    return sorted(folder.iterdir())


def npz_files(folder):
    x = np.zeros((3, 8, 9), np.uint8)
    np.savez(folder/"good.npz", images=x + 7, names=np.array([WORD] * 3))
    np.savez(folder/"object.npz", images=np.array([{WORD: WORD}], object), allow_pickle=True)
    (folder/"cut.npz").write_bytes((folder/"good.npz").read_bytes()[:-30])
    return [f"{p}#{key}/0" for p in sorted(folder.iterdir()) for key in ("images", "names", "no")]


MAKERS = dict(dicom=dicom_files, nifti=nifti_files, nrrd=nrrd_files, picture=picture_files, npz=npz_files)


# Looking -----------------------------------------------------------------------------------------------------------------------
class Ears(logging.Handler):
    "Every log record of every logger, as it would be printed"
    def __init__(self): super().__init__(logging.DEBUG); self.lines = []
    def emit(self, record): self.lines.append(self.format(record))


@pytest.fixture
def heard(capfd):
    "All that comes out while the test runs: each call gives what came since the last"
    ears, root = Ears(), logging.getLogger()
    level = root.level
    root.addHandler(ears); root.setLevel(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        def so_far():
            text = "\n".join([*ears.lines, *(f"{w.filename}: {w.message}" for w in caught), *capfd.readouterr()])
            ears.lines.clear(); caught.clear()
            return text
        yield so_far
    root.removeHandler(ears); root.setLevel(level)


def leaks(text, where):
    "The marked lines of a text; paths do not count, they are the caller's own"
    return sorted({f"{where}: {line.strip()[:200]}" for line in str(text).splitlines() if MARKS.search(line)})[:5]


def everything(scan): return f"{scan.meta} {scan.applied_operations} {scan!r}"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "Format -> its files; made once"
    @lru_cache
    def files(kind): return MAKERS[kind](tmp_path_factory.mktemp(kind))
    return files


@pytest.mark.parametrize("kind", MAKERS)
def test_loading_says_nothing(kind, planted, tmp_path, heard):
    "…in what it prints, logs and warns, in what it raises with all that led to it, and in the scan; a map and a mask do not either"
    files, found, outcome = planted(kind), [], {"loaded": 0, "refused": 0}
    heard()
    for p in files:
        name = Path(p).name
        for options in ({}, dict(allow=tuple(ALLOW)), dict(deidentified=True)):
            try: scan = load_scan(p, **options)
            except DataError as e:
                outcome["refused"] += 1
                found += leaks("".join(traceback.format_exception(e)), f"{name} exception"); continue
            outcome["loaded"] += 1
            found += leaks(everything(scan), f"{name} scan")
            if scan.ndim == 4 or len(scan) == 1:
                for out in (save_map(scan[:1].numpy() * 0, tmp_path/"out"/"map", scan), save_mask(scan[:1].numpy() * 0, tmp_path/"out"/"mask", scan)):
                    if name not in ("bad_srow.nii", "bad_pixdim.nii"): found += leaks(unpacked(out), f"{name} {out.name}")   # there the mark is a number of the grid
        found += leaks(heard(), f"{name} said")
    assert found == [], f"{len(found)} leaks"
    assert outcome["loaded"] >= 2 and outcome["refused"] >= 2


def unpacked(path):
    "A file's bytes as text, without its compression"
    import gzip
    b = Path(path).read_bytes()
    return (gzip.decompress(b) if b[:2] == b"\x1f\x8b" else b).decode("latin-1")


def test_the_marks_are_there(planted):
    "The tests would pass on files without marks: in good files they are found by other means"
    text = {p.name: unpacked(p if p.is_file() else next(p.iterdir())) for kind in ("dicom", "nifti", "nrrd") for p in planted(kind) if p.name[:3] != "cut"}
    assert text["all"].count(WORD) > 4000 and all(m in text["all"] for m in (UID, DATE, NUMBER))
    assert text["good.nii.gz"].count(WORD) > 8 and text["good.nrrd"].count(WORD) >= 8
    assert Image.open(next(p for p in planted("picture") if p.name == "good.png")).text["Author"] == WORD


def test_series_lists_and_tables_say_nothing(planted, tmp_path, heard):
    "find_series and read_table on a tree of good and bad files"
    series = pytest.importorskip("anomdx.series"); datasets = pytest.importorskip("anomdx.datasets")
    tree = planted("dicom")[0].parent
    heard()
    found, list_ = [], series.find_series(tree)
    found += leaks(list_, "find_series") + leaks("\n".join(map(str, list_)), "find_series") + leaks(getattr(list_, "__dict__", ""), "find_series")
    found += leaks(heard(), "find_series said")
    (tmp_path/"pictures"/"healthy").mkdir(parents=True); (tmp_path/"pictures"/"anomalous").mkdir()
    for i in range(6): Image.fromarray(block(9, 9, seed=i).astype(np.uint8)).save(tmp_path/"pictures"/("healthy" if i < 4 else "anomalous")/f"{i}.png")
    lines = ["path,label,patient,PatientName,site", *(f"pictures/healthy/{i}.png,0,{WORD}{i},{WORD},x" for i in range(4))]
    (tmp_path/"table.csv").write_text("\n".join(lines))
    table = datasets.read_table(tmp_path/"table.csv")
    found += leaks(table[["path", "patient", "id"]].to_csv(), "table")
    (tmp_path/"bad.csv").write_text("\n".join([*lines, f"pictures/none.png,0,{WORD},{WORD},x"]))
    try: datasets.check_table(datasets.split_table(datasets.read_table(tmp_path/"bad.csv"), seed=0))
    except DataError as e: found += leaks("".join(traceback.format_exception(e)), "bad table")
    found += leaks(heard(), "tables said")
    assert found == []


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    "A run trained for one epoch on made pictures"
    from anomdx.cli import main
    from anomdx.cohorts import phantom
    folder = tmp_path_factory.mktemp("run")
    rows = ["path,label,patient,split"]
    for i in range(32):
        x, _ = phantom(i, size=32, lesion=i >= 30)
        Image.fromarray(np.uint8(255 * x[0])).save(folder/f"{i}.png")
        rows.append(f"{i}.png,{int(i >= 30)},{WORD}{i},{'train' if i < 8 else 'val' if i < 28 else 'test'}")
    (folder/"table.csv").write_text("\n".join(rows))
    with pytest.raises(SystemExit) as e:
        main(["train", "chest_xray", f"data.table={folder/'table.csv'}", "transform.size=32", "transform.augment=false", "train.epochs=1", "model.name=ae", "eval.n_boot=20", "--out", str(folder/"run")])
    assert not e.value.code
    return folder


def test_runs_and_commands_say_nothing(run_folder, planted, tmp_path, heard):
    "train left no patient in its folder; predict and config check print and write none, whatever they are given"
    from anomdx.cli import main
    heard()

    def call(*args):
        try: main([str(a) for a in args])
        except SystemExit as e: return e.code or 0

    found = []
    for p in (run_folder/"run").rglob("*"):
        if p.is_file(): found += leaks(unpacked(p) if p.suffix in (".json", ".jsonl", ".yaml", ".csv", ".html") else p.name, f"run/{p.name}")
    pictures = {p.name: p for p in planted("picture")}
    write_series(tmp_path/"xray", block(1, 40, 40)); marked(tmp_path/"xray")
    heard()
    status = call("predict", run_folder/"run", *(pictures[n] for n in ("good.png", "good.jpg", "good_tiff_lzw.tif")), next((tmp_path/"xray").iterdir()), "--out", tmp_path/"out")
    said = heard()
    assert status == 0, said
    found += leaks(said, "predict said")
    for p in (tmp_path/"out").rglob("*"):
        if p.is_file(): found += leaks(p.relative_to(tmp_path), "name") + leaks(unpacked(p), f"out/{p.name}")
    for bad in (pictures["cut30_good.png"], pictures["cut60_good_raw.tif"]):
        call("predict", run_folder/"run", bad, "--out", tmp_path/"out2"); call("--debug", "config", "check", "chest_xray", f"data.table={run_folder/'table.csv'}")
    call("config", "check", "chest_xray", f"data.table={run_folder/'table.csv'}")
    found += leaks(heard(), "commands said")
    assert found == []
