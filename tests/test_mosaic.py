"""Slices that hide inside one picture or one file: Siemens mosaics, United Imaging's VFRAME pictures, nuclear medicine volumes.

Every right value is that of the voxels that were written, of dcm2niix or of SimpleITK; what cannot be known must be refused with what is missing."""
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from anomdx.loaders import (LoadError, dicom_header, dicom_headers, frame_headers, load_scan,
                            save_map, series_groups)
from anomdx.series import find_series
from scans import (DATA, block, compress, corners, csa_block, dataset, write_enhanced, write_mosaic,
                   write_tomogram, write_vframe)

needs_data = pytest.mark.skipif(not DATA, reason="ANOMDX_DATA does not name a folder with dicom_odd/")


def apart(scan, array, affine):
    "How far two readings of one volume are from each other: corner points in mm, and values at the same places in the patient"
    x, A = scan.numpy()[0], np.asarray(scan.affine)
    assert sorted(x.shape) == sorted(array.shape)
    # our voxel -> their voxel
    index = np.stack(np.meshgrid(*map(np.arange, x.shape), [1], indexing="ij"), -1)[...,
        0, :] @ (np.linalg.inv(affine) @ A).T
    near = np.rint(index[..., :3]).astype(int)
    assert np.abs(index[..., :3] - near).max() < .1 and (near >= 0).all() and (near < array.shape).all()
    return np.abs(corners(A, x.shape) - corners(affine,
        array.shape)).max(), np.abs(array[tuple(np.moveaxis(near, -1, 0))] - x).max()


def refused_for(what, path):
    "By what is missing or contradicts itself, and without advice that cannot help"
    with pytest.raises(LoadError) as e: load_scan(path)
    assert what in str(e.value) and "allow=" not in str(e.value)


def written(scan, voxels, affine):
    "Whether a scan is what was written"
    far, off = apart(scan, voxels.transpose(2, 1, 0), affine)
    return far < 1e-3 and off == 0


def converted(path, folder):
    "What dcm2niix makes of one file or folder: arrays (X, Y, Z, time) and affines"
    dcm2niix = pytest.importorskip("dcm2niix")
    folder.mkdir()
    subprocess.run([dcm2niix.bin, "-z", "n", "-b", "n", "-f", "%s_%r", "-o", folder, path],
                   capture_output=True)
    images = [nib.load(p) for p in sorted(folder.glob("*.nii"))]
    return [(np.asarray(img.dataobj, np.float32).reshape(*img.shape[:3], -1), img.affine) for img in images]


# Real files -------------------------------------------------------------------------------------------------
@needs_data
@pytest.mark.parametrize("name, shape", dict(siemens_mosaic=(72, 72, 5, 2),
                                             siemens_mosaic_axial35=(64, 64, 35, 1),
                                             uih_mosaic=(64, 64, 20, 2)).items())
def test_real_tiles_equal_dcm2niix(name, shape, tmp_path):
    "Volume by volume, by the file and as find_series lists it"
    folder = Path(DATA)/"dicom_odd"/name
    (array, affine), = converted(folder, tmp_path/"out")
    assert array.shape == shape
    found = find_series(folder, progress=False)
    assert [s.path for s in found] == [str(p)
                                       for p in sorted(folder.glob("*.dcm"))] and len(found) == shape[3]
    for k, s in enumerate(found):
        scan = load_scan(s.path)
        far, off = apart(scan, array[..., k], affine)
        assert far < .01 and off == 0
        assert s.findings == [] and s.shape == scan.shape[1:] and s.spacing == pytest.approx(
            scan.meta["spacing"])
        assert scan.meta["spacing"] == pytest.approx(np.linalg.norm(affine[:3, :3], axis=0),
            abs=1e-5) and scan.meta["oriented"]


@needs_data
@pytest.mark.parametrize("name", ["siemens_mosaic", "uih_mosaic"])
def test_real_tiles_by_key(name):
    "The folder is refused with a key for each volume, and each key gives what the file gives"
    folder = Path(DATA)/"dicom_odd"/name
    groups = series_groups(dicom_headers(folder))
    with pytest.raises(LoadError) as e: load_scan(folder)
    assert len(groups) == 2 and all(f"{folder}#{key} " in str(e.value) for key in groups)
    for key, part in groups.items():
        (path, _), = part
        a, b = load_scan(f"{folder}#{key}"), load_scan(path)
        np.testing.assert_array_equal(a.numpy(), b.numpy())
        np.testing.assert_array_equal(a.affine, b.affine)


@needs_data
def test_maps_of_a_mosaic_lie_where_its_slices_do(tmp_path):
    scan = load_scan(Path(DATA)/"dicom_odd"/"siemens_mosaic_axial35"/"0.dcm")
    far, off = apart(load_scan(save_map(scan, tmp_path/"map", scan)), scan.numpy()[0],
                     np.asarray(scan.affine))
    assert far < 1e-3 and off == 0


# Made mosaics -----------------------------------------------------------------------------------------------
PLACES = dict(axial={}, oblique=dict(turn=.3, nod=.4), coronal=dict(nod=np.pi / 2),
              sagittal=dict(turn=np.pi / 2, nod=np.pi / 2), fine=dict(spacing=(.1, .2, .05)))


@pytest.mark.parametrize("up", [1, -1])
@pytest.mark.parametrize("place", PLACES)
def test_made_mosaic(place, up, tmp_path):
    "Pixels that are no squares, tiles that are none, every direction, stacked either way: what was written, and dcm2niix"
    v = block(7, 14, 18)
    affine = write_mosaic(tmp_path/"a.dcm", v, up=up, **PLACES[place])
    scan = load_scan(tmp_path/"a.dcm")
    assert written(scan, v, affine)
    (array, theirs), = converted(tmp_path/"a.dcm", tmp_path/"out")
    far, off = apart(scan, array[..., 0], theirs)
    assert far < .01 and off == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 10, 35])
def test_every_number_of_tiles(n, tmp_path):
    "Square or not; one alone is a picture"
    v = block(n, 6, 8)
    affine = write_mosaic(tmp_path/"a.dcm", v)
    scan = load_scan(tmp_path/"a.dcm")
    if n > 1: assert written(scan, v, affine)
    else: np.testing.assert_array_equal(scan.numpy(), v)
    affine = write_vframe(tmp_path/"b.dcm", v)
    scan = load_scan(tmp_path/"b.dcm")
    if n > 1: assert written(scan, v, affine)
    else: np.testing.assert_array_equal(scan.numpy(), v)


@pytest.mark.parametrize("place", PLACES)
def test_made_vframe(place, tmp_path):
    v = block(7, 14, 18)
    affine = write_vframe(tmp_path/"a.dcm", v, **PLACES[place])
    assert written(load_scan(tmp_path/"a.dcm"), v, affine)


SYNTAXES = ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian", "RLELossless",
            "JPEGLSLossless", "JPEG2000Lossless"]


@pytest.mark.parametrize("write", [write_mosaic, write_vframe])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_transfer_syntax(write, syntax, tmp_path):
    pytest.importorskip("gdcm")
    v = block(5, 14, 18)
    affine = write(tmp_path/"a.dcm", v)
    compress(tmp_path, syntax)
    assert written(load_scan(tmp_path/"a.dcm"), v, affine)
    assert [(s.shape, s.findings) for s in find_series(tmp_path, progress=False)] == [((18, 14, 5), [])]


def unknown_vr(d):
    "As an archive writes that does not know the private elements: VR UN; a sequence in it is implicit"
    for e in [e for e in d if e.tag.is_private and not e.tag.is_private_creator]:
        if e.VR == "SQ":
            f = pydicom.filebase.DicomBytesIO(); f.is_implicit_VR, f.is_little_endian = True, True
            pydicom.filewriter.write_sequence(f, e, ["iso8859"])
            raw = f.getvalue()
        else:
            raw = e.value.to_bytes(2, "little") if e.VR == "US" else bytes(e.value,
                "ascii") if isinstance(e.value, str) else bytes(str(e.value),
                "ascii") if e.VR == "DS" else e.value
        d.add_new(e.tag, "UN", raw + bytes(len(raw) % 2))


LAYOUTS = dict(moved=dict(block=2), unknown=dict(edit=unknown_vr),
               short_type=dict(ImageType=["ORIGINAL", "PRIMARY"]),
               csa_number=dict(edit=lambda d: d.__delitem__(0x0019100a)))


@pytest.mark.parametrize("case", LAYOUTS)
def test_where_the_private_elements_lie(case, tmp_path):
    "Another block, an unknown VR, an ImageType that was cut short, one of the two numbers of slices only"
    v = block(5, 14, 18)
    affine = write_mosaic(tmp_path/"a.dcm", v, up=-1, **LAYOUTS[case])
    assert written(load_scan(tmp_path/"a.dcm"), v, affine)
    assert [(s.shape, s.findings) for s in find_series(tmp_path, progress=False)] == [((18, 14, 5), [])]


def test_vframe_of_unknown_vr(tmp_path):
    v = block(5, 14, 18)
    affine = write_vframe(tmp_path/"a.dcm", v, edit=unknown_vr, ImageType=["ORIGINAL", "PRIMARY", "M"])
    assert written(load_scan(tmp_path/"a.dcm"), v, affine)


def test_long_header(tmp_path):
    "The series header of a real mosaic is longer than what find_series reads at first"
    v = block(5, 14, 18)
    def edit(d): d.add_new(0x00291008, "OB", bytes(70000))   # before the block that counts
    write_mosaic(tmp_path/"a.dcm", v, edit=edit)
    assert [(s.shape, s.findings) for s in find_series(tmp_path, progress=False)] == [((18, 14, 5), [])]


def test_rescale(tmp_path):
    "A slope belongs to every tile"
    v = block(5, 14, 18)
    write_mosaic(tmp_path/"a.dcm", v, RescaleSlope=2, RescaleIntercept=-7)
    np.testing.assert_array_equal(load_scan(tmp_path/"a.dcm").numpy()[0], 2. * v.transpose(2, 1, 0) - 7)


# What is not known ------------------------------------------------------------------------------------------
def number(n): return lambda d: d.__setitem__(0x0019100a, pydicom.DataElement(0x0019100a, "US", n))
def csa(**values):
    return lambda d: d.__setitem__(0x00291010, pydicom.DataElement(0x00291010, "OB", csa_block(**values)))


UNKNOWN = dict(
    deidentified=(lambda d: d.remove_private_tags(), "NumberOfImagesInMosaic"),
    no_csa=(lambda d: d.__delitem__(0x00291010), "SliceNormalVector is missing"),
    damaged_csa=(lambda d: d[0x00291010].__setattr__("value", b"SV10" + bytes(40)), "SliceNormalVector is "
        "missing"),
    no_direction=(csa(NumberOfImagesInMosaic=[5]), "SliceNormalVector is missing"),
    other_direction=(csa(NumberOfImagesInMosaic=[5], SliceNormalVector=[1, 0, 0]), "not the normal"),
    no_spacing=(lambda d: d.__delitem__("SpacingBetweenSlices"), "SpacingBetweenSlices"),
    zero_spacing=(lambda d: setattr(d, "SpacingBetweenSlices", 0), "SpacingBetweenSlices"),
    no_position=(lambda d: d.__delitem__("ImagePositionPatient"), "position"),
    two_numbers=(number(6), "5 or 6 slices"),
    wrong_number=(lambda d: (number(17)(d), csa(NumberOfImagesInMosaic=[17], SliceNormalVector=[0, 0, 1])(d)),
                  "cannot be cut into 5 x 5 tiles"),
    huge_number=(lambda d: (number(65535)(d), csa(SliceNormalVector=[0, 0, 1])(d)), "cannot be cut into"),
    slices_left_over=(lambda d: (number(3)(d),
    csa(NumberOfImagesInMosaic=[5], SliceNormalVector=[0, 0, 1])(d)), "3 or 5 slices"),
    full_tiles=(lambda d: setattr(d, "PixelData", bytes(range(252)) * (len(d.PixelData) // 252)),
                "not empty"))


@pytest.mark.parametrize("case", UNKNOWN)
def test_mosaic_that_is_not_known_is_refused(case, tmp_path):
    "With what is missing, and without advice that cannot help"
    edit, what = UNKNOWN[case]
    write_mosaic(tmp_path/"a.dcm", block(5, 14, 18), edit=edit)
    with pytest.raises(LoadError, match=what) as e: load_scan(tmp_path/"a.dcm")
    assert "allow=" not in str(e.value) and "a.dcm" in str(e.value)
    s, = find_series(tmp_path, progress=False)
    assert case == "full_tiles" or what in s.findings[0]   # which is in the pixels


UNKNOWN_FRAMES = dict(
    deidentified=(lambda d: d.remove_private_tags(), "(0065,xx50)"),
    no_number=(lambda d: d.__delitem__(0x00651050), "(0065,xx50)"),
    no_places=(lambda d: d.__delitem__(0x00651051), "(0065,xx51)"),
    fewer_places=(lambda d: d[0x00651051].value.pop(), "7 slices with 6 places"),
    no_position=(lambda d: d[0x00651051].value[3].__delitem__("ImagePositionPatient"),
                 "no readable position"),
    wrong_size=(lambda d: (setattr(d, "Rows", 41), setattr(d, "PixelData", d.PixelData[:41 * d.Columns * 2])),
                "cannot be cut"), text=(lambda d: d.add_new(0x00651051, "LO", "1234567"), "7 places"),
    full_tiles=(lambda d: setattr(d, "PixelData", bytes(range(252)) * (len(d.PixelData) // 252)),
                "not empty"))


@pytest.mark.parametrize("case", UNKNOWN_FRAMES)
def test_vframe_that_is_not_known_is_refused(case, tmp_path):
    edit, what = UNKNOWN_FRAMES[case]
    write_vframe(tmp_path/"a.dcm", block(7, 14, 18), edit=edit)
    refused_for(what, tmp_path/"a.dcm")


def test_folder_of_unknown_mosaics(tmp_path):
    "No choice is offered where none can be loaded"
    for k in range(3):
        write_mosaic(tmp_path/f"{k}.dcm", block(5, 14, 18), edit=lambda d: d.remove_private_tags())
    with pytest.raises(LoadError, match="NumberOfImagesInMosaic") as e: load_scan(tmp_path)
    assert "choose one of" not in str(e.value)


def test_enhanced_files_that_say_mosaic(tmp_path):
    "Siemens XA30 leaves the word in files whose frames are slices; frames at one place are mosaics still"
    v = block(5, 14, 18)
    word = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    affine = write_enhanced(tmp_path/"a.dcm", v)
    write_enhanced(tmp_path/"b.dcm", v, ImageType=word)
    a, b = (load_scan(tmp_path/name) for name in ("a.dcm", "b.dcm"))
    np.testing.assert_array_equal(a.numpy(), b.numpy())
    np.testing.assert_allclose(a.affine, b.affine)
    d = pydicom.dcmread(tmp_path/"b.dcm")
    for f in d.PerFrameFunctionalGroupsSequence: f.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 0]
    d.save_as(tmp_path/"c.dcm")
    with pytest.raises(LoadError, match="several mosaics"): load_scan(tmp_path/"c.dcm")
    write_enhanced(tmp_path/"d.dcm", v[:1], ImageType=word)
    with pytest.raises(LoadError, match="NumberOfImagesInMosaic"): load_scan(tmp_path/"d.dcm")


# Nuclear medicine -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("between", [3., -3.])
@pytest.mark.parametrize("place", ["axial", "oblique", "coronal"])
def test_reconstructed_tomogram(place, between, tmp_path):
    "The sign of the spacing is the direction of the stack: what was written, and SimpleITK"
    sitk = pytest.importorskip("SimpleITK")
    v = block(6, 10, 12)
    affine = write_tomogram(tmp_path/"a.dcm", v, SpacingBetweenSlices=between, **PLACES[place])
    affine[:3, 2] *= np.sign(between)
    scan = load_scan(tmp_path/"a.dcm")
    assert written(scan, v, affine) and scan.meta["spacing"] == pytest.approx((.75, 1.5,
        3)) and scan.meta["modality"] == "NM"
    assert [(s.shape, s.findings) for s in find_series(tmp_path, progress=False)] == [((12, 10, 6), [])]
    img, theirs = sitk.ReadImage(str(tmp_path/"a.dcm")), np.eye(4)
    theirs[:3, :3], theirs[:3, 3] = np.reshape(img.GetDirection(), (3, 3)) * img.GetSpacing(), img.GetOrigin()
    far, off = apart(scan, sitk.GetArrayFromImage(img).astype(np.float32).T, np.diag([-1, -1, 1, 1]) @ theirs)
    assert far < .01 and off == 0


def test_slice_vector_orders_frames(tmp_path):
    v = block(6, 10, 12)
    order = np.array([0, 2, 4, 5, 3, 1])
    affine = write_tomogram(tmp_path/"a.dcm", v[order], SliceVector=(order + 1).tolist())
    assert written(load_scan(tmp_path/"a.dcm"), v, affine)
    write_tomogram(tmp_path/"b.dcm", v,
                   edit=lambda d: [d.__delitem__(k) for k in ("SliceVector", "FrameIncrementPointer",
        "NumberOfSlices")])
    assert written(load_scan(tmp_path/"b.dcm"), v, affine)


def test_one_slice_of_a_tomogram_has_its_place(tmp_path):
    affine = write_tomogram(tmp_path/"a.dcm", block(1, 10, 12))
    scan = load_scan(tmp_path/"a.dcm")
    assert scan.meta["oriented"] and scan.shape == (1, 10, 12)
    np.testing.assert_allclose(np.asarray(scan.affine)[:3, 3], affine[:3, 3])


@pytest.mark.parametrize("kind, what", {"STATIC": "views", "DYNAMIC": "times", "GATED": "heart phases",
                                        "WHOLE BODY": "whole body", "TOMO": "projections",
                                        "GATED TOMO": "projections"}.items())
def test_frames_that_are_no_slices(kind, what, tmp_path):
    "By name, and without advice that cannot help"
    write_tomogram(tmp_path/"a.dcm", block(6, 10, 12), kind=kind)
    with pytest.raises(LoadError, match=what) as e: load_scan(tmp_path/"a.dcm")
    assert f"of kind {kind}," in str(e.value) and "allow=" not in str(
        e.value) and "private" not in str(e.value)


def test_frames_of_an_unknown_kind(tmp_path):
    "The kind is not repeated: a header may say anything"
    write_tomogram(tmp_path/"a.dcm", block(6, 10, 12), kind="DOE^JANE")
    with pytest.raises(LoadError, match="ImageType does not say") as e: load_scan(tmp_path/"a.dcm")
    assert "DOE" not in str(e.value)


def test_gated_tomogram_says_which_time(tmp_path):
    "Each frame knows its slice and its time, from which volumes can be made"
    write_tomogram(tmp_path/"a.dcm", block(6, 10, 12), kind="RECON GATED TOMO", NumberOfSlices=3,
                   SliceVector=[1, 2, 3] * 2, TimeSlotVector=[1, 1, 1, 2, 2, 2])
    frames = frame_headers(dicom_header(tmp_path/"a.dcm"))
    assert [(h.ImagePositionPatient[2], h.TemporalPositionIdentifier) for h in frames] == [(5, 1), (8, 1),
        (11, 1), (5, 2), (8, 2), (11, 2)]
    keys = list(series_groups(dicom_headers(tmp_path/"a.dcm")))
    volumes = [load_scan(f"{tmp_path}#{key}") for key in keys]
    for volume, voxels in zip(volumes, (block(6, 10, 12)[:3], block(6, 10, 12)[3:])):
        np.testing.assert_array_equal(volume.numpy()[0], voxels.transpose(2, 1, 0))


REFUSED = dict(
    no_place=(lambda d: d.__delitem__("DetectorInformationSequence"), "DetectorInformationSequence"),
    two_places=(lambda d: d.DetectorInformationSequence.append(dataset(ImagePositionPatient=[0, 0, 0])),
                "more than one ImagePositionPatient"),
    no_spacing=(lambda d: d.__delitem__("SpacingBetweenSlices"), "SpacingBetweenSlices"),
    energies=(lambda d: setattr(d, "EnergyWindowVector", [1, 1, 1, 2, 2, 2]), "EnergyWindowVector"),
    short_vector=(lambda d: setattr(d, "SliceVector", [1, 2, 3]), "SliceVector"),
    turned=(lambda d: setattr(d, "SliceVector", [6, 5, 4, 3, 2, 1]), "first slice"),
    frames=(lambda d: (setattr(d, "NumberOfSlices", 3), d.__delitem__("SliceVector")),
            "6 frames of 3 slices"), many=(lambda d: setattr(d, "NumberOfFrames", 2000000000),
                                           "2000000000 frames"))


@pytest.mark.parametrize("case", REFUSED)
def test_tomogram_that_is_not_known_is_refused(case, tmp_path):
    edit, what = REFUSED[case]
    write_tomogram(tmp_path/"a.dcm", block(6, 10, 12), edit=edit)
    refused_for(what, tmp_path/"a.dcm")
