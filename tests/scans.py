"""What the loader tests share: made scans of every kind, and where real ones lie.

Voxel arrays are asymmetric, so that a flip or a swapped axis shows; patients are made up."""
import importlib.util
import os
import struct
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage,
                         NuclearMedicineImageStorage, generate_uid)

DATA = os.environ.get("ANOMDX_DATA", "")   # a folder with dicom_series/ and ct3d_chest_samples/; most tests do without
RAS = np.diag([-1., -1, 1, 1])             # DICOM counts towards left and posterior


def library_files():
    "Every file of pydicom's own test sets, and of pydicom-data where it is installed: readable, odd and broken ones"
    roots = [Path(pydicom.__file__).parent/"data"/name for name in ("test_files", "charset_files")]
    if found := importlib.util.find_spec("data_store"): roots.append(Path(found.submodule_search_locations[0])/"data")
    return sorted(p for r in roots for p in r.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc"))


def block(*shape, seed=0):
    "An asymmetric int16 block: two ramps, a bright corner and a little noise"
    z, y, x = np.meshgrid(*[np.linspace(0, 1, n) for n in (*(1,) * (3 - len(shape)), *shape)], indexing="ij")
    v = 900 * x + 400 * y ** 2 - 300 * z + np.random.default_rng(seed).normal(0, 9, z.shape)
    v[: -(-v.shape[0] // 3), : v.shape[1] // 4, : v.shape[2] // 3] += 700
    return v.reshape(shape).astype(np.int16)


def axes(turn=0., nod=0.):
    "Row and column direction of a slice, turned about the patient's axis and nodded, radians"
    row = np.array([np.cos(turn), np.sin(turn), 0])
    return row, np.cross(np.cross(row, [-np.sin(turn) * np.cos(nod), np.cos(turn) * np.cos(nod), np.sin(nod)]), row)


def image_header(kind=CTImageStorage, **changes):
    "A header with everything an image needs but its place"
    d = Dataset(); d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID, d.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, kind
    d.SOPClassUID, d.SOPInstanceUID, d.Modality, d.ImageType = kind, generate_uid(), "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2", "1.2.826.0.1.3680043.8.498.3"
    d.PatientName, d.PatientID, d.StudyDate, d.StudyTime, d.SeriesNumber, d.PatientPosition = "Doe^Jane", "4711", "20240102", "101112", 2, "HFS"
    d.Manufacturer, d.AcquisitionNumber, d.InstanceNumber, d.KVP = "made", 1, 1, "120"
    d.SamplesPerPixel, d.PhotometricInterpretation, d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 1, "MONOCHROME2", 16, 16, 15, 1
    d.RescaleIntercept, d.RescaleSlope, d.WindowCenter, d.WindowWidth = "-1024", "1", "40", "400"
    for k, v in changes.items(): setattr(d, k, v)
    return d


def write_series(folder, voxels, spacing=(1.5, .75, 3.), turn=0., nod=0., origin=(-20., 30., 5.), tilt=0., drop=(), syntax=None, places=None, tag=0, **changes):
    """`voxels` (slices, rows, columns) as a CT series with scrambled names; returns voxel (column, row, slice) -> RAS mm of what was written.

    `spacing` between rows, columns, slices; `tilt` degrees shears the stack; `drop` leaves slices out; `places` are slice numbers
    other than 0, 1, 2, …; `syntax` compresses; `changes` are header fields, or functions of the slice number."""
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    row, column = axes(turn, nod)
    step = spacing[2] * (np.cross(row, column) + np.tan(np.radians(tilt)) * column)
    for k, x in enumerate(voxels):
        if k in drop: continue
        d = image_header(Rows=x.shape[0], Columns=x.shape[1], PixelSpacing=[float(s) for s in spacing[:2]], SliceThickness=float(spacing[2]), InstanceNumber=k + 1)
        d.ImageOrientationPatient = [float(f"{v:.9f}") for v in (*row, *column)]
        d.ImagePositionPatient = [float(f"{v:.6f}") for v in np.add(origin, step * (k if places is None else places[k]))]
        if tilt: d.GantryDetectorTilt = float(tilt)
        d.PixelData = np.clip(x.astype(np.int32) + 1024, -32768, 32767).astype("<i2").tobytes()
        for name, v in changes.items(): setattr(d, name, v(k) if callable(v) else v)
        d.save_as(folder/f"IM{(k * 37 + 100 * tag) % 997:04d}.dcm", enforce_file_format=True)
    if syntax: compress(folder, syntax)
    return RAS @ np.array([[*(row * spacing[1]), 0], [*(column * spacing[0]), 0], [*step, 0], [*origin, 1]]).T


def compress(folder, syntax):
    "Rewrite the DICOM files of a folder in another transfer syntax; GDCM's name of it, such as 'JPEGLSLossless'"
    import gdcm
    for p in Path(folder).glob("*.dcm"):
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(p)); assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax))); change.SetInput(reader.GetImage()); assert change.Change()
        writer.SetFileName(str(p)); writer.SetFile(reader.GetFile()); writer.SetImage(change.GetOutput()); assert writer.Write()


def write_enhanced(path, voxels, spacing=(1.5, .75, 3.), turn=0., nod=0., origin=(-20., 30., 5.), order=None, **changes):
    "`voxels` (slices, rows, columns) as one enhanced MR file, its frames in any `order`; returns voxel (column, row, slice) -> RAS mm"
    row, column = axes(turn, nod)
    step = spacing[2] * np.cross(row, column)
    order = range(len(voxels)) if order is None else order
    item = lambda **fields: pydicom.Sequence([dataset(**fields)])
    d = image_header(EnhancedMRImageStorage, Modality="MR", Rows=voxels.shape[1], Columns=voxels.shape[2], NumberOfFrames=len(voxels))
    for name in ("RescaleIntercept", "RescaleSlope", "WindowCenter", "WindowWidth"): delattr(d, name)
    d.SharedFunctionalGroupsSequence = item(
        PixelMeasuresSequence=item(PixelSpacing=[float(s) for s in spacing[:2]], SliceThickness=float(spacing[2]), SpacingBetweenSlices=float(spacing[2])),
        PlaneOrientationSequence=item(ImageOrientationPatient=[float(f"{v:.9f}") for v in (*row, *column)]))
    d.PerFrameFunctionalGroupsSequence = pydicom.Sequence([dataset(
        FrameContentSequence=item(StackID="1", InStackPositionNumber=int(k) + 1, DimensionIndexValues=[1, int(k) + 1]),
        PlanePositionSequence=item(ImagePositionPatient=[float(f"{v:.6f}") for v in np.add(origin, step * k)]),
        PixelValueTransformationSequence=item(RescaleIntercept="-1024", RescaleSlope=str(1 + int(k)), RescaleType="US")) for k in order])
    d.PixelData = np.stack([voxels[k].astype("<i2") for k in order]).tobytes()
    for name, v in changes.items(): setattr(d, name, v)
    d.save_as(path, enforce_file_format=True)
    return RAS @ np.array([[*(row * spacing[1]), 0], [*(column * spacing[0]), 0], [*step, 0], [*origin, 1]]).T


def csa_block(**values):
    "A CSA image header (format SV10) that holds `values`, lists of numbers"
    out = b"SV10\4\3\2\1" + struct.pack("<2I", len(values), 77)
    for name, items in values.items():
        out += struct.pack("<64si4s3i", name.encode(), len(items), b"FD", 4, len(items), 77)
        for text in (f"{v:.8f}".encode() for v in items):
            out += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + bytes(-len(text) % 4)
    return out


def tile_picture(voxels, rows, columns):
    "(slices, H, W) laid as tiles into one picture, empty ones last"
    n, h, w = voxels.shape
    tiles = np.zeros((rows * columns, h, w), voxels.dtype)
    tiles[:n] = voxels
    return tiles.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows * h, columns * w)


def slice_header(kind, voxels, spacing, turn, nod, origin, **changes):
    "Header of one slice, the direction of its rows and columns, and the affine of the volume to RAS mm"
    row, column = axes(turn, nod)
    d = image_header(kind, Modality="MR", SliceThickness=spacing[2] * .8, SpacingBetweenSlices=spacing[2],
                     PixelSpacing=[float(s) for s in spacing[:2]],
                     Rows=voxels.shape[1], Columns=voxels.shape[2], ImageOrientationPatient=[float(f"{v:.9f}")
                     for v in (*row, *column)], **changes)
    for name in ("RescaleIntercept", "RescaleSlope"): delattr(d, name)
    step = spacing[2] * np.cross(row, column)
    return d, row, column, RAS @ np.array([[*(row * spacing[1]), 0], [*(column * spacing[0]), 0], [*step, 0],
                                           [*origin, 1]]).T


def write_mosaic(path, voxels, spacing=(1.5, .75, 3.), turn=0., nod=0., origin=(-20., 30., 5.), up=1, block=0,
                 edit=None, **changes):
    """`voxels` (slices, rows, columns) as a Siemens mosaic; returns voxel (column, row, slice) -> RAS mm.

    `up` -1 stacks against the normal of rows and columns; `block` other creators come first; `edit` changes the data set."""
    d, row, column, affine = slice_header(MRImageStorage, voxels, spacing, turn, nod, origin,
                                          Manufacturer="SIEMENS", ImageType=["ORIGINAL", "PRIMARY", "M",
        "ND", "MOSAIC"])
    n, h, w = voxels.shape
    side = int(np.ceil(n ** .5))
    picture = tile_picture(voxels, side, side)
    corner = np.subtract(origin, (side - 1) / 2 * (h * spacing[0] * column + w * spacing[1] * row))
    d.Rows, d.Columns, d.PixelData = *picture.shape, picture.astype("<i2").tobytes()
    d.ImagePositionPatient = [float(f"{v:.7f}") for v in corner]
    for group in (0x19, 0x29):
        for k in range(block): d.private_block(group, f"ANOTHER {k}", create=True).add_new(0x0a, "LO", "none")
    d.private_block(0x19, "SIEMENS MR HEADER", create=True).add_new(0x0a, "US", n)
    d.private_block(0x29, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB",
        csa_block(NumberOfImagesInMosaic=[n], SliceNormalVector=up * np.cross(row, column)))
    for name, v in changes.items(): setattr(d, name, v)
    if edit: edit(d)
    d.save_as(path, enforce_file_format=True)
    affine[:3, 2] *= up
    return affine


def write_vframe(path, voxels, spacing=(1.5, .75, 3.), turn=0., nod=0., origin=(-20., 30., 5.),
                 edit=None, **changes):
    "`voxels` (slices, rows, columns) as a United Imaging VFRAME picture; returns voxel (column, row, slice) -> RAS mm"
    d, row, column, affine = slice_header(MRImageStorage, voxels, spacing, turn, nod, origin,
                                          Manufacturer="UIH",
                                          ImageType=["ORIGINAL", "PRIMARY", "M", "VFRAME"])
    n = len(voxels)
    columns = int(np.ceil(n ** .5))
    picture = tile_picture(voxels, -(-n // columns), columns)
    d.Rows, d.Columns, d.PixelData = *picture.shape, picture.astype("<i2").tobytes()
    block = d.private_block(0x65, "Image Private Header", create=True)
    block.add_new(0x50, "DS", str(n))
    places = [np.add(origin, k * spacing[2] * np.cross(row, column)) for k in range(n)]
    block.add_new(0x51, "SQ",
                  [dataset(ImagePositionPatient=[float(f"{v:.7f}") for v in p],
        AcquisitionTime=f"1011{k:02d}") for k, p in enumerate(places)])
    for name, v in changes.items(): setattr(d, name, v)
    if edit: edit(d)
    d.save_as(path, enforce_file_format=True)
    return affine


def write_tomogram(path, voxels, spacing=(1.5, .75, 3.), turn=0., nod=0., origin=(-20., 30., 5.),
                   kind="RECON TOMO", edit=None, **changes):
    "`voxels` (slices, rows, columns) as one nuclear medicine file; returns voxel (column, row, slice) -> RAS mm"
    d, row, column, affine = slice_header(NuclearMedicineImageStorage, voxels, spacing, turn, nod, origin,
                                          ImageType=["ORIGINAL", "PRIMARY", kind, "EMISSION"])
    n = len(voxels)
    d.Modality, d.NumberOfFrames, d.NumberOfSlices, d.FrameIncrementPointer, d.SliceVector = ("NM", n, n,
        0x00540080, list(range(1, n + 1)))
    d.DetectorInformationSequence = [dataset(ImagePositionPatient=[float(v) for v in origin],
                                             ImageOrientationPatient=d.ImageOrientationPatient)]
    del d.ImageOrientationPatient
    d.PixelData = voxels.astype("<i2").tobytes()
    for name, v in changes.items(): setattr(d, name, v)
    if edit: edit(d)
    d.save_as(path, enforce_file_format=True)
    return affine


def dataset(**fields):
    d = Dataset()
    for name, v in fields.items(): setattr(d, name, v)
    return d


def corners(affine, shape):
    "The eight corner points of a grid in patient space, in an order that no flip or swap of axes changes"
    ends = np.array(np.meshgrid(*[[0, n - 1] for n in (*shape, 1, 1)[:3]], [1])).reshape(4, -1)
    points = (np.asarray(affine, float) @ ends)[:3].T
    return points[np.lexsort(np.round(points, 1).T)]
