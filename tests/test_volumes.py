"""Several volumes at the same places of one series, and one answer to every question about a folder.

Made series for every tag that may tell volumes apart, in many files and inside one; real ones against dcm2niix where ANOMDX_DATA names them."""
import itertools
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import MRImageStorage

from anomdx.loaders import LoadError, load_scan, series_groups
from anomdx.runs import find_scans
from anomdx.series import DicomSeriesReader, find_series
from scans import DATA, block, dataset, write_enhanced, write_series
from test_geometry import apart, converted, needs_data

N = 5   # slices


def truth(seed):
    return block(N, 9, 10, seed=seed)


def copies(folder, *versions, **shared):
    "The same places once for each of `versions` of the header; volume `t` holds `truth(t)`, and file names mix them"
    for t, changes in enumerate(versions):
        tags = dict(SOPClassUID=MRImageStorage, Modality="MR", AcquisitionNumber=1, InstanceNumber=1,
                    RescaleIntercept="-1024") | shared | changes
        write_series(folder/f"t{t}", truth(t), **tags)
        for p in sorted((folder/f"t{t}").iterdir()): p.rename(folder/f"{p.stem}_{len(versions) - t}.dcm")
        (folder/f"t{t}").rmdir()
    return folder


def check(folder, n, words=(), order=None):
    "What find_series lists, load_scan loads and find_scans gives; the volumes in the order of their keys"
    found = sorted(find_series(folder, progress=False), key=lambda s: (len(s.path), s.path))
    assert [s.findings for s in found] == [[]] * n, found
    assert sorted(find_scans([folder])) == sorted(s.path for s in found)
    for t, s in zip(order or range(n), found):
        scan = load_scan(s.path)
        assert s.shape == scan.shape[1:] and s.spacing == pytest.approx(scan.meta["spacing"])
        np.testing.assert_array_equal(scan.numpy()[0], truth(t).transpose(2, 1, 0), err_msg=s.note)
    for s, word in zip(found, words): assert s.note == word
    with pytest.raises(LoadError) as e: load_scan(folder)
    for s in found: assert s.path.rpartition("#")[2] in str(e.value) and s.note in str(e.value)
    assert "allow" not in str(e.value)
    return found, str(e.value)


# One series of many files -----------------------------------------------------------------------------------
SERIES = dict(
    echoes=([dict(EchoTime=80), dict(EchoTime=9.5)], ["EchoTime 9.5", "EchoTime 80"], [1, 0]),
    echo_numbers=([dict(EchoNumbers=2), dict(EchoNumbers=1)], ["EchoNumber 1", "EchoNumber 2"], [1, 0]),
    b_values=([dict(DiffusionBValue=1000.), dict(DiffusionBValue=0.), dict(DiffusionBValue=500.)],
              ["b 0", "b 500", "b 1000"], [1, 2, 0]),
    directions=([dict(DiffusionBValue=0.), *(dict(DiffusionBValue=1000., DiffusionGradientOrientation=v)
    for v in ([0., 0, 1], [1., 0, 0]))],
                ["b 0, no direction", "b 1000, direction 0 0 1", "b 1000, direction 1 0 0"], None),
    inversion=([dict(InversionTime=900), dict(InversionTime=150)], ["InversionTime 150", "InversionTime 900"],
               [1, 0]),
    flip=([dict(FlipAngle=15), dict(FlipAngle=3)], ["FlipAngle 3", "FlipAngle 15"], [1, 0]),
    energy=([dict(KVP=140), dict(KVP=80)], ["KVP 80", "KVP 140"], [1, 0]),
    magnitude_phase=([dict(ImageType=["ORIGINAL", "PRIMARY", "P", "ND"]),
    dict(ImageType=["ORIGINAL", "PRIMARY", "M", "ND"])], ["ImageType M", "ImageType P"], [1, 0]),
    times=([dict(TemporalPositionIdentifier=t) for t in (10, 9, 2)],
           [f"TemporalPosition {t}" for t in (2, 9, 10)], [2, 1, 0]),
    heart=([dict(TriggerTime=t) for t in (400, 0, 200)], [f"TriggerTime {t}" for t in (0, 200, 400)],
           [1, 2, 0]),
    heart_uneven=([dict(TriggerTime=lambda k, t=t: 100 * t + 30 * k * t) for t in range(3)],
                  ["TriggerTime 0", "TriggerTime 100", "TriggerTime 200"], None),
    breathing=([dict(NominalPercentageOfRespiratoryPhase=p) for p in (50., 0.)],
               ["respiratory 0", "respiratory 50"], [1, 0]),
    acquisitions=([dict(AcquisitionNumber=t) for t in (3, 1)], ["AcquisitionNumber 1", "AcquisitionNumber 3"],
                  [1, 0]),
    pet=([dict(FrameReferenceTime=t) for t in (90000, 0)],
         ["FrameReferenceTime 0", "FrameReferenceTime 90000"], [1, 0]),
    contrast=([dict(AcquisitionDate="20240101", AcquisitionTime=lambda k, t=t: f"1012{10 * t + k:02d}.5")
    for t in (3, 1)],
              ["AcquisitionTime +0 s", "AcquisitionTime +20 s"], [1, 0]),
    midnight=([dict(AcquisitionDateTime=t) for t in ("20240102000010", "20240101235950")],
              ["AcquisitionTime +0 s", "AcquisitionTime +20 s"], [1, 0]),
    content=([dict(ContentTime="101010"), dict(ContentTime="101000")],
             ["ContentTime +0 s", "ContentTime +10 s"], [1, 0]),
    instances=([dict(InstanceNumber=lambda k, t=t: N * t + k + 1) for t in (1, 0)],
               ["InstanceNumber 1", "InstanceNumber 6"], [1, 0]),
    slice_by_slice=([dict(InstanceNumber=lambda k, t=t: 2 * k + t + 1) for t in (1, 0)],
                    ["InstanceNumber 1", "InstanceNumber 2"], [1, 0]),
    both=([dict(EchoTime=e, TemporalPositionIdentifier=t) for e in (30, 10) for t in (2, 1)],
          [f"EchoTime {e}, TemporalPosition {t}" for e in (10, 30) for t in (1, 2)], [3, 2, 1, 0]),
    echo_and_order=([dict(EchoTime=e, InstanceNumber=lambda k, n=n: n + k) for n, e in ((1, 30), (6, 10),
    (11, 30), (16, 10))],
                    ["EchoTime 10, InstanceNumber 6", "EchoTime 10, InstanceNumber 16",
                    "EchoTime 30, InstanceNumber 1", "EchoTime 30, InstanceNumber 11"], [1, 3, 0, 2]),
    jitter=([dict(EchoTime=80), dict(EchoTime=9.5, places=np.arange(N) + .005)],
            ["EchoTime 9.5", "EchoTime 80"], [1, 0]),
)


@pytest.mark.parametrize("case", SERIES)
def test_each_tag_tells_volumes_apart(case, tmp_path):
    versions, words, order = SERIES[case]
    found, said = check(copies(tmp_path/"s", *versions), len(versions), words, order)
    assert (f"{len(versions)} volumes lie at the same places and differ in {words[0].split()[0]}"
            in said.replace("differ in TemporalPosition, ", "differ in "))
    for s in found:
        np.testing.assert_array_equal(DicomSeriesReader().read([str(p) for p in s.files]).numpy(),
                                      load_scan(s.path).numpy())


def test_tags_of_single_slices_and_names_do_not_count(tmp_path):
    "Numbers that differ from slice to slice, and what somebody typed: the first splits nothing, the second is told by its rank"
    versions = [dict(AcquisitionNumber=lambda k, t=t: 10 * k + t, SequenceName=f"Doe^Jane{t}",
                     RepetitionTime=lambda k: 500 + k) for t in range(2)]
    found, said = check(copies(tmp_path/"s", *versions), 2, ["sequence 1", "sequence 2"])
    assert "Doe" not in said + str(found)


def test_keys_are_the_same_whatever_files_are_called(tmp_path):
    a = copies(tmp_path/"a", dict(EchoTime=80), dict(EchoTime=9.5))
    (tmp_path/"b").mkdir()
    for k, p in enumerate(sorted(a.iterdir(), reverse=True)): shutil.copy(p, tmp_path/"b"/f"{k:03d}")
    keys = [{s.note: s.path.rpartition("#")[2] for s in find_series(tmp_path/f, progress=False)}
            for f in ("a", "b")]
    assert keys[0] == keys[1] and len(set(keys[0].values())) == 2


def test_single_places_are_pictures(tmp_path):
    "A cine of one slice: each time point is a picture"
    for t in range(3): write_series(tmp_path/"s", truth(0)[t:t + 1], TriggerTime=100 - 10 * t, tag=t)
    found = find_series(tmp_path/"s", progress=False)
    assert [s.findings for s in found] == [[]] * 3 and {s.note for s in found} == {"TriggerTime 100",
        "TriggerTime 90", "TriggerTime 80"}
    for s in found: assert load_scan(s.path).shape == (1, 9, 10)


# Refused ----------------------------------------------------------------------------------------------------
SAME = [dict(), dict()]
REFUSED = dict(repeated=SAME, scrambled=[dict(InstanceNumber=lambda k: [1, 7, 3, 9, 5][k]),
                                         dict(InstanceNumber=lambda k: [2, 6, 8, 4, 10][k])],
               some_times=[dict(AcquisitionTime=lambda k: "101010"), dict(AcquisitionTime=lambda k: "101010"
               if k else "101020")])


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_tag_tells_apart_is_refused_with_advice_that_helps(case, tmp_path):
    folder = copies(tmp_path/"s", *REFUSED[case])
    s, = find_series(folder, progress=False)
    with pytest.raises(LoadError) as e: load_scan(s.path, allow=("gap", "tilt"))
    assert s.findings and s.findings[0] in str(e.value) and "no tag in their headers tells" in str(e.value)
    assert "allow" not in str(e.value) and "keep one slice of each place" in str(e.value)


def test_exact_copies_are_told_in_the_same_words(tmp_path):
    write_series(tmp_path/"s", truth(0))
    for p in list((tmp_path/"s").iterdir()): shutil.copy(p, p.with_name(f"again_{p.name}"))
    s, = find_series(tmp_path/"s", progress=False)
    with pytest.raises(LoadError) as e: load_scan(s.path)
    assert s.findings == [f"copies of its own images in its folder: {N}"] and s.findings[0] in str(
        e.value) and "allow" not in str(e.value)


def test_a_volume_that_was_cut_short_is_told(tmp_path):
    "The last of three time points lacks two slices: the others load, it does not, unless asked for"
    folder = copies(tmp_path/"s", *[dict(TemporalPositionIdentifier=t) for t in range(3)])
    for p in folder.iterdir():
        d = pydicom.dcmread(p)
        if d.TemporalPositionIdentifier == 2 and d.ImagePositionPatient[2] > 12: p.unlink()
    found = {s.note: s for s in find_series(folder, progress=False)}
    assert [found[f"TemporalPosition {t}"].findings for t in range(3)] == [[], [], ["missing slices: 2, "
        "which other volumes of the series have"]]
    short = found["TemporalPosition 2"]
    with pytest.raises(LoadError) as e: load_scan(short.path)
    assert short.findings[0] in str(e.value) and "allow=('gap',)" in str(e.value)
    assert load_scan(short.path, allow=("gap",)).shape == (1, 10, 9, N - 2)
    with pytest.raises(LoadError) as e: load_scan(folder)
    assert "the others are refused: missing slices: 2" in str(e.value)


# Inside one file --------------------------------------------------------------------------------------------
def group(**tags):
    "Functional groups of a frame: each tag in the sequence that the standard puts it in"
    at = dict(EffectiveEchoTime="MREchoSequence", DiffusionBValue="MRDiffusionSequence",
              TemporalPositionTimeOffset="TemporalPositionSequence",
              NominalCardiacTriggerDelayTime="CardiacSynchronizationSequence",
              NominalPercentageOfRespiratoryPhase="RespiratorySynchronizationSequence",
              ComplexImageComponent="MRImageFrameTypeSequence", InversionTimes="MRModifierSequence",
              TemporalPositionIndex="FrameContentSequence",
              FrameAcquisitionDateTime="FrameContentSequence")
    return {at[k]: pydicom.Sequence([dataset(**{k: v})]) for k, v in tags.items()}


def enhanced(path, versions, order=None, **changes):
    "All versions of one stack in one file, frames shuffled; volume `t` holds `truth(t)`"
    order = np.random.default_rng(0).permutation(N * len(versions)) if order is None else order
    write_enhanced(path, np.concatenate([truth(t) for t in range(len(versions))]), order=order, **changes)
    d = pydicom.dcmread(path)
    rest = {int(k): f for k, f in zip(order, d.PerFrameFunctionalGroupsSequence)}
    for k, f in rest.items():
        f.PlanePositionSequence = [dataset(ImagePositionPatient=[-20., 30, 5 + 3. * (k % N)])]
        f.PixelValueTransformationSequence = [dataset(RescaleIntercept="0", RescaleSlope="1",
            RescaleType="US")]
        f.FrameContentSequence = [dataset(StackID="1", InStackPositionNumber=k % N + 1)]
        for name, v in versions[k // N].items():
            if name == "FrameContentSequence": f.FrameContentSequence[0].update(v[0])
            else: setattr(f, name, v)
    d.PlanePositionSequence = None; del d.PlanePositionSequence
    d.save_as(path, enforce_file_format=True)
    return path


FILES = dict(
    b_values=([group(DiffusionBValue=1000.), group(DiffusionBValue=0.)], ["b 0", "b 1000"], [1, 0]),
    echoes=([group(EffectiveEchoTime=30.), group(EffectiveEchoTime=4.6)],
            ["EchoTime 4.6", "EchoTime 30"], [1, 0]),
    times=([group(TemporalPositionIndex=t) for t in (3, 2, 1)], [f"TemporalPosition {t}" for t in (1, 2, 3)],
           [2, 1, 0]),
    offsets=([group(TemporalPositionTimeOffset=t) for t in (7.5, 0.)],
             ["TemporalOffset 0", "TemporalOffset 7.5"], [1, 0]),
    heart=([group(NominalCardiacTriggerDelayTime=t) for t in (40., 0.)],
           ["TriggerTime 0", "TriggerTime 40"], [1, 0]),
    breathing=([group(NominalPercentageOfRespiratoryPhase=t) for t in (40., 0.)],
               ["respiratory 0", "respiratory 40"], [1, 0]),
    components=([group(ComplexImageComponent=t) for t in ("PHASE", "MAGNITUDE")],
                ["component MAGNITUDE", "component PHASE"], [1, 0]),
    inversion=([group(InversionTimes=[t]) for t in (900., 80.)], ["InversionTime 80", "InversionTime 900"],
               [1, 0]),
    clock=([group(FrameAcquisitionDateTime=f"2024010110{t}00") for t in (30, 10)],
           ["AcquisitionTime +0 s", "AcquisitionTime +1200 s"], [1, 0]),
    both=([group(EffectiveEchoTime=e) | group(TemporalPositionIndex=t) for e in (9., 5.) for t in (1, 2)],
          [f"EchoTime {e}, TemporalPosition {t}" for e in (5, 9) for t in (1, 2)], [2, 3, 0, 1]),
)


@pytest.mark.parametrize("case", FILES)
def test_one_file_holds_several_volumes(case, tmp_path):
    versions, words, order = FILES[case]
    (tmp_path/"s").mkdir()
    file = enhanced(tmp_path/"s"/"e.dcm", versions)
    found, _ = check(tmp_path/"s", len(versions), words, order)
    assert all(s.path.startswith(f"{file}#") and s.files == [file] for s in found)
    with pytest.raises(LoadError) as e: load_scan(file)
    assert all(s.path in str(e.value) and s.note in str(e.value) for s in found)
    with pytest.raises(LoadError) as e: load_scan(f"{file}#nothing")
    assert found[0].path in str(e.value)


def test_frames_in_order_are_volumes_too(tmp_path):
    "No tag at all: time after time, or place after place, as the frames come"
    (tmp_path/"s").mkdir()
    for order in (range(2 * N), [N * t + k for k in range(N) for t in range(2)]):
        enhanced(tmp_path/"s"/"e.dcm", [{}, {}], order=list(order))
        check(tmp_path/"s", 2, ["frame 1", f"frame {N + 1 if order == range(2 * N) else 2}"])
    enhanced(tmp_path/"s"/"e.dcm", [{}, {}], order=[0, 7, 2, 3, 4, 5, 6, 1, 8, 9])
    s, = find_series(tmp_path/"s", progress=False)
    with pytest.raises(LoadError) as e: load_scan(s.path)
    assert s.findings[0] in str(e.value) and "share a place" in str(e.value) and "allow" not in str(e.value)


def test_several_files_that_each_hold_a_volume(tmp_path):
    "Enhanced files of one series: one volume each, and one of them with two"
    (tmp_path/"s").mkdir()
    for t, echo in enumerate((9., 5.)):
        enhanced(tmp_path/"s"/f"{t}.dcm", [group(EffectiveEchoTime=echo)], order=range(N),
                 SOPInstanceUID=f"1.2.{t}")
    found = {s.note: s for s in find_series(tmp_path/"s", progress=False)}
    assert {n: s.path for n, s in found.items()} == {"EchoTime 9": str(tmp_path/"s"/"0.dcm"),
        "EchoTime 5": str(tmp_path/"s"/"1.dcm")}
    with pytest.raises(LoadError) as e: load_scan(tmp_path/"s")
    assert "2 volumes lie at the same places and differ in EchoTime" in str(e.value)
    enhanced(tmp_path/"s"/"2.dcm", [group(EffectiveEchoTime=e) for e in (20., 30.)], SOPInstanceUID="1.2.9")
    found = {s.note: s for s in find_series(tmp_path/"s", progress=False)}
    assert sorted(found) == ["EchoTime 20", "EchoTime 30", "EchoTime 5", "EchoTime 9"]
    for t, n in ((0, "EchoTime 20"), (1, "EchoTime 30"), (0, "EchoTime 9"), (0, "EchoTime 5")):
        np.testing.assert_array_equal(load_scan(found[n].path).numpy()[0], truth(t).transpose(2, 1, 0))


def test_one_frame_a_file(tmp_path):
    "Enhanced files of one frame each are the slices of one volume"
    for k in range(N): enhanced(tmp_path/f"{k}.dcm", [{}], order=range(N))
    (tmp_path/"s").mkdir()
    for k in range(N):
        d = pydicom.dcmread(tmp_path/f"{k}.dcm")
        d.PerFrameFunctionalGroupsSequence, d.NumberOfFrames, d.SOPInstanceUID = [
            d.PerFrameFunctionalGroupsSequence[k]], 1, f"1.2.{k}"
        d.PixelData = truth(0)[k].astype("<i2").tobytes()
        d.save_as(tmp_path/"s"/f"{k}.dcm", enforce_file_format=True)
    s, = find_series(tmp_path/"s", progress=False)
    np.testing.assert_array_equal(load_scan(s.path).numpy()[0], truth(0).transpose(2, 1, 0))
    assert s.path == str(tmp_path/"s") and s.shape == (10, 9, N) and s.findings == []


# Two roads, one answer --------------------------------------------------------------------------------------
def mixed(folder, *parts):
    for k, options in enumerate(parts):
        options = dict(options)
        write_series(folder, truth(k) if (m := options.pop("n", N)) == N
                     else block(m, *options.pop("size", (9, 10)), seed=k), tag=k, **options)


TURN = 1.92e-3   # 0.11°
turned = lambda k: [np.cos(.3 + TURN * (k % 2)).round(6), np.sin(.3 + TURN * (k % 2)).round(6), 0,
                    -np.sin(.3 + TURN * (k % 2)).round(6), np.cos(.3 + TURN * (k % 2)).round(6), 0]
FOLDERS = dict(
    plain=[{}], no_uid=[dict(SeriesInstanceUID="")], missing_uid=[dict(SeriesInstanceUID=None)],
    own_uid=[dict(SeriesInstanceUID=lambda k: f"1.2.9.{k}")],
    own_uid_gap=[dict(SeriesInstanceUID=lambda k: f"1.2.9.{k}", drop=(2,))],
    no_uid_two_studies=[dict(SeriesInstanceUID="", StudyInstanceUID=f"1.2.{k}") for k in range(2)],
    no_uid_beside_series=[dict(SeriesInstanceUID=""), {}],
    own_uid_visits=[dict(SeriesInstanceUID=lambda k: f"1.2.9.{k}", StudyInstanceUID=lambda k: f"1.3.9.{k}")],
    no_uid_echoes=[dict(SeriesInstanceUID="", EchoTime=e) for e in (9, 5)],
    alternating=[dict(ImageOrientationPatient=turned)],
    alternating_spacing=[dict(PixelSpacing=lambda k: [1.5, .75 + .002 * (k % 2)])],
    one_turned=[dict(ImageOrientationPatient=lambda k: turned(k == 2))],
    one_other_size=[dict(drop=(2,)), dict(n=1, size=(8, 10), places=[2])], stray=[{}, dict(n=1, places=[40])],
    localizer=[{}, dict(n=3, nod=1.57), dict(n=3, turn=1.57, nod=1.57)], gap=[dict(drop=(2,))],
    tilt=[dict(tilt=15.)], two=[{}, dict(SeriesInstanceUID="1.2.7")],
    some_without_patient=[dict(PatientID=lambda k: "4711" if k else "")],
    two_patients=[dict(PatientID=lambda k: f"P{k % 2}")],
    some_without_frame=[dict(FrameOfReferenceUID=lambda k: "1.2.3" if k else "")],
    two_frames=[dict(FrameOfReferenceUID=lambda k: f"1.2.{k % 2}")],
    nowhere=[dict(ImagePositionPatient=lambda k: [0, 0, 3. * k] if k else None)],
    pictures=[dict(ImagePositionPatient=None, ImageOrientationPatient=None)],
    capture=[{}, dict(n=1, ImagePositionPatient=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.7")],
    derived=[{}, dict(n=3, nod=1.2, ImageType=["DERIVED", "SECONDARY", "MPR"])],
    dual_and_localizer=[dict(EchoTime=9), dict(EchoTime=5), dict(n=2, nod=1.57)],
    polarity=[dict(PhotometricInterpretation=lambda k: f"MONOCHROME{k % 2 + 1}")],
    bad_echo=[dict(EchoTime=9, SOPClassUID=MRImageStorage), dict(EchoTime=5, SOPClassUID=MRImageStorage,
    InstanceNumber=None)],
)
LOADABLE = dict(plain=1, no_uid=1, missing_uid=1, own_uid=1, own_uid_gap=0, no_uid_two_studies=2,
                no_uid_beside_series=2, own_uid_visits=N, no_uid_echoes=2, alternating=0,
                alternating_spacing=0, one_turned=0, one_other_size=0, stray=0, localizer=3, gap=0, tilt=0,
                two=2, some_without_patient=1, two_patients=0,
                some_without_frame=1, two_frames=0, nowhere=0, pictures=N, capture=2, derived=2,
                dual_and_localizer=3, polarity=0, bad_echo=2)


@pytest.mark.parametrize("case", FOLDERS)
def test_find_series_load_scan_and_predict_agree(case, tmp_path):
    "What has no finding loads as announced, what has one is refused in those words, the folder is refused unless it is one scan, and predict sees the same"
    folder = tmp_path/"s"
    mixed(folder, *FOLDERS[case])
    for p in folder.iterdir():
        if "missing_uid" in case or "bad_echo" in case:
            d = pydicom.dcmread(p)
            if "missing_uid" in case: del d.SeriesInstanceUID
            d.save_as(p)
    found = find_series(folder, progress=False)
    assert sum(not s.findings for s in found) == LOADABLE[case], found
    assert sorted(find_scans([folder])) == sorted(s.path for s in found)
    assert sorted(p for s in found for p in s.files) == sorted(folder.iterdir())
    for s in found:
        if not s.findings:
            scan = load_scan(s.path)
            assert s.shape == scan.shape[1:] and s.spacing == pytest.approx(
                scan.meta["spacing"]) and s.patient == scan.meta["patient"]
            continue
        with pytest.raises(LoadError) as e: load_scan(s.path)
        assert all(f in str(e.value) for f in s.findings)
        if "allow" in str(e.value): assert load_scan(s.path, allow=("gap", "tilt")).ndim == 4
    if len(found) == 1:
        if not found[0].findings: assert load_scan(folder).shape[1:] == found[0].shape
        return
    with pytest.raises(LoadError) as e: load_scan(folder)
    assert str(e.value).count("#") == min(9, sum(not s.findings for s in found))
    if all(s.findings for s in found): assert all(f in str(e.value) for s in found for f in s.findings)


def test_slices_in_sub_folders_are_pointed_to(tmp_path):
    folder = tmp_path/"one"
    write_series(folder, truth(0))
    for k, p in enumerate(sorted(folder.iterdir())):
        (folder/f"s{k}").mkdir()
        p.rename(folder/f"s{k}"/"x.dcm")
    with pytest.raises(LoadError, match="sub-folders hold DICOM files") as e: load_scan(folder)
    assert f"{folder}/**" in str(e.value) and f"find_series({str(folder)!r})" in str(e.value)
    s, = find_series(folder, progress=False)
    for path in (folder/"**", s.path):
        np.testing.assert_array_equal(load_scan(path).numpy()[0], truth(0).transpose(2, 1, 0))


def test_sub_folders_without_images_are_not_pointed_to(tmp_path):
    (tmp_path/"s").mkdir()
    (tmp_path/"s"/"notes.txt").write_text("no image")
    with pytest.raises(LoadError, match="holds no DICOM image; give") as e: load_scan(tmp_path)
    assert "**" not in str(e.value)


@pytest.mark.parametrize("places, named", [([0, 1, 2, 3, 50, 51, 52], False), ([0, 1, 2, 3, 50, 51, 52], True), ([0, 1, 50], False)])
def test_parts_far_apart_are_not_filled(tmp_path, places, named):
    uid = {} if named else dict(SeriesInstanceUID="")
    write_series(tmp_path/"s", block(len(places), 9, 10), spacing=(1, 1, 2.), places=places, **uid)
    far = 2 * max(b - a for a, b in itertools.pairwise(places))
    for allow in ((), ("gap",), ("gap", "tilt")):
        with pytest.raises(LoadError, match=f"its slices lie in parts up to {far} mm apart") as e:
            load_scan(tmp_path/"s", allow=allow)
        assert "allow" not in str(e.value) and "folder of its own" in str(e.value)
        s, = find_series(tmp_path/"s", allow=allow, progress=False)
        assert f"parts up to {far} mm apart" in s.findings[0]
    for p in sorted((tmp_path/"s").iterdir()):
        part = tmp_path/("high" if pydicom.dcmread(p).ImagePositionPatient[2] > 60 else "low")
        part.mkdir(exist_ok=True)
        p.rename(part/p.name)
    n = sum(k < 20 for k in places)
    assert load_scan(tmp_path/"low").shape[-1] == n   # the advice helps


def test_ten_steps_are_still_a_gap(tmp_path):
    write_series(tmp_path/"s", block(6, 9, 10), places=[0, 1, 2, 12, 13, 14])
    with pytest.raises(LoadError, match="missing slices: 9;"): load_scan(tmp_path/"s")
    assert load_scan(tmp_path/"s", allow=("gap",)).shape == (1, 10, 9, 15)


def test_times_are_told_without_float_noise(tmp_path):
    times = ["101010.100001", "101011.100011"]
    folder = copies(tmp_path/"s", *(dict(ContentTime=t) for t in times))
    check(folder, 2, ["ContentTime +0 s", "ContentTime +1 s"])


def test_interleaved_slices_are_a_finding_on_both_roads(tmp_path):
    mixed(tmp_path/"s", *FOLDERS["alternating"])
    found = find_series(tmp_path/"s", progress=False)
    assert [s.findings
            for s in found] == [["slices of its series between its own that are turned by 0.11°: 2"],
                                ["slices of its series between its own that are turned by 0.11°: 1"]]


def test_series_without_identifiers_say_so(tmp_path, caplog):
    caplog.set_level("INFO", "anomdx")
    mixed(tmp_path/"a", *FOLDERS["no_uid"])
    mixed(tmp_path/"b", *FOLDERS["own_uid"])
    notes = [s.note for s in find_series(tmp_path, progress=False)]
    assert notes == [f"no SeriesInstanceUID: {N} files of one folder, study and frame of reference",
                     f"a SeriesInstanceUID for each of {N} slices of one folder, study and frame of "
                     "reference"]
    assert sum("2 series without a SeriesInstanceUID of their own" in r.getMessage()
               for r in caplog.records) == 1
    load_scan(tmp_path/"a")
    assert notes[0] in caplog.records[-1].getMessage()


def test_series_in_several_folders(tmp_path):
    "Echoes in folders of their own; a series and its copy without common identifiers; a volume spread over two folders"
    for k, e in enumerate((9, 5)): write_series(tmp_path/f"e{k}", truth(k), EchoTime=e)
    for k in range(2): write_series(tmp_path/f"same{k}", truth(k), SeriesInstanceUID="1.2.77")
    for k in range(2):
        write_series(tmp_path/f"half{k}", truth(k), SeriesInstanceUID="1.2.78", drop=range(3) if k
                     else range(3, N))
    found = {s.path: s for s in find_series(tmp_path, progress=False)}
    assert [str(tmp_path/f) in found for f in ("e0", "e1", "same0", "same1")] == [True] * 4
    assert [found[str(tmp_path/f"e{k}")].note for k in range(2)] == ["EchoTime 9", "EchoTime 5"]
    assert not any(s.findings for s in found.values()) and len(found) == 5
    for s in found.values(): assert load_scan(s.path).shape[1:] == s.shape == (10, 9, N)


# Real ones --------------------------------------------------------------------------------------------------
@needs_data
def test_ge_time_points_equal_dcm2niix(tmp_path):
    "Only InstanceNumber tells the two volumes apart"
    folder = Path(DATA)/"dicom_odd"/"ge_two_times"
    found = find_series(folder, progress=False)
    assert [(s.shape, s.note, s.findings) for s in found] == [((64, 64, 12), f"InstanceNumber {n}", [])
        for n in (1, 16)]
    (array, affine), = converted(folder, tmp_path/"out")
    assert array.shape == (64, 64, 12, 2)
    for t, s in enumerate(found):
        far, off = apart(load_scan(s.path), array[..., t], affine)
        assert far < .01 and off == 0
    with pytest.raises(LoadError) as e: load_scan(folder)
    assert "2 volumes lie at the same places and differ in InstanceNumber" in str(e.value) and all(s.path
        in str(e.value) for s in found)


def test_many_slices_in_many_directions_stay_linear():
    "No comparison of each with each: 4,000 slices, each turned and at one place, in 20 volumes' worth of tags"
    def turned(k):
        a = k * np.pi / 4000
        d = dataset(SeriesInstanceUID="1.2", Rows=4, Columns=4, PixelSpacing=[1, 1],
                    ImagePositionPatient=[0, 0, 0], InstanceNumber=k,
                    ImageOrientationPatient=[float(np.cos(a)), float(np.sin(a)), 0, 0, 0, 1])
        return Path(f"{k:05d}"), d
    assert len(series_groups([turned(k) for k in range(4000)])) > 1000
    copied = [(Path(f"{t:02d}{k:04d}"), turned(0)[1]) for k, t in itertools.product(range(200), range(20))]
    for p, d in copied: pass
    flat = [(p, dataset(SeriesInstanceUID="1.2", Rows=4, Columns=4, PixelSpacing=[1, 1],
    ImagePositionPatient=[0, 0, int(p.name[2:])], TemporalPositionIdentifier=int(p.name[:2]),
                        ImageOrientationPatient=[1, 0, 0, 0, 1, 0])) for p, _ in copied]
    assert [len(g) for g in series_groups(flat).values()] == [200] * 20
