"""NIfTI files whose header is odd: what the standard allows is read, with the voxels and the place that nibabel's own arithmetic gives;
what is no geometry or contradicts itself is refused by the name of the field, and never with the free text of the header."""
import bz2
import gzip
import lzma
import math

import nibabel as nib
import numpy as np
import pytest

from anomdx.loaders import LoadError, load_scan, save_map
from scans import block

# 180 degrees about an axis: nothing is left for the fourth number
TURN = nib.quaternions.quat2mat([0, .6, 0, .8])
AFFINE = nib.affines.from_matvec(TURN @ np.diag([.8, 1.1, 2.5]), [40, -60, 12])
VOXELS = block(6, 5, 4)
TEXT = b"Doe^Jane 1961-05-04"


def nifti(path, codes=(1, 4), kind=nib.Nifti1Image, shape=None, data=None, order="<", **fields):
    "VOXELS in a file whose header fields are changed after all was written; free text names a patient"
    img = kind(VOXELS.reshape(shape or VOXELS.shape), None, kind.header_class(endianness=order))
    img.set_data_dtype(VOXELS.dtype.newbyteorder(order)); img.header.set_xyzt_units("mm")
    img.set_qform(AFFINE, 1); img.set_sform(AFFINE, 4)
    h = img.header
    h["qform_code"], h["sform_code"] = codes
    h["vox_offset"], h["magic"], h["scl_slope"], h["scl_inter"] = h.single_vox_offset, h.single_magic, 1, 0
    for name in ("descrip", "aux_file", "intent_name"): h[name] = TEXT[:h[name].dtype.itemsize]
    for name, value in fields.items():
        if isinstance(value, dict):
            for k, v in value.items(): h[name][k] = v
        else: h[name] = value
    body = VOXELS.astype(VOXELS.dtype.newbyteorder(order)).tobytes(order="F") if data is None else data
    path.write_bytes(h.binaryblock + bytes(4) + body)
    return path


def long(factor): return {f"quatern_{k}": float(v) * factor for k, v in zip("bcd", (.6, 0, .8))}


@pytest.mark.parametrize("codes", [(1, 4), (1, 0), (0, 4)])
@pytest.mark.parametrize("excess", [0, 1.2e-6, 9.9e-6, 5e-5, 9.9e-5])
def test_a_quaternion_that_rounding_made_too_long(tmp_path, codes, excess):
    scan = load_scan(nifti(tmp_path/"a.nii", codes, **long(1 + excess)))
    np.testing.assert_array_equal(scan[0], VOXELS)
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-3 if codes == (1, 0) else 1e-5)
    out = nib.load(save_map(scan, tmp_path/"map", scan))
    np.testing.assert_allclose(out.affine, scan.affine, atol=1e-5)
    assert [int(out.header[k]) for k in ("qform_code", "sform_code")] == list(codes)


@pytest.mark.parametrize("fields, said", [(long(1.01), r"quatern_b, c, d are 0\.606, 0, 0\.808, 1\.01 long"),
                                          (dict(quatern_c=math.nan), "quatern_b, c, d and qoffset"),
    (dict(qoffset_y=math.inf), "qoffset_x, y, z"), (dict(pixdim={2: 0}), r"pixdim\[1…3\] are 0\.8, 0, 2\.5"),
    (dict(pixdim={3: math.nan}), r"pixdim\[1…3\]"),
    (dict(pixdim={0: -2}), r"pixdim\[0\].*is -2"), (dict(pixdim={0: math.nan}), r"pixdim\[0\]")])
def test_a_qform_that_is_none(tmp_path, fields, said):
    "Beside a good sform it is not needed; alone, or asked for, it is named"
    scan = load_scan(nifti(tmp_path/"both.nii", (1, 4), **fields))
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-5); assert scan.meta["codes"] == (0, 4)
    np.testing.assert_allclose(nib.load(save_map(scan, tmp_path/"map", scan)).affine, AFFINE, atol=1e-5)
    for codes, allow in (((1, 0), ()), ((1, 4), ("qform",))):
        with pytest.raises(LoadError, match=said) as e:
            load_scan(nifti(tmp_path/"a.nii", codes, **fields), allow=allow)
        assert "damaged" not in str(e.value) and ("allow=('sform',)" in str(e.value)) == bool(allow)


@pytest.mark.parametrize("row", [[math.nan, 0, 0, 0], [0, 0, 0, 0], [math.inf, 0, 0, 1]])
def test_an_sform_that_is_none(tmp_path, row):
    with pytest.raises(LoadError,
                       match=r"sform that is no geometry: srow_x, y, z are .*; repair its header$"):
        load_scan(nifti(tmp_path/"s.nii", (0, 4), srow_x=row))
    with pytest.raises(LoadError, match=r"choose its qform with allow=\('qform',\)"):
        load_scan(nifti(tmp_path/"b.nii", (1, 4), srow_x=row))
    scan = load_scan(tmp_path/"b.nii", allow=("qform",))
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-4)
    np.testing.assert_allclose(nib.load(save_map(scan, tmp_path/"map", scan)).affine, AFFINE, atol=1e-4)


def test_fields_that_do_not_matter(tmp_path):
    "Sides and sizes that the standard lets a writer leave out, and sizes below 0, give what nibabel gives"
    for fields in (dict(pixdim={0: 0}), dict(pixdim={1: -.8}), dict(bitpix=0), dict(sizeof_hdr=0),
                   dict(cal_max=math.nan), dict(xyzt_units=0), dict(scl_slope=0), dict(scl_slope=math.nan)):
        scan = load_scan(nifti(tmp_path/"a.nii", (1, 0), **fields))
        np.testing.assert_array_equal(scan[0], VOXELS)
        np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-4)
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        for order in "<>":
            scan = load_scan(nifti(tmp_path/"a.nii", kind=kind, order=order))
            np.testing.assert_array_equal(scan[0], VOXELS)
    np.testing.assert_allclose(load_scan(nifti(tmp_path/"a.nii", scl_slope=2, scl_inter=-7))[0],
                               VOXELS * 2. - 7)


@pytest.mark.parametrize("fields, said", [(dict(dim={0: 0}), r"dim\[0\] is 0"),
                                          (dict(dim={0: 9}), r"dim\[0\] is 9"),
                                          (dict(dim={2: 0}), r"holds no voxels \(6, 0, 4\)"),
    (dict(dim={3: -4}), "holds no voxels"), (dict(datatype=77), "datatype is 77"),
    (dict(vox_offset=0), "vox_offset is 0"), (dict(vox_offset=math.nan), "vox_offset is nan"),
    (dict(scl_slope=2, scl_inter=math.inf), "scl_inter is inf"), (dict(magic=b"ni1"), "magic"),
    (dict(magic=b"huh"), "is no NIfTI file"), (dict(xyzt_units=1), "in meter"),
    (dict(xyzt_units=5), r"an unknown unit \(5\)"),
    (dict(datatype=32, bitpix=64), "one real number per voxel"),
    (dict(datatype=2, bitpix=16), "bitpix is 16, its datatype has 8"),
    (dict(dim={0: 4, 1: 6, 2: 5, 3: 2, 4: 0}), r"dim\[4\] is 0, but more values follow")])
def test_what_contradicts_itself_is_named(tmp_path, fields, said):
    with pytest.raises(LoadError, match=said) as e: load_scan(nifti(tmp_path/"a.nii", **fields))
    assert "damaged" not in str(e.value) and not any(word in str(e.value) for word in ("Doe", "Jane", "1961"))


def test_a_length_of_zero_is_one(tmp_path):
    for dims in ({0: 4, 4: 0}, {0: 5, 4: 0, 5: 0}, {0: 7, 4: 1, 5: 0, 6: 1, 7: 0}):
        scan = load_scan(nifti(tmp_path/"a.nii", dim=dims)); np.testing.assert_array_equal(scan[0], VOXELS)
        np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-5)
    scan = load_scan(nifti(tmp_path/"flat.nii", dim={0: 3, 1: 6, 2: 20, 3: 0}))
    np.testing.assert_array_equal(scan[0], VOXELS.reshape(6, 20, 1, order="F"))


def test_a_size_that_is_missing_is_not_known(tmp_path):
    "Without a place, a voxel size of 0 is none; what libraries fill in without a unit is none either"
    for sizes, unit, known in ((dict(zip((1, 2, 3), (.8, 0, 2.5))), 2, (.8, math.nan, 2.5)),
                               ({1: 0, 2: 0, 3: 0}, 2, (math.nan,) * 3),
                               ({1: 1, 2: 1, 3: 1}, 0, (math.nan,) * 3), ({1: 1, 2: 1, 3: 1}, 2, (1, 1, 1)),
                               ({}, 0, (.8, 1.1, 2.5))):
        scan = load_scan(nifti(tmp_path/"a.nii", (0, 0), pixdim=sizes, xyzt_units=unit),
                         allow=("unoriented",))
        np.testing.assert_allclose(scan.meta["spacing"], known, rtol=1e-6)
        np.testing.assert_allclose(scan.affine, np.diag([*np.nan_to_num(known, nan=1), 1]), rtol=1e-6)
    with pytest.raises(LoadError, match="pixdim"):
        load_scan(nifti(tmp_path/"a.nii", (0, 0), pixdim={1: math.inf}), allow=("unoriented",))


def test_a_slice_may_leave_out_how_thick_it_is(tmp_path):
    scan = load_scan(nifti(tmp_path/"a.nii", (1, 0), shape=(6, 20, 1),
                           dim={0: 3, 1: 6, 2: 20, 3: 1}, pixdim={3: 0}))
    np.testing.assert_allclose(scan.meta["spacing"][:2], (.8, 1.1), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(scan.affine)[:3, :2], AFFINE[:3, :2], atol=1e-5)


@pytest.mark.parametrize("name, pack", [("plain.nii.gz", bytes), ("gzip.nii", gzip.compress),
                                        ("GZIP.NII", gzip.compress), ("bzip2.nii.gz", bz2.compress),
                                        ("xz.nii", lzma.compress)])
def test_packing_is_judged_by_the_first_bytes(tmp_path, name, pack):
    (tmp_path/name).write_bytes(pack(nifti(tmp_path/"a.nii").read_bytes()))
    scan = load_scan(tmp_path/name)
    np.testing.assert_array_equal(scan[0], VOXELS); np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("head, said", [(b"PK\3\4" + bytes(600), "it is a ZIP archive"),
                                        (b"\x28\xb5\x2f\xfd" + bytes(600), "packed by Zstandard"),
                                        (b"", "the file is empty"),
    (b"<!DOCTYPE html>" + bytes(600), "it is a web page"), (b"NRRD0004\n", "it is a NRRD volume"),
    (bytes(348), "no NIfTI header"), (bytes(90), "its first 90 bytes are no NIfTI header")])
def test_another_kind_of_file_is_named(tmp_path, head, said):
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path/name).write_bytes(head)
        with pytest.raises(LoadError, match=said): load_scan(tmp_path/name)


def test_a_file_that_ends_early_is_incomplete(tmp_path):
    whole = nifti(tmp_path/"a.nii").read_bytes()
    for name, data in (("cut.nii", whole[:-9]), ("cut.nii.gz", gzip.compress(whole)[:-30]),
                       ("none.nii", whole[:352])):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(LoadError, match="incomplete"): load_scan(tmp_path/name)
