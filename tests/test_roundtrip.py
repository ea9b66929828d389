"""A map written back lands on the right voxel: random geometries, read back by libraries that nobody here wrote.

A mark is planted at a voxel whose place in the patient is known from how the file was made; the map that holds it goes through
load_scan, save_map (or save_mask) and another reader, and must be found at that place."""
import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Orientation, Spacing

from anomdx.loaders import LoadError, load_scan, save_map, save_mask
from scans import block, write_series

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings, strategies as st

LETTERS = ["RAS", "RSA", "ARS", "ASR", "SRA", "SAR"]
FLIPS = str.maketrans("RAS", "LPI")


def random_cases(n): return lambda f: settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))(f)


@st.composite
def geometries(draw):
    "A voxel -> RAS affine: any axis order, flips, an oblique turn, anisotropic voxels, an origin; and the grid it belongs to"
    shape = draw(st.tuples(*[st.integers(4, 9)] * 3))
    spacing = np.array(draw(st.tuples(*[st.floats(.3, 4.)] * 3)))
    turn = nib.eulerangles.euler2mat(*draw(st.tuples(*[st.floats(-3., 3.)] * 3))) if draw(st.booleans()) else np.eye(3)
    swap = np.eye(3)[list(draw(st.permutations(range(3))))] * np.array(draw(st.tuples(*[st.sampled_from([-1, 1])] * 3)))
    origin = np.array(draw(st.tuples(*[st.floats(-300, 300)] * 3)))
    return shape, nib.affines.from_matvec(turn @ swap @ np.diag(spacing), origin)


def planted(shape, dice):
    "A map with one bright voxel away from the centre, and its index"
    amap = dice.random(shape).astype(np.float32) * .1
    where = tuple(int(dice.integers(0, n)) for n in shape)
    amap[where] = 5.
    return amap, np.array(where)


def place(path):
    "Where the brightest voxel of a file lies in the patient, RAS mm, as nibabel or SimpleITK read it"
    if path.suffix == ".nrrd":
        sitk = pytest.importorskip("SimpleITK")
        img = sitk.ReadImage(str(path)); x = sitk.GetArrayFromImage(img).T
        return np.array(img.TransformIndexToPhysicalPoint([int(i) for i in np.unravel_index(x.argmax(), x.shape)])) * [-1, -1, 1]
    img = nib.load(path); x = np.asarray(img.dataobj)
    index = [*np.unravel_index(x.argmax(), x.shape), 0, 0][:3]
    return nib.affines.apply_affine(img.affine, index)


def check(scan, affine, dice, folder, to_file=lambda index: index):
    "Plant a mark in a map and a mask of `scan`; both files hold it where `affine` (of the file that was made) says"
    amap, where = planted(scan.shape[1:], dice)
    truth, size = nib.affines.apply_affine(affine, to_file([*where, 0, 0][:3])), min(np.linalg.norm(affine[:3, :3], axis=0))
    for path in (save_map(amap[None], folder/"map", scan), save_mask(amap[None] > 1, folder/"mask", scan)):
        assert np.linalg.norm(place(path) - truth) < .5 * size, path.name
        back = load_scan(path)
        index = np.unravel_index(int(back[0].argmax()), back.shape[1:])
        assert np.linalg.norm(nib.affines.apply_affine(np.asarray(back.affine), [*index, 0, 0][:3]) - truth) < .5 * size


@random_cases(70)
@given(geometries(), st.sampled_from([(1, 1), (1, 0), (0, 1), (2, 4), (0, 3), (4, 0)]), st.booleans(), st.integers(0, 999))
def test_nifti(tmp_path_factory, geometry, codes, flat, seed):
    "3D and 2D, whichever of qform and sform is coded; the codes of the input are the codes of the map"
    folder, dice = tmp_path_factory.mktemp("nifti"), np.random.default_rng(seed)
    shape, affine = geometry
    img = nib.Nifti1Image(block(*shape[:2 if flat else 3]), None)
    img.set_qform(affine if codes[0] else None, codes[0]); img.set_sform(affine if codes[1] else None, codes[1])
    nib.save(img, folder/"in.nii.gz")
    scan = load_scan(folder/"in.nii.gz")
    check(scan, affine, dice, folder)
    for name in ("map.nii.gz", "mask.nii.gz"): assert tuple(int(nib.load(folder/name).header[k]) for k in ("qform_code", "sform_code")) == codes


@random_cases(15)
@given(geometries(), st.floats(.05, .5), st.integers(0, 999))
def test_sheared_nifti(tmp_path_factory, geometry, shear, seed):
    "Only an sform can hold a shear: the map keeps it to the last bit, or the file is refused"
    folder, dice = tmp_path_factory.mktemp("shear"), np.random.default_rng(seed)
    shape, affine = geometry
    affine = affine @ (np.eye(4) + shear * np.eye(4, k=1) * [0, 1, 1, 0])
    img = nib.Nifti1Image(block(*shape), None); img.set_qform(None, 0); img.set_sform(affine, 2); nib.save(img, folder/"in.nii.gz")
    try: scan = load_scan(folder/"in.nii.gz")
    except LoadError: return
    check(scan, affine, dice, folder)
    np.testing.assert_array_equal(nib.load(folder/"map.nii.gz").affine, nib.load(folder/"in.nii.gz").affine)


@random_cases(45)
@given(geometries(), st.sampled_from(["left-posterior-superior", "right-anterior-superior", "left-anterior-superior"]), st.integers(0, 999))
def test_nrrd(tmp_path_factory, geometry, space, seed):
    nrrd = pytest.importorskip("nrrd"); pytest.importorskip("SimpleITK")
    folder, dice = tmp_path_factory.mktemp("nrrd"), np.random.default_rng(seed)
    shape, affine = geometry
    flip = np.array([dict(l=-1, r=1, p=-1, a=1, s=1)[w[0]] for w in space.split("-")])
    nrrd.write(str(folder/"in.nrrd"), block(*shape), {"space": space, "space directions": (flip[:, None] * affine[:3, :3]).T, "space origin": flip * affine[:3, 3]})
    check(load_scan(folder/"in.nrrd"), affine, dice, folder)


@random_cases(40)
@given(st.floats(-3, 3), st.floats(-3, 3), st.tuples(*[st.floats(.3, 4.)] * 3), st.tuples(*[st.floats(-200, 200)] * 3), st.booleans(), st.integers(0, 999))
def test_dicom_series(tmp_path_factory, turn, nod, spacing, origin, single, seed):
    "A series, and one slice of it, whose grid is (rows, columns)"
    folder, dice = tmp_path_factory.mktemp("dicom"), np.random.default_rng(seed)
    affine = write_series(folder/"s", block(1 if single else 4, 5, 7), spacing, turn, nod, origin)
    scan = load_scan(next((folder/"s").iterdir()) if single else folder/"s")
    check(scan, affine, dice, folder, (lambda i: [i[1], i[0], 0]) if single else np.asarray)


@random_cases(40)
@given(geometries(), st.sampled_from(LETTERS), st.tuples(*[st.booleans()] * 3), st.tuples(*[st.floats(.6, 1.5)] * 3), st.integers(0, 999))
def test_monai_and_back(tmp_path_factory, geometry, letters, flip, zoom, seed):
    "Turned and resampled by MONAI, marked there, inverted by MONAI, and written: still the same place in the patient"
    folder, dice = tmp_path_factory.mktemp("monai"), np.random.default_rng(seed)
    shape, affine = tuple(n + 5 for n in geometry[0]), geometry[1]
    img = nib.Nifti1Image(block(*shape), affine); img.set_sform(affine, 1); nib.save(img, folder/"in.nii.gz")
    scan = load_scan(folder/"in.nii.gz")
    orient = Orientation("".join(c.translate(FLIPS) if f else c for c, f in zip(letters, flip)), labels=None)
    turned = orient(scan)
    coarse = Spacing(np.multiply(zoom, np.linalg.norm(np.asarray(turned.affine)[:3, :3], axis=0)), mode="bilinear")
    x = coarse(turned)
    where = [int(dice.integers(2, n - 2)) for n in x.shape[1:]]   # linear interpolation spreads the mark over its neighbours
    truth = nib.affines.apply_affine(np.asarray(x.affine), where)
    x[...] = 0.
    x[(0, *where)] = 1.
    amap = orient.inverse(coarse.inverse(x))
    assert amap.shape == scan.shape
    path = save_map(amap, folder/"map", scan)
    weight = np.asarray(nib.load(path).dataobj)
    index = np.stack(np.meshgrid(*map(np.arange, weight.shape), indexing="ij"), -1)
    centre = (index * weight[..., None]).sum((0, 1, 2)) / weight.sum()
    assert np.abs(np.linalg.solve(affine[:3, :3], nib.affines.apply_affine(affine, centre) - truth)).max() < .5   # voxels of the input
