"""DICOM fields and pixels that are odd: the value a person would read, or a refusal that names the field.

`find_series` says the same of each."""
import io
import struct

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.tag import Tag
from pydicom.uid import (ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian,
                         JPEGBaseline8Bit, PositronEmissionTomographyImageStorage, RLELossless,
                         UltrasoundImageStorage)

from anomdx.loaders import LoadError, load_scan, read_series
from anomdx.series import find_series
from scans import block, dataset, image_header, write_series

NOWHERE = dict(ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None)   # no place
VOXELS = block(4, 9, 12)
BYTES = dict(BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0)


def raw(d, name, vr, value):
    "A field as these bytes under this type, whatever the dictionary says"
    d[Tag(name)] = RawDataElement(Tag(name), vr, len(value), value, 0, False, True)


def rewrite(path, *fields, without=(), **values):
    "Change fields of a file: (name, type, bytes), values by name, or none at all"
    d = pydicom.dcmread(path)
    for f in fields: raw(d, *f)
    for name, v in values.items(): setattr(d, name, v)
    for name in without: delattr(d, name)
    d.save_as(path)
    return path


def picture(folder, **fields):
    "One picture in a folder of its own, without fields that are None"
    own = dict(Rows=9, Columns=12, Modality="OT", PixelData=VOXELS[0].tobytes())
    d = image_header(**(own | NOWHERE | fields))
    for name, v in fields.items():
        if v is None: delattr(d, name)
    folder.mkdir(exist_ok=True)
    d.save_as(folder/"picture.dcm", enforce_file_format=True)
    return folder/"picture.dcm"


def both_refuse(folder, *words):
    "load_scan and find_series refuse with the same words"
    with pytest.raises(LoadError) as e: load_scan(folder)
    found = find_series(folder, progress=False)
    said = " ".join(f for s in found for f in s.findings)
    assert all(w in str(e.value) for w in words), str(e.value)
    told = found and all(s.findings for s in found) and all(w in said for w in words)
    assert told or found.others.get("damaged DICOM"), said
    assert "copy or download" not in str(e.value)


def both_read(path):
    "The scan, once find_series has promised the same of it"
    scan, (s,) = load_scan(path), find_series(path if path.is_dir() else path.parent, progress=False)
    assert s.findings == [] and s.shape == tuple(scan.shape[1:])
    np.testing.assert_allclose(s.spacing, scan.meta["spacing"], rtol=1e-6)
    return scan


# Numbers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vr, value", [("DS", b"0,750\\1,5 "), ("DS", b"0.750,1.5 "), ("LT", b"0.75\\1.50"),
    ("UT", b"0.75\\1.50 "), ("UN", b"0.750\\1.50\0"), ("OB", b"0.75\\1.5"),
    ("FD", struct.pack("<dd", .75, 1.5)), ("US", b"0.75\\1.5"), ("DS", b" 0.75 \\ 1.5")])
def test_spacing_that_is_plain(tmp_path, vr, value):
    write_series(tmp_path/"ct", VOXELS)
    for p in (tmp_path/"ct").iterdir(): rewrite(p, ("PixelSpacing", vr, value))
    scan = both_read(tmp_path/"ct")
    np.testing.assert_allclose(scan.meta["spacing"], (1.5, .75, 3), rtol=1e-6)
    np.testing.assert_allclose(np.abs(scan.affine.numpy()).sum(0)[:3], (1.5, .75, 3), rtol=1e-6)
    np.testing.assert_array_equal(scan[0].numpy().transpose(2, 1, 0), VOXELS)


@pytest.mark.parametrize("name, vr, value", [("PixelSpacing", "DS", b"0;75\\0;75 "),
    ("PixelSpacing", "DS", b"0.75"), ("PixelSpacing", "DS", b"nan\\1 "),
    ("PixelSpacing", "DS", b"-1\\-1 "), ("PixelSpacing", "OB", b"\1\2\3\4"),
    ("ImagePositionPatient", "DS", b"1\\2 "), ("ImageOrientationPatient", "DS", b"1\\0\\0\\0\\x\\0"),
    ("RescaleSlope", "DS", b"two "), ("RescaleIntercept", "DS", b"1\\2 "), ("RescaleSlope", "DS", b"0 "),
    ("NumberOfFrames", "IS", b"one "), ("BitsStored", "LO", b"many"), ("PixelRepresentation", "US", b"\2\0"),
    ("HighBit", "US", b"\3\0")])
def test_what_is_no_number_is_refused_by_name(tmp_path, name, vr, value):
    write_series(tmp_path/"ct", VOXELS)
    files = sorted((tmp_path/"ct").iterdir())
    rewrite(files[1], (name, vr, value))
    both_refuse(tmp_path/"ct", name, files[1].name)
    for p in files: rewrite(p, (name, vr, value))
    both_refuse(tmp_path/"ct", name)


@pytest.mark.parametrize("name, vr, value", [("PixelSpacing", "LT", b"0.75 by 0.75"),
    ("ImagerPixelSpacing", "DS", b"0/75"), ("PixelAspectRatio", "IS", b"two\\1 "),
    ("NominalScannedPixelSpacing", "DS", b"1 "), ("Rows", "CS", b"NINE"),
    ("SamplesPerPixel", "OW", b"\1\0")])
def test_a_picture_too(tmp_path, name, vr, value):
    path = picture(tmp_path/"one")
    rewrite(path, (name, vr, value))
    both_refuse(path.parent, name)
    with pytest.raises(LoadError, match=name): load_scan(path)


@pytest.mark.parametrize("value", [rb"0\0 ", rb"0\0.75", rb"0.0\0.0 "])
def test_a_pixel_of_no_size_in_a_known_place(tmp_path, value):
    write_series(tmp_path/"ct", VOXELS)
    files = sorted((tmp_path/"ct").iterdir())
    for p in files: rewrite(p, ("PixelSpacing", "DS", value))
    said = f"PixelSpacing (0028,0030) holds '{value.decode().strip()}'"
    both_refuse(tmp_path/"ct", said)
    with pytest.raises(LoadError) as e: read_series(files)
    assert said in str(e.value)
    for p in files: rewrite(p, without=("ImagePositionPatient",))
    assert np.isnan(load_scan(files[0]).meta["spacing"]).any()   # a picture without a place


def test_no_name_in_a_refusal(tmp_path):
    for value in (b"DOE^JANE", b"19430711", b"DOE\\JANE"):
        path = rewrite(picture(tmp_path/"one"), ("PixelSpacing", "DS", value))
        with pytest.raises(LoadError, match="holds a text of 8 characters, not 2 numbers"): load_scan(path)
    rewrite(path, ("PixelSpacing", "DS", rb"0;75\0;75 "))
    with pytest.raises(LoadError, match=r"PixelSpacing \(0028,0030\) holds '0;75\\0;75', not 2"):
        load_scan(path)


def test_what_a_volume_does_not_need_does_not_matter(tmp_path):
    write_series(tmp_path/"ct", VOXELS)
    odd = ("SliceThickness", "DS", b"thin"), ("ImagerPixelSpacing", "DS", b"x ")
    for p in (tmp_path/"ct").iterdir(): rewrite(p, *odd)
    np.testing.assert_allclose(both_read(tmp_path/"ct").meta["spacing"], (.75, 1.5, 3))
    with pytest.raises(LoadError, match="SliceThickness"): load_scan(p)   # one slice needs it


@pytest.mark.parametrize("name, vr, value", [("Rows", "IS", b"9 "), ("Columns", "UL", b"\x0c\0\0\0"),
    ("NumberOfFrames", "IS", b"1.0 "), ("BitsStored", "DS", b"16"),
    ("RescaleSlope", "LO", b"1,0 "), ("RescaleIntercept", "LT", b"-1024.")])
def test_whole_numbers_in_another_type(tmp_path, name, vr, value):
    write_series(tmp_path/"ct", VOXELS)
    for p in (tmp_path/"ct").iterdir(): rewrite(p, (name, vr, value))
    scan = both_read(tmp_path/"ct")
    np.testing.assert_array_equal(scan[0].numpy().transpose(2, 1, 0), VOXELS)
    assert scan.meta["unit"] == "HU"


# The size of a pixel ------------------------------------------------------------------------------------
def region(mm, row_mm=None, **fields):
    "A region whose pixels are `mm` wide and `row_mm` high"
    units = dict(PhysicalUnitsXDirection=3, PhysicalUnitsYDirection=3)
    return dataset(**(units | dict(PhysicalDeltaX=mm / 10, PhysicalDeltaY=(row_mm or mm) / 10) | fields))


def ultrasound(*regions):
    return dict(SOPClassUID=UltrasoundImageStorage, Modality="US", SequenceOfUltrasoundRegions=list(regions))


@pytest.mark.parametrize("fields, spacing", [
    (dict(), None), (dict(PixelSpacing=[0, 0]), None), (dict(PixelSpacing=[.3, .2]), (.3, .2)),
    (dict(ImagerPixelSpacing=[.3, .2]), (.3, .2)),
    (dict(ImagerPixelSpacing=[.3, .2], EstimatedRadiographicMagnificationFactor=1.25), (.24, .16)),
    (dict(PixelSpacing=[.3, .2], ImagerPixelSpacing=[.6, .4]), (.3, .2)),
    (dict(NominalScannedPixelSpacing=[.3, .2]), (.3, .2)), (dict(PixelAspectRatio=[2, 1]), None),
    (ultrasound(region(.1)), (.1, .1)), (ultrasound(region(.1, .2)), (.2, .1)),
    (ultrasound(region(.1), region(.1)), (.1, .1)), (ultrasound(region(.1), region(.2)), None),
    (ultrasound(region(.1), region(.5, RegionSpatialFormat=3)), (.1, .1)), (ultrasound(), None),
    (ultrasound(region(.1, PhysicalUnitsXDirection=4)), None), (ultrasound(region(0.)), None),
    (ultrasound(region(.1, RegionSpatialFormat=2)), None)])
def test_pixel_size_is_known_or_nan(tmp_path, fields, spacing):
    scan = both_read(picture(tmp_path/"one", **fields))
    np.testing.assert_allclose(scan.meta["spacing"], spacing or (np.nan, np.nan), rtol=1e-6)
    np.testing.assert_allclose(np.diag(scan.affine), (*(spacing or (1, 1)), 1, 1), rtol=1e-6)
    assert scan.meta["oriented"] is False
    assert scan.meta.get("aspect") == (2 if "PixelAspectRatio" in fields else None)
    assert ("? x ?" in repr(find_series(tmp_path/"one", progress=False))) == (spacing is None)


@pytest.mark.parametrize("thickness, kept", [(2.5, 2.5), (None, np.nan), (0, np.nan)])
def test_thickness_of_one_slice(tmp_path, thickness, kept):
    write_series(tmp_path/"one", VOXELS[:1], SliceThickness=thickness)
    scan = load_scan(next((tmp_path/"one").iterdir()))
    np.testing.assert_allclose(scan.meta["thickness"], kept)
    np.testing.assert_allclose(np.linalg.norm(scan.affine[:3, 2]), 1 if np.isnan(kept) else kept)
    assert scan.meta["spacing"] == (1.5, .75) and scan.meta["oriented"]


# Where the pixels lie -----------------------------------------------------------------------------------
def write_coded(path, d, meta, implicit, trailing=b""):
    "A file that claims the transfer syntax `meta` (None: bare) and is coded in another"
    fp = DicomBytesIO()
    fp.is_little_endian, fp.is_implicit_VR = True, implicit
    body = pydicom.Dataset()
    for e in d: body[e.tag] = e
    if trailing: body.add_new(0xfffcfffc, "OB", trailing)
    write_dataset(fp, body)
    head = b""
    if meta:
        d.file_meta.TransferSyntaxUID = meta
        out = io.BytesIO()
        pydicom.filewriter.write_file_meta_info(out, d.file_meta)
        head = bytes(128) + b"DICM" + out.getvalue()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + fp.getvalue())


@pytest.mark.parametrize("vr", ["OW", "OB", "UN"])
@pytest.mark.parametrize("trailing", [b"", bytes(64)])
@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("meta", [None, ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_the_claimed_encoding_does_not_matter(tmp_path, meta, implicit, trailing, vr):
    write_series(tmp_path/"ct", VOXELS)
    for p in sorted((tmp_path/"ct").iterdir()):
        d = pydicom.dcmread(p)
        d["PixelData"].VR = vr
        write_coded(tmp_path/"odd"/p.stem, d, meta, implicit, trailing)
    np.testing.assert_array_equal(both_read(tmp_path/"odd")[0].numpy().transpose(2, 1, 0), VOXELS)


def test_big_endian(tmp_path):
    d = image_header(Rows=9, Columns=12, PixelData=VOXELS[0].astype(">i2").tobytes(), **NOWHERE)
    d.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    d.save_as(tmp_path/"big.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(load_scan(tmp_path/"big.dcm")[0], VOXELS[0].astype(np.float32) - 1024)


@pytest.mark.parametrize("extra, good", [(b"\0", True), (bytes(24), True), (b"\0\1", False),
    (bytes(9 * 12 * 2), False), (bytes(range(40)), False)])
def test_what_follows_the_pixels(tmp_path, extra, good):
    data = VOXELS[0].tobytes()
    path = picture(tmp_path/"one", PixelData=data + extra + b"\0" * (len(extra) % 2))
    if good: np.testing.assert_array_equal(both_read(path)[0], VOXELS[0].astype(np.float32) - 1024)
    else: both_refuse(path.parent, "PixelData (7FE0,0010) has", "9 x 12 pixels")


def test_odd_number_of_bytes(tmp_path):
    x = np.arange(99, dtype=np.uint8).reshape(9, 11)
    path = picture(tmp_path/"one", Columns=11, **BYTES, PixelData=x.tobytes() + b"\0")
    np.testing.assert_array_equal(both_read(path)[0], x.astype(np.float32) - 1024)


@pytest.mark.parametrize("fields", [dict(Columns=13), dict(Rows=10), dict(Rows=4), BYTES,
    dict(SamplesPerPixel=3, PlanarConfiguration=0)])
def test_a_size_that_contradicts_the_pixels(tmp_path, fields):
    both_refuse(picture(tmp_path/"one", **fields).parent, "PixelData")


def test_compressed_or_not(tmp_path):
    path = picture(tmp_path/"one")
    b = path.read_bytes()
    old, new = ExplicitVRLittleEndian.encode() + b"\0", JPEGBaseline8Bit.encode()
    head = b.replace(struct.pack("<H", len(old)) + old, struct.pack("<H", len(new)) + new)
    size, = struct.unpack("<I", head[140:144])
    path.write_bytes(head[:140] + struct.pack("<I", size + len(new) - len(old)) + head[144:])
    both_refuse(path.parent, "JPEG Baseline", "is not compressed")
    write_series(tmp_path/"rle", VOXELS[:1])
    p = next((tmp_path/"rle").iterdir())
    d = pydicom.dcmread(p)
    d.compress(RLELossless)
    d.save_as(p)
    b = p.read_bytes()
    assert b.count(RLELossless.encode()) == 1
    name = ExplicitVRLittleEndian.encode()
    p.write_bytes(b.replace(RLELossless.encode(), name.ljust(len(RLELossless), b"\0")))
    with pytest.raises(LoadError, match="Explicit VR Little Endian, but PixelData .* is compressed"):
        load_scan(p)


# Fields that are missing --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["SamplesPerPixel", "PhotometricInterpretation",
                                  "BitsAllocated", "BitsStored",
    "PixelRepresentation", "PixelData", "Rows", "Columns"])
def test_a_missing_field_is_named(tmp_path, name):
    write_series(tmp_path/"ct", VOXELS)
    files = sorted((tmp_path/"ct").iterdir())
    rewrite(files[2], without=[name])
    both_refuse(tmp_path/"ct", f"it has no {name}")
    with pytest.raises(LoadError, match=name): load_scan(files[2])


def test_high_bit_is_one_less_than_the_bits_stored(tmp_path):
    x = VOXELS[0] & 0xfff
    path = picture(tmp_path/"one", BitsStored=12, HighBit=None, PixelRepresentation=0, PixelData=x.tobytes())
    np.testing.assert_array_equal(both_read(path)[0], x.astype(np.float32) - 1024)


# What values mean ---------------------------------------------------------------------------------------
PET = dict(SOPClassUID=PositronEmissionTomographyImageStorage, Modality="PT", RescaleSlope=.5,
           RescaleIntercept=0)
WORLD = [dataset(RealWorldValueSlope=1., RealWorldValueIntercept=0.)]


@pytest.mark.parametrize("fields, slope, intercept, dark, unit", [
    (dict(Modality="CT"), 1, -1024, False, "HU"), (dict(Modality="CT", RescaleType="HU"), 1,
    -1024, False, "HU"),
    (PET | dict(Units="BQML"), .5, 0, False, "BQML"), (PET | dict(Units="GML"), .5, 0, False, "GML"),
    (PET | dict(Units="DOE"), .5, 0, False, "a.u."), (PET, .5, 0, False, "a.u."),
    (dict(Modality="MR", RescaleType="US"), 1, -1024, True, "a.u."),
    (dict(Modality="OT", RescaleType="OD"), 1, -1024, False, "a.u."),
    (dict(Modality="MR", RealWorldValueMappingSequence=WORLD), 1, -1024, False, "a.u."),
    *((dict(Modality=m, RescaleType="US"), 1, -1024, True, "a.u.") for m in ("DX", "CR", "MG",
    "RG", "XA", "OT")),
    (dict(Modality="CT", RescaleSlope=None, RescaleIntercept=None), 1, 0, True, "a.u.")])
def test_polarity_is_display(tmp_path, fields, slope, intercept, dark, unit):
    x = np.abs(VOXELS[0]) & 0xfff
    kind = dict(PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11, PixelRepresentation=0,
                PixelData=x.astype("<u2").tobytes())
    scan = load_scan(picture(tmp_path/"one", **(kind | fields)))
    np.testing.assert_allclose(scan[0], ((4095 - x) if dark else x) * slope + float(intercept), rtol=1e-6)
    assert scan.meta["unit"] == unit
    plain = load_scan(picture(tmp_path/"two",
                              **(kind | fields | dict(PhotometricInterpretation="MONOCHROME2"))))
    np.testing.assert_allclose(plain[0], x * slope + float(intercept), rtol=1e-6)


@pytest.mark.parametrize("modality, dark", [("CT", False), ("DX", True)])
def test_modality_lut_takes_stored_values(tmp_path, modality, dark):
    table = (np.arange(256, dtype="<u2") ** 2 // 20).astype("<u2")
    x = np.arange(108, dtype=np.uint8).reshape(9, 12)
    lut = dataset(LUTDescriptor=[256, 0, 16], LUTData=table.tobytes(), ModalityLUTType="US")
    lut["LUTData"].VR = "OW"
    lut["LUTDescriptor"].VR = "US"
    path = picture(tmp_path/"one", Modality=modality, PhotometricInterpretation="MONOCHROME1", **BYTES,
                   RescaleSlope=None,
                   RescaleIntercept=None, ModalityLUTSequence=[lut], PixelData=x.tobytes())
    np.testing.assert_array_equal(load_scan(path)[0], 65535. - table[x] if dark else table[x])


def test_a_comma_that_may_stand_for_thousands_is_refused(tmp_path):
    "-1,024 HU may be -1024 or -1.024"
    file = rewrite(picture(tmp_path/"a"), ("RescaleIntercept", "DS", b"-1,024"),
                   ("RescaleSlope", "DS", b"1 "))
    with pytest.raises(LoadError, match="RescaleIntercept.*-1,024"): load_scan(file)
    assert "-1,024" in find_series(tmp_path/"a")[0].findings[0]


def test_a_modality_of_several_values(tmp_path):
    "It is no modality of the standard, and no reason to stop a whole tree"
    file = rewrite(picture(tmp_path/"a"), Modality=["MR", "CT"])
    assert load_scan(file).meta["modality"] == "" == find_series(tmp_path/"a")[0].modality
