"""Damaged, lying and malicious scan files: each must load or raise LoadError, within 5 s and 1 GB.

    python tests/fuzz_loaders.py --n 20000 --seed 0

Seeds are small valid files of every format that is read; a case is a seed and a few mutations, both drawn from (seed, number), so that
`--only 123` makes case 123 again. Exit status 1 when a case raised anything else, crashed its process, was slow or took much memory;
such cases are kept in --keep."""
import argparse
import gzip
import importlib.util
import io
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image, PngImagePlugin

sys.path.insert(0, str(Path(__file__).parent))
from scans import (block, dataset, image_header, write_enhanced, write_mosaic, write_series,
                   write_tomogram, write_vframe)

SECONDS, BYTES = 5., 1 << 30
BOMB = 2 << 30   # what a bomb unpacks to


# Seeds: small valid files ------------------------------------------------------------------------------------------------------
def write_dicom(folder):
    v = block(4, 16, 20)
    syntaxes = ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian", "RLELossless", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"]
    for syntax in [None, *syntaxes]:
        try: write_series(folder/f"series_{syntax or 'plain'}", v, nod=.2, syntax=syntax)
        except ImportError: continue   # no GDCM to compress with
    for p in sorted(folder.glob("series_*")): shutil.copy(next(p.iterdir()), folder/f"one_{p.name[7:]}.dcm")
    write_enhanced(folder/"enhanced.dcm", v, order=[2, 0, 3, 1])
    for write in (write_mosaic, write_vframe, write_tomogram): write(folder/f"{write.__name__}.dcm", v)
    frames = image_header(Rows=16, Columns=20, NumberOfFrames=4, Modality="US", PixelData=v.tobytes())
    frames.save_as(folder/"frames.dcm", enforce_file_format=True)
    table = np.arange(256, dtype="<u2") * 257
    palette = image_header(Rows=16, Columns=20, PhotometricInterpretation="PALETTE COLOR", BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0,
                           PixelData=v[0].astype(np.uint8).tobytes(), **{f"{c}PaletteColorLookupTableData": table.tobytes() for c in ("Red", "Green", "Blue")},
                           **{f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")})
    palette.save_as(folder/"palette.dcm", enforce_file_format=True)
    colour = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    kind = dict(Rows=16, Columns=20, SamplesPerPixel=3, PlanarConfiguration=0, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, Modality="US")
    for name in ("RGB", "YBR_FULL"): image_header(**kind, PhotometricInterpretation=name, PixelData=colour.tobytes()).save_as(folder/f"{name}.dcm", enforce_file_format=True)
    floats = image_header(Rows=16, Columns=20, BitsAllocated=32, BitsStored=32, HighBit=31, FloatPixelData=v[0].astype("<f4").tobytes())
    floats.save_as(folder/"floats.dcm", enforce_file_format=True)


def write_nifti(folder):
    turned = nib.affines.from_matvec(nib.eulerangles.euler2mat(.2, -.1, .3) @ np.diag([-.8, 1.1, 2.5]), [40, -60, 12])
    for i, (kind, dtype, shape) in enumerate([(nib.Nifti1Image, np.int16, (9, 8, 7)), (nib.Nifti1Image, np.float32, (9, 8, 7, 2)), (nib.Nifti2Image, np.uint8, (9, 8, 7)),
                                              (nib.Nifti1Image, np.float64, (9, 8))]):
        x = (np.random.default_rng(i).random(shape) * 200).astype(dtype)
        img = kind(x, turned); img.set_qform(turned, 1); img.set_sform(turned, 1)
        if i == 0: img.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"words " * 9))
        for suffix in (".nii", ".nii.gz"): nib.save(img, folder/f"n{i}{suffix}")


def write_nrrd(folder):
    header = b"NRRD0005\n# made\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 9 8 7\nspace directions: (0.8,0,0) (0,1.1,0.1) (0,-0.2,2.5)\n" \
             b"kinds: domain domain domain\nendian: little\nencoding: %s\nspace origin: (4,5,6)\nkey:=value\n%s\n"
    raw = block(7, 8, 9).tobytes()
    (folder/"raw.nrrd").write_bytes(header % (b"raw", b"") + raw)
    (folder/"gzip.nrrd").write_bytes(header % (b"gzip", b"") + gzip.compress(raw, mtime=0))
    (folder/"ascii.nrrd").write_bytes(header % (b"ascii", b"") + b" ".join(b"%d" % v for v in np.frombuffer(raw, np.int16)))
    (folder/"split.nhdr").write_bytes(header % (b"raw", b"data file: split.raw\n")); (folder/"split.raw").write_bytes(raw)


def write_pictures(folder):
    dice = np.random.default_rng(0)
    grey, colour, deep = dice.integers(0, 256, (24, 20), np.uint8), dice.integers(0, 256, (24, 20, 3), np.uint8), dice.integers(0, 65536, (24, 20), np.uint16)
    for name, x in dict(grey=grey, colour=colour, deep=deep).items():
        text = PngImagePlugin.PngInfo(); text.add_text("Comment", "words", zip=True); text.add_itxt("Title", "words")
        Image.fromarray(x).save(folder/f"{name}.png", pnginfo=text)
        for packing in ("raw", "tiff_lzw", "tiff_deflate", "packbits"): Image.fromarray(x).save(folder/f"{name}_{packing}.tif", compression=packing)
    Image.fromarray(grey).convert("P").save(folder/"palette.png")
    Image.fromarray(grey).save(folder/"grey.jpg", exif=Image.Exif()); Image.fromarray(colour).save(folder/"colour.jpg", progressive=True)
    Image.fromarray(grey.astype(np.float32)).save(folder/"float.tiff")


def write_npz(folder):
    x = np.random.default_rng(0).integers(0, 256, (5, 12, 10), np.uint8)
    np.savez(folder/"stored.npz", images=x, colour=np.stack([x, x, 255 - x], -1))
    np.savez_compressed(folder/"packed.npz", images=x, floats=x.astype(np.float32))


def write_oct(folder):
    "B-scans in every container whose library is installed"
    eye = np.random.default_rng(0).random((3, 24, 16)).astype(np.float32); grey = (eye * 255).astype(np.uint8)
    d = image_header(pydicom.uid.OphthalmicTomographyImageStorage, Modality="OPT", NumberOfFrames=3, Rows=24, Columns=16, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0,
                     PixelData=grey.tobytes(), SharedFunctionalGroupsSequence=[dataset(PixelMeasuresSequence=[dataset(PixelSpacing=[.004, .012], SliceThickness=.1, SpacingBetweenSlices=.2)])])
    d.save_as(folder/"opt.dcm", enforce_file_format=True)
    pages = [Image.fromarray(x) for x in grey]
    pages[0].save(folder/"stack.tif", save_all=True, append_images=pages[1:]); (folder/"bscans").mkdir()
    for i, page in enumerate(pages): page.save(folder/"bscans"/f"{i}.png")
    if importlib.util.find_spec("oct_converter"): write_topcon(folder/"eye.fda", grey); write_topcon(folder/"eye.fds", grey, raw=True); write_bioptigen(folder/"eye.oct", grey)
    if importlib.util.find_spec("eyepy"): write_vol(folder/"eye.vol", eye); write_e2e(folder/"eye.e2e", eye)


def write_topcon(path, x, raw=False):
    n, h, w = x.shape
    pictures = []
    for b in x: Image.fromarray(b).save(f := io.BytesIO(), "JPEG2000"); pictures.append(f.getvalue())
    image = struct.pack("<BIIIIBI", 2, w, h, 16, n, 0, 2 * x.size) + x.astype("<u2").tobytes() if raw else \
        struct.pack("<B6I", 2, 0, 0, w, h, n, 0) + b"".join(struct.pack("<I", len(p)) + p for p in pictures)
    chunks = {"@IMG_SCAN_03" if raw else "@IMG_JPEG": image, "@PARAM_SCAN_04": struct.pack("<III5dBB", 0, 0, 0, 6, 1.4, 2.6, 0, 0, 0, 0),
              "@PATIENT_INFO_02": bytes(1005), "@CAPTURE_INFO_02": struct.pack("<BBI100s6H", 1, 2, 0, b"", 2020, 1, 2, 3, 4, 5)}
    path.write_bytes(b"FOCTFDA" + struct.pack("<II", 2, 1) + b"".join(struct.pack("<B", len(k)) + k.encode() + struct.pack("<I", len(v)) + v for k, v in chunks.items()) + bytes(1))


def write_bioptigen(path, x):
    field = lambda key, value: struct.pack("<I", len(key)) + key.encode() + struct.pack("<I", len(value)) + value
    number, real, (n, h, w) = (lambda key, v: field(key, struct.pack("<I", v))), (lambda key, v: field(key, struct.pack("<d", v))), x.shape
    reals = dict(SCANDEPTH=2, SCANLENGTH=6, AZSCANLENGTH=6, ELSCANLENGTH=1.4, OBJECTDISTANCE=0, SCANANGLE=0)
    head = struct.pack("<IHI", 0x54434F42, 1, 11) + b"FRAMEHEADER" + bytes(4) + number("FRAMECOUNT", n) + number("LINECOUNT", w) + number("LINELENGTH", h) + number("SAMPLEFORMAT", 2) \
        + field("DESCRIPTION", b"eye") + real("XMIN", 0) + real("XMAX", 6) + field("XCAPTION", b"") + real("YMIN", 0) + real("YMAX", 1) + field("YCAPTION", b"") + number("SCANTYPE", 1) \
        + b"".join(real(k, v) for k, v in reals.items()) + number("SCANS", 1) + number("FRAMES", n) + number("DOPPLERFLAG", 0) + field("CONFIG", b"") + bytes(4)
    frame = lambda b: field("FRAMEDATA", b"") + field("FRAMEDATETIME", struct.pack("<8H", 2020, 1, 1, 2, 3, 4, 5, 6)) + real("FRAMETIMESTAMP", 0) + number("FRAMELINES", w) \
        + struct.pack("<I", 12) + b"FRAMESAMPLES" + struct.pack("<I", b.nbytes) + b.T.tobytes() + bytes(4)
    path.write_bytes(head + b"".join(frame(b) for b in x.astype("<u2")))


def write_vol(path, x):
    import construct
    from eyepy.io.he.vol_reader import vol_format
    own, date, (n, h, w) = dict(exam_time=construct.Int64ul, patient_id=construct.Bytes(24)), "1950-01-02T00:00:00", x.shape   # eyepy cannot build a time
    bscans = [dict(version="HSF-OCT-103", bscan_hdr_size=256, start_x=0, start_y=i / 5, end_x=.2, end_y=i / 5, num_seg=0, quality=30, shift=0, iv_transformation=[0] * 6,
                   layer_segmentations=np.zeros((0, w), np.float32), data=b) for i, b in enumerate(x)]
    path.write_bytes(construct.Struct(*[f.name / own[f.name] if f.name in own else f for f in vol_format.subcons]).build(dict(
        version="HSF-OCT-103", size_x=w, n_bscans=n, size_y=h, scale_x=.012, distance=.2, scale_y=.004, size_x_slo=8, size_y_slo=8, scale_x_slo=.01, scale_y_slo=.01, scan_position="OS",
        exam_time=0, scan_pattern=3, bscan_hdr_size=256, id="1", reference_id="1", patient_id=bytes(24), dob=date, visit_date=date, grid_type=0, grid_offset=0, grid_type1=0, grid_offset1=0,
        prog_id="1", localizer=np.zeros((8, 8), np.uint8), bscans=bscans)))


def write_e2e(path, x):
    from eyepy.io.he import e2e_format as e2e
    items = [(9, 1, -1, -1, -1, 0, bytes(131)), (11, 1, 1, 0, -1, 0, bytes(14) + b"R" + bytes(12))]
    storable = np.sort(np.unique(e2e.Bscan.LUT[e2e.Bscan.LUT < 1]))
    for i, b in enumerate(storable[np.searchsorted(storable, x).clip(0, len(storable) - 1)]):
        place = [0., i / 2, 9., i / 2]
        items += [(10004, 1, 1, 0, 2 * i, 0, struct.pack("<3I4fI3fI2fI4I2fIQI2f", 0, *b.shape, *place, 0, 0, .004, 0, 0, 0, 0, 0, b.shape[1], len(x), i, 3, 0, 0, 0, 0, 1, .8, 0) + bytes(44)),
                  (1073741824, 1, 1, 0, 2 * i, 1, e2e.type1073741824_format.build(e2e.Type1073741824(size=b.size * 2, type=35652097, n_values=b.size, height=b.shape[0], width=b.shape[1], data=b)))]
    head = lambda name, n, current, prev: struct.pack("<12sI20x4I", name, n and 100, n, current, prev, 0)
    folders, bodies, start = b"", b"", 88 + 52 + 44 * len(items)
    for kind, patient, study, series, number, ind, body in items:
        ids = struct.pack("<4iHHII", patient, study, series, number, ind, 0, kind, 0)
        folders += struct.pack("<4I", 88, start + len(bodies), len(body), 0) + ids
        bodies += struct.pack("<12s5I", b"MDbData", 0, 88, start + len(bodies), len(body), 0) + ids + body
    path.write_bytes(struct.pack("<12sI20x", b"CMDb", 100) + head(b"MDbMDir", 1, 88, 88) + head(b"MDbDir", len(items), 88, 0) + folders + bodies)


def write_slides(folder):
    "A pyramid of two levels, tiled: plain, deflated and JPEG, in colour and grey"
    if importlib.util.find_spec("tifffile") is None or not {"openslide", "tiffslide"} & {m for m in ("openslide", "tiffslide") if importlib.util.find_spec(m)}: return
    import tifffile
    x = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    for name, packing in dict(plain=None, deflated="zlib", jpeg="jpeg").items():
        try:
            with tifffile.TiffWriter(folder/f"{name}.tif") as f:
                for i, y in enumerate((x, x[::2, ::2])):
                    f.write(y, tile=(16, 16), photometric="rgb", compression=packing, subfiletype=i, resolution=(2e4 / 2 ** i,) * 2, resolutionunit="CENTIMETER", metadata=None)
        except (ImportError, KeyError, ValueError): (folder/f"{name}.tif").unlink()   # JPEG needs imagecodecs


FORMATS = dict(dicom=write_dicom, nifti=write_nifti, nrrd=write_nrrd, picture=write_pictures, npz=write_npz, oct=write_oct, slide=write_slides)
PARTS = dict(npz=["images/0", "images/3", "colour/1", "floats/2"], slide=["0.5/0/0/32", "1/16/8/32", "0.7/-4/60/16"])   # what is asked of a file, after '#'


def seeds(folder):
    "Format -> its seed files and series folders"
    for name, write in FORMATS.items(): (folder/name).mkdir(parents=True); write(folder/name)
    found = {name: sorted(p for p in (folder/name).iterdir() if p.suffix != ".raw") for name in FORMATS}   # .raw: the voxels of split.nhdr
    return {name: files for name, files in found.items() if files}


# Mutations of any file ---------------------------------------------------------------------------------------------------------
def truncate(b, dice, others): return b[:dice.integers(0, len(b) + 1)]
def extend(b, dice, others): return b + dice.bytes(int(dice.integers(1, 300)))
def drop_run(b, dice, others): i, n = place(b, dice), int(dice.integers(1, 64)); return b[:i] + b[i + n:]
def repeat_run(b, dice, others): i, n = place(b, dice), int(dice.integers(1, 64)); return b[:i + n] + b[i:i + n] * int(dice.integers(1, 9)) + b[i + n:]
def noise_run(b, dice, others): i, n = place(b, dice), int(dice.integers(1, 64)); return b[:i] + dice.bytes(n) + b[i + n:]
def zero_run(b, dice, others): i, n = place(b, dice), int(dice.integers(1, 64)); return b[:i] + bytes([dice.choice([0, 255])]) * n + b[i + n:]
def splice(b, dice, others): o = others[dice.integers(len(others))]; return b[:place(b, dice)] + o[place(o, dice):]
def swap_runs(b, dice, others): i, j = sorted([place(b, dice), place(b, dice)]); n = int(dice.integers(1, 16)); return b[:i] + b[j:j + n] + b[i + n:j] + b[i:i + n] + b[j + n:]


def place(b, dice):
    "Anywhere, or in the header, where it hurts more"
    return int(dice.integers(0, min(len(b), 400) if dice.random() < .5 else len(b), endpoint=True))


def flip_bits(b, dice, others):
    x = bytearray(b)
    for _ in range(int(dice.integers(1, 9))):
        if x: x[min(place(b, dice), len(x) - 1)] ^= 1 << int(dice.integers(8))
    return bytes(x)


EXTREME = [0, 1, -1, 2, 3, 4, 7, 127, 128, 255, 256, 32767, -32768, 65535, 65536, 2**24, 2**31 - 1, -2**31, 2**32 - 1, 2**40, 2**63 - 1, -2**63]


def lying_number(b, dice, others):
    "A size, count or offset, of any width and byte order, becomes an extreme one"
    code = str(dice.choice(["<h", "<i", "<q", ">h", ">i", ">q", "<f", "<d"])); n = struct.calcsize(code)
    if len(b) < n: return b
    i = min(place(b, dice), len(b) - n)
    v = float(dice.choice([0, -1, np.nan, np.inf, 1e30, 1e-30])) if code[1] in "fd" else int.from_bytes((EXTREME[dice.integers(len(EXTREME))]).to_bytes(9, "little", signed=True)[:n], "little", signed=True)
    return b[:i] + struct.pack(code, v) + b[i + n:]


BYTEWISE = [truncate, extend, drop_run, repeat_run, noise_run, zero_run, splice, swap_runs, flip_bits, flip_bits, lying_number, lying_number]


# Mutations that know the format ------------------------------------------------------------------------------------------------
HOSTILE = ["", "0", "-1", "1", "nan", "inf", "-inf", "1e308", "1e-308", "99999999999999999999", "1\\2", "0\\0", "0\\0\\0\\0\\0\\0", "1\\0\\0\\1\\0\\0", "nan\\nan", "1e200\\1e200\\1e200",
           "\\", "x", "ä\x00", "A" * 5000, "1" * 400, "YES", "CT", "MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL_422", "1.2.840.10008.1.2.5"]
AIMED = ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation", "NumberOfFrames",
         "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "SeriesInstanceUID",
         "SOPClassUID", "Modality", "PatientID", "SpecificCharacterSet", "PixelPaddingValue", "RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
         "ModalityLUTSequence", "BurnedInAnnotation", "ExtendedOffsetTable", "ImageType", "SliceVector",
         "TimeSlotVector", "NumberOfSlices", "DetectorInformationSequence"]


def lie_dicom(b, dice, others):
    "A field that is read takes a hostile value, vanishes, or changes its type; the rest stays well formed"
    from pydicom import config
    config.settings.writing_validation_mode = config.settings.reading_validation_mode = config.IGNORE
    d = pydicom.dcmread(io.BytesIO(b), force=True)
    groups = [d, d.file_meta, *(i for e in d if e.VR == "SQ" for i in e.value), *(i for e in d if e.VR == "SQ" for j in e.value for f in j if f.VR == "SQ" for i in f.value)]
    for _ in range(int(dice.integers(1, 4))):
        where = groups[int(dice.integers(len(groups)))] if dice.random() < .3 else d
        tags = [e.tag for e in where] if where is not d or dice.random() < .3 else [pydicom.tag.Tag(AIMED[dice.integers(len(AIMED))])]
        if not tags: continue
        tag = tags[int(dice.integers(len(tags)))]
        vr = where[tag].VR if tag in where else pydicom.datadict.dictionary_VR(tag).split(" or ")[0]
        if dice.random() < .15: where.pop(tag, None); continue
        if vr in ("US", "SS", "UL", "SL", "FD", "FL"):
            code = dict(US="<H", SS="<h", UL="<I", SL="<i", FD="<d", FL="<f")[vr]
            numbers = [float(v) for v in (0, -1, np.nan, np.inf, 1e308)] if vr in ("FD", "FL") else [v & (2 ** (8 * struct.calcsize(code)) - 1) for v in EXTREME]
            value = b"".join(value_bytes(code, numbers[dice.integers(len(numbers))]) for _ in range(int(dice.choice([0, 1, 1, 1, 1, 2, 3]))))
        elif vr == "SQ": value = None
        elif vr in ("OB", "OW", "UN"): value = dice.bytes(int(dice.integers(0, 64)))
        else: value = HOSTILE[dice.integers(len(HOSTILE))].encode("utf-8")
        if value is None: where[tag] = pydicom.DataElement(tag, "SQ", pydicom.Sequence([]))
        else: where[tag] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(tag), vr, len(value), value, 0, False, True)
    out = io.BytesIO(); d.save_as(out)
    return out.getvalue()


def value_bytes(code, v):
    try: return struct.pack(code, v)
    except (struct.error, OverflowError): return struct.pack(code.lower(), -1)


def lie_nifti(b, dice, others):
    "A field of the header takes another value; of a .nii.gz, inside the compression"
    packed = b[:2] == b"\x1f\x8b"
    x = bytearray(gzip.decompress(b) if packed else b)
    template = nib.nifti1.header_dtype if struct.unpack("<i", x[:4])[0] == 348 else nib.nifti2.header_dtype
    h = np.frombuffer(bytes(x[:template.itemsize]), template).copy().reshape(())
    for _ in range(int(dice.integers(1, 4))):
        name = str(dice.choice(["dim", "dim", "dim", "pixdim", "pixdim", "datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter", "qform_code", "sform_code", "quatern_b", "quatern_d",
                                "qoffset_x", "srow_x", "srow_z", "magic", "xyzt_units", "sizeof_hdr", "intent_code"]))
        field = h[name]
        if field.dtype.kind == "S": h[name] = dice.choice([b"ni1", b"n+1", b"n+2", b"xxx", b""]); continue
        v = np.array(EXTREME if field.dtype.kind in "iu" else [0, -1, np.nan, np.inf, -np.inf, 1e30, 1e-30, 3, 352, 1e9])
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = v[dice.integers(len(v))].astype(field.dtype)
        if field.ndim: field[int(dice.integers(field.size))] = value
        else: h[name] = value
    x[:template.itemsize] = h.tobytes()
    return gzip.compress(bytes(x), mtime=0) if packed else bytes(x)


def lie_nrrd(b, dice, others):
    "A line of the header is changed, doubled or lost"
    head, sep, data = b.partition(b"\n\n")
    lines = head.split(b"\n")
    for _ in range(int(dice.integers(1, 4))):
        i, n = int(dice.integers(len(lines))), str(EXTREME[dice.integers(len(EXTREME))]).encode()
        change = dice.integers(6)
        if change == 0: del lines[i]
        elif change == 1: lines.insert(i, lines[int(dice.integers(len(lines)))])
        elif change == 2: lines[i] = re.sub(rb"-?[\d.]+", n, lines[i], count=int(dice.integers(3)))
        elif change == 3: lines[i] = re.sub(rb"(: ?).*", rb"\g<1>" + bytes(dice.choice([b"", b"nan", b"none", b"(nan,0,0)", b"gzip", b"bzip2", b"raw", b"hex", b"double", b"block", b"/dev/zero", b"../../etc/passwd", b"LIST", b"%d 0 9 1", b"9" * 40])), lines[i])
        elif change == 4: lines[i] = lines[i].swapcase()
        else: lines.append(bytes(dice.choice([b"data file: /dev/zero", b"data file: /dev/stdin", b"byte skip: -1", b"byte skip: 99999999999", b"line skip: 9999999", b"block size: 9", b"space: scanner-xyz", b"space dimension: 4", b"sizes: 99999 99999 99999", b"units: \"\xff\""])))
        if not lines: lines = [b"NRRD0004"]
    return b"\n".join(lines) + sep + data


def lie_picture(b, dice, others):
    "The size in a PNG header with its checksum put right, or a value in a TIFF directory"
    if b[:4] == b"\x89PNG":
        chunks, i = [], 8
        while i + 12 <= len(b): n, = struct.unpack(">I", b[i:i + 4]); chunks.append([b[i + 4:i + 8], b[i + 8:i + 8 + n]]); i += 12 + n
        k = 0 if dice.random() < .6 else int(dice.integers(len(chunks)))
        c = bytearray(chunks[k][1])
        if k == 0: c[:8] = struct.pack(">II", *dice.choice([0, 1, 20, 24, 5000, 12000, 70000, 2**31 - 1, 2**32 - 1], 2)) if dice.random() < .7 else c[:8]; c[8:13] = bytes(dice.choice([0, 1, 2, 3, 4, 6, 8, 16], 5)) if dice.random() < .5 else c[8:13]
        elif c: c[int(dice.integers(len(c)))] ^= 255
        chunks[k][1] = bytes(c)
        if dice.random() < .2: chunks.insert(int(dice.integers(1, len(chunks))), chunks[int(dice.integers(len(chunks)))])
        return b[:8] + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    if b[:2] == b"II" and len(b) > 16:
        x, at = bytearray(b), struct.unpack("<I", b[4:8])[0]
        if at + 2 > len(b): return b
        n, = struct.unpack("<H", b[at:at + 2])
        for _ in range(int(dice.integers(1, 4))):
            e = at + 2 + 12 * int(dice.integers(max(n, 1)))
            if e + 12 > len(x): break
            part = dice.integers(4)
            if part == 0: x[e + 8:e + 12] = struct.pack("<I", EXTREME[dice.integers(len(EXTREME))] & 0xffffffff)
            elif part == 1: x[e + 4:e + 8] = struct.pack("<I", EXTREME[dice.integers(len(EXTREME))] & 0xffffffff)
            elif part == 2: x[e + 2:e + 4] = struct.pack("<H", int(dice.integers(0, 20)))
            else: x[e:e + 2] = struct.pack("<H", int(dice.choice([256, 257, 258, 259, 262, 273, 277, 278, 279, 317, 320, 322, 323, 324, 330, 339, 347])))
        return bytes(x)
    return lying_number(b, dice, others)


def lie_npz(b, dice, others):
    "An array's header lies about shape or type, in an archive that is well formed; or the archive's own directory lies"
    if dice.random() < .3:
        x = bytearray(b); at = b.find(b"PK\x01\x02", int(dice.integers(len(b)))); at = at if at >= 0 else b.find(b"PK\x05\x06")
        if at >= 0: i = at + int(dice.integers(4, 44)); x[i:i + 4] = struct.pack("<I", EXTREME[dice.integers(len(EXTREME))] & 0xffffffff)
        return bytes(x)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(b)) as z, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as w:
        for name in z.namelist():
            d = z.read(name)
            n, = struct.unpack("<H", d[8:10]); head = d[10:10 + n]
            old, new = [(rb"\(5, 12, 10", b"(%d, 12, 10" % EXTREME[dice.integers(len(EXTREME))]), (rb"\(5, 12, 10", b"(5, 99999, 99999"), (rb"'[|<][uf]\d'", bytes(dice.choice([b"'|O'", b"'<f8'", b"'<c16'", b"'<U4'", b"'<M8[s]'", b"[('a', '<f4')]", b"'|b1'", b"'<f2'"]))),
                        (rb"False", b"True"), (rb"\(5", b"((((((5"), (rb"'shape'", b"'shap'"), (rb"\(5, 12, 10", b"(600,")][dice.integers(7)]
            head = re.sub(old, new, head).rstrip() + b"\n"
            w.writestr(name, d[:8] + struct.pack("<H", len(head)) + head + d[10 + n:])
    return out.getvalue()


def lie_oct(b, dice, others): return lie_dicom(b, dice, others) if b[128:132] == b"DICM" else lie_picture(b, dice, others)


LIES = dict(dicom=lie_dicom, nifti=lie_nifti, nrrd=lie_nrrd, picture=lie_picture, npz=lie_npz, oct=lie_oct, slide=lie_picture)


# Bombs: a few kilobytes or megabytes that unpack to gigabytes ------------------------------------------------------------------
def deflated(size, wbits=-15, head=b""):
    "`head` and then `size` zeros, deflated; made of one compressed block, repeated"
    block, z = bytes(1 << 24), zlib.compressobj(9, zlib.DEFLATED, -15)
    start = z.compress(head) + z.flush(zlib.Z_FULL_FLUSH)
    one = z.compress(block) + z.flush(zlib.Z_FULL_FLUSH)
    body = start + one * (size >> 24) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    if wbits == -15: return body
    check = zlib.adler32(head)
    for _ in range(size >> 24): check = zlib.adler32(block, check)
    return b"\x78\xda" + body + struct.pack(">I", check)


def gzipped(head, size): return gzip.compress(head, mtime=0) + gzip.compress(bytes(1 << 24), mtime=0) * (size >> 24)   # many members are one stream


def png(width, height, idat, *, depth=8, kind=0, extra=b""):
    chunk = lambda t, d: struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)) + extra + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def write_bombs(folder, full=True):
    "name -> file; each is refused at once, or loads within the limits"
    folder.mkdir(parents=True, exist_ok=True)
    big = BOMB if full else BOMB >> 2
    side = int(big ** .5) & ~255
    h = nib.Nifti1Header(); h.set_data_shape((1024, 1024, 1000)); h.set_data_dtype(np.int16); h["vox_offset"], h["magic"] = 352, b"n+1"
    (folder/"claims.nii").write_bytes(h.binaryblock + bytes(4 + 1000))
    (folder/"unpacks.nii.gz").write_bytes(gzipped(h.binaryblock + bytes(4), big))
    small = nib.Nifti1Header(); small.set_data_shape((4, 4, 4)); small.set_data_dtype(np.int16); small["vox_offset"], small["magic"], small["sform_code"] = 352, b"n+1", 1
    small["srow_x"], small["srow_y"], small["srow_z"] = np.eye(4, dtype=np.float32)[:3]
    (folder/"trails.nii.gz").write_bytes(gzipped(small.binaryblock + bytes(4 + 128), big))
    far = small.copy(); far["vox_offset"] = 1.9e9; (folder/"offset.nii.gz").write_bytes(gzipped(far.binaryblock + bytes(4), big))
    (folder/"extension.nii").write_bytes(small.binaryblock + b"\1\0\0\0" + struct.pack("<ii", 0x7ffffff0, 6) + bytes(200))
    (folder/"size.png").write_bytes(png(60000, 60000, zlib.compress(bytes(1000))))
    (folder/"unpacks.png").write_bytes(png(side, side, deflated(big, 15)))
    (folder/"beyond.png").write_bytes(png(8, 8, deflated(big, 15)))
    text = deflated(big, 15); chunk = b"zTXt" + b"Comment\0\0" + text
    (folder/"text.png").write_bytes(png(8, 8, zlib.compress(bytes(72)), extra=struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))))
    entry = lambda tag, kind, n, v: struct.pack("<HHII", tag, kind, n, v)
    strip = deflated(big, 15)
    tiff = lambda side, packing, data, rows: b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 9) + entry(256, 4, 1, side) + entry(257, 4, 1, side) + entry(258, 3, 1, 8) + entry(259, 3, 1, packing) \
        + entry(262, 3, 1, 1) + entry(273, 4, 1, 134) + entry(277, 3, 1, 1) + entry(278, 4, 1, rows) + entry(279, 4, 1, len(data)) + bytes(4) + bytes(134 - 8 - 2 - 9 * 12 - 4) + data
    (folder/"claims.tif").write_bytes(tiff(60000, 1, bytes(100), 60000)); (folder/"unpacks.tif").write_bytes(tiff(side, 8, strip, side))
    (folder/"counts.tif").write_bytes(tiff(8, 1, bytes(64), 8).replace(entry(273, 4, 1, 134), entry(273, 4, 0x3fffffff, 134)))
    head = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1, 1), np.uint8)) | dict(shape=(3, side, side // 3))
    f = io.BytesIO(); np.lib.format.write_array_header_1_0(f, head); npy = f.getvalue()
    with zipfile.ZipFile(folder/"unpacks.npz", "w", zipfile.ZIP_DEFLATED) as z, z.open("images.npy", "w", force_zip64=True) as w:
        w.write(npy); [w.write(bytes(1 << 24)) for _ in range(big >> 24)]
    with zipfile.ZipFile(folder/"claims.npz", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("images.npy", npy + bytes(100))
    with zipfile.ZipFile(folder/"lists.npz", "w") as z: [z.writestr(f"a{i}.npy", b"") for i in range(20000)]
    space = b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: %s\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nendian: little\nencoding: %s\n\n"
    (folder/"claims.nrrd").write_bytes(space % (b"9999 9999 9999", b"raw") + bytes(1000)); (folder/"unpacks.nrrd").write_bytes(space % (b"1024 1024 1000", b"gzip") + gzipped(b"", big))
    (folder/"trails.nrrd").write_bytes(space % (b"4 4 4", b"gzip") + gzipped(bytes(128), big)); (folder/"lines.nrrd").write_bytes(b"NRRD0004\n" + b"k:=v\n" * 400000)
    d = image_header(Rows=16, Columns=20, PixelData=bytes(640)); out = io.BytesIO(); d.save_as(out, enforce_file_format=True)
    plain = out.getvalue(); start = plain.index(b"DICM") + 4; meta_end = start + 12 + struct.unpack("<I", plain[start + 8:start + 12])[0]
    meta = plain[:meta_end].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"); meta = meta.replace(b"UI\x14\x001.2.840.10008.1.2.1.99", b"UI\x16\x001.2.840.10008.1.2.1.99")
    meta = meta[:start + 8] + struct.pack("<I", len(meta) - start - 12) + meta[start + 12:]
    (folder/"inflates.dcm").write_bytes(meta + deflated(big, -15, plain[meta_end:]))
    frames = image_header(Rows=60000, Columns=60000, NumberOfFrames="2000000000", PixelData=bytes(640)); frames.save_as(folder/"claims.dcm", enforce_file_format=True)
    deep = pydicom.Dataset(); inner = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff"
    del deep; (folder/"nested.dcm").write_bytes(plain[:meta_end] + b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff" + inner * 20000)
    for name in ("RLELossless", "JPEG2000Lossless", "JPEGLSLossless"): write_claim(folder, name)
    return sorted(p for p in folder.iterdir())


def write_claim(folder, syntax):
    "A compressed file whose header claims a million times its pixels"
    with tempfile.TemporaryDirectory() as t:
        try: write_series(t, block(1, 16, 20), syntax=syntax)
        except ImportError: return
        d = pydicom.dcmread(next(Path(t).iterdir())); d.Rows = d.Columns = 60000; d.save_as(folder/f"claims_{syntax}.dcm")


# Cases -------------------------------------------------------------------------------------------------------------------------
def make_case(number, seed, files, folder):
    "Write case `number` into `folder`; returns its format, what was done, and the path to load"
    dice = np.random.default_rng([seed, number])
    name = list(files)[number % len(files)]
    source = files[name][int(dice.integers(len(files[name])))]
    entry = f"#{PARTS[name][dice.integers(len(PARTS[name]))]}" if name in PARTS else ""
    target = folder/source.name
    if source.is_dir(): shutil.copytree(source, target); hit = list(dice.permutation(sorted(target.iterdir()))[:dice.choice([1, 1, 1, 2, 4])])
    else:
        shutil.copy(source, target); hit = [target]
        if source.suffix == ".nhdr": shutil.copy(source.with_suffix(".raw"), folder)
    whole = {k: [p for p in v if p.is_file()] for k, v in files.items()}
    others = [p.read_bytes() for p in [*whole[name], whole[list(files)[int(dice.integers(len(files)))]][0]]]   # to splice with; one of any format
    done = []
    for p in hit:
        b = Path(p).read_bytes()
        for _ in range(int(dice.choice([1, 1, 1, 2, 3]))):
            mutate = LIES[name] if dice.random() < .45 else BYTEWISE[dice.integers(len(BYTEWISE))]
            try: b = mutate(b, dice, others)
            except Exception: mutate = truncate; b = truncate(b, dice, others)   # too broken already for a well-formed lie
            done.append(mutate.__name__)
        Path(p).write_bytes(b)
    return name, "+".join(done), f"{target}{entry}"


def load(path, name):
    "By the room the format belongs to"
    from anomdx.loaders import ALLOW, LoadError, load_scan
    if name == "oct": from anomdx.oct import load_oct; return load_oct(path)
    if name == "slide": from anomdx.slides import load_patch; return load_patch(path)
    try: return load_scan(path)
    except LoadError: return load_scan(path, allow=tuple(ALLOW))   # what lies behind a refusal is to be tried too


def outcome(path, name=""):
    "What became of a load: 'loaded', 'refused', or the exception's type and where it was raised"
    from anomdx.loaders import LoadError
    try: scan = load(path, name)
    except LoadError as e: return "refused" if "\n" not in str(e) else "a message of several lines"
    except BaseException as e:
        if isinstance(e, (KeyboardInterrupt, SystemExit)): raise
        last = traceback.extract_tb(e.__traceback__)[-1]
        return f"{type(e).__name__} in {Path(last.filename).name}:{last.lineno} {last.name}"
    oriented = scan.meta.get("oriented", True)   # a picture may not know the size of its pixels
    sizes = all(np.isfinite(s) and s > 0 or np.isnan(s) and not oriented for s in scan.meta["spacing"])
    good = scan.isfinite().all() and np.isfinite(np.asarray(scan.affine)).all() and sizes
    return "loaded" if good else "loaded, but with values, an affine or a spacing that are no numbers"


def memory(reset=False):
    "Peak resident memory of this process in bytes; on Linux since the last reset"
    if Path("/proc/self/status").exists():
        if reset: Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare():
    "Load every library before the limits are set, and once of each format, so that no case pays for it"
    import logging
    warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
    import torch
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY); os.dup2(null, 1); os.dup2(null, 2); os.dup2(os.open(os.devnull, os.O_RDONLY), 0)   # C libraries talk
    try:
        import resource
        now = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (now + 3 * BYTES, now + 3 * BYTES))   # a runaway dies here, not the machine
    except (ImportError, OSError, TypeError, ValueError): pass


def worker(pipe, seed, files, bombs):
    from anomdx.loaders import load_scan   # noqa: F401
    for name, paths in files.items(): outcome("#".join([str(paths[0]), *PARTS.get(name, [])[:1]]), name)
    prepare()
    while (number := pipe.recv()) is not None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as t:
            if number < 0: name, done, path = "bomb", bombs[-1 - number].name, f"{bombs[-1 - number]}{'#images/0' if bombs[-1 - number].suffix == '.npz' else ''}"
            else: name, done, path = make_case(number, seed, files, Path(t))
            pipe.send((name, done, path))
            before, start, cpu = memory(reset=True), time.perf_counter(), time.process_time()
            result = outcome(path, name)
            pipe.send((result, min(time.perf_counter() - start, time.process_time() - cpu), memory() - before))   # waiting for others is not slowness


def keep(number, seed, files, bombs, folder):
    "Write the case's files where they stay"
    folder = Path(folder)/str(number)
    folder.mkdir(parents=True, exist_ok=True)
    if number >= 0: make_case(number, seed, files, folder)
    elif bombs[-1 - number].stat().st_size < 1 << 26: shutil.copy(bombs[-1 - number], folder)


def fuzz(numbers, seed=0, jobs=2, kept=None, show=False, full=True):
    "Run cases in worker processes; returns outcome counts per format, and the bad cases"
    counts, bad, folder = defaultdict(Counter), [], Path(tempfile.mkdtemp(prefix="fuzz-seeds-"))
    context = multiprocessing.get_context("spawn")
    try:
        files, bombs = seeds(folder), write_bombs(folder/"bombs", full)
        todo, last = [*[-1 - i for i in range(len(bombs))], *numbers][::-1], time.monotonic()
        total, workers = len(todo), {}

        def start():
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, seed, files, bombs), daemon=True); process.start(); theirs.close()
            workers[ours] = dict(process=process, number=None, case=("", "", ""), since=time.monotonic())

        def finish(pipe, result, seconds=0., extra=0):
            state = workers[pipe]; name, done, path = state["case"]; number = state["number"]
            kind = "slow" if seconds > SECONDS else "big" if extra > BYTES else result if result in ("loaded", "refused") else "other"
            counts[name][kind] += 1
            if kind not in ("loaded", "refused"):
                bad.append((number, name, done, Path(path).name, kind if kind != "other" else result, round(seconds, 2), extra >> 20))
                if kept: keep(number, seed, files, bombs, kept)
            state.update(number=None, case=("", "", ""))

        for _ in range(jobs): start()
        while todo or any(s["number"] is not None for s in workers.values()):
            for pipe, state in list(workers.items()):
                if state["number"] is None and todo:
                    state.update(number=todo.pop(), since=time.monotonic(), case=("", "", "")); pipe.send(state["number"])
            for pipe in multiprocessing.connection.wait(list(workers), timeout=.5):
                try: message = pipe.recv()
                except EOFError:   # the process died
                    state = workers[pipe]; state["process"].join()
                    if state["number"] is not None: finish(pipe, f"crash with exit status {state['process'].exitcode}")
                    del workers[pipe]; start(); continue
                if isinstance(message[1], str): workers[pipe].update(case=message, since=time.monotonic())
                else: finish(pipe, *message)
            for pipe, state in list(workers.items()):
                waited = time.monotonic() - state["since"]
                if state["number"] is not None and waited > (12 * SECONDS if state["case"][0] else 180):   # a busy machine is slow to start
                    state["process"].kill(); state["process"].join(); finish(pipe, "killed", seconds=waited); del workers[pipe]; start()
            if show and time.monotonic() - last > 5:
                last = time.monotonic(); print(f"\r{total - len(todo)} of {total} cases, {len(bad)} bad", end="", file=sys.stderr, flush=True)
        for pipe, state in workers.items(): pipe.send(None); state["process"].join(10)
        return {k: dict(v) for k, v in counts.items()}, bad
    finally: shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20000); parser.add_argument("--seed", type=int, default=0); parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", type=int, nargs="*", help="these cases only"); parser.add_argument("--keep", default="", help="folder for the bad cases")
    a = parser.parse_args()
    start = time.monotonic()
    counts, bad = fuzz(a.only if a.only else range(a.n), a.seed, a.jobs, a.keep, show=True)
    print(file=sys.stderr)
    for name, c in counts.items(): print(f"{name:8} {sum(c.values()):6}   {c}")
    print(f"{sum(sum(c.values()) for c in counts.values())} cases in {time.monotonic() - start:.0f} s, {len(bad)} bad")
    for kind, n in Counter((b[1], b[2] if b[1] == 'bomb' else '', b[4]) for b in bad).most_common(40): print(f"{n:6}  {kind[0]}: {kind[2]}   e.g. {next(b for b in bad if (b[1], b[4]) == (kind[0], kind[2]) and kind[1] in b[2])}")
    sys.exit(bool(bad))


if __name__ == "__main__": main()
