"A mask is labels, not intensities: every way in which masks come, and what is said of those that cannot be meant"
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomdx.datasets import load_row, mask_counts, mask_findings, read_table
from anomdx.loaders import (DataError, LoadError, fit_mask, lesion_of, load_mask, load_scan,
                            save_map, save_mask)
from scans import DATA, block, image_header

AFFINE = np.array([[-1.5, 0, 0, 90], [0, 2, 0, -126], [0, 0, 3, -72], [0, 0, 0, 1.]])
# 27, 8 and 1 voxels
LABELS = np.zeros((10, 9, 8)); LABELS[2:5, 2:5, 2:5], LABELS[6:8, 6:8, 6:8], LABELS[1, 1, 1] = 1, 2, 4
SPOT = np.zeros((24, 32), np.uint8); SPOT[4:10, 4:10], SPOT[12:18, 20:28] = 1, 2   # 36 and 48 pixels


def volume(folder, x=LABELS, header=None, affine=AFFINE):
    nib.save(nib.Nifti1Image(x, affine, header), folder/"m.nii.gz")
    return folder/"m.nii.gz"


def picture(folder, x, mode=None, name="m.png", **k):
    Image.fromarray(x, mode).save(folder/name, **k)
    return folder/name


def counts(path, *choices):
    mask = load_mask(path)
    return [int(lesion_of(mask, c).sum()) for c in choices]


ALL = ((), (1,), (2,), (1, 2, 4), (3,))


@pytest.mark.parametrize("stored", ("int16", "uint8", "int8", "uint16", "int32", "float32", "float64"))
def test_labels_under_any_header(tmp_path, stored):
    "A float label map that was saved under the scan's header is stored as whole numbers times a slope"
    header = nib.Nifti1Image(np.zeros(LABELS.shape, stored), AFFINE).header
    path = volume(tmp_path, LABELS, header)
    assert counts(path, *ALL) == [36, 27, 8, 36, 0]
    misnamed = path.rename(tmp_path/"m.nii")   # still packed
    assert counts(misnamed, *ALL) == [36, 27, 8, 36, 0]


@pytest.mark.parametrize("sign", (1, -1))
def test_noise_around_labels(tmp_path, sign):
    noise = sign * np.random.default_rng(0).random(LABELS.shape) * 9e-4
    assert counts(volume(tmp_path, (LABELS + noise).astype(np.float32)), *ALL) == [36, 27, 8, 36, 0]
    assert counts(volume(tmp_path, ((LABELS == 1) + noise / 900).astype(np.float32)), ()) == [27]


@pytest.mark.parametrize("top", (1, 255))
def test_soft_edges_end_at_half(tmp_path, top):
    x = np.zeros((10, 9, 8), np.float32)
    x[2:5, 2:5, 2:5], x[5, 2:5, 2:5], x[1, 2:5, 2:5] = top, .61 * top, .41 * top
    path = volume(tmp_path, x)
    assert counts(path, (), (top,)) == [36, 36] and load_mask(path).meta["read_as"] == "soft edges"
    # cubic interpolation overshoots
    assert counts(volume(tmp_path, x - np.float32(.1 * top) * (x == 0)), ()) == [36]


@pytest.mark.parametrize("values", ([0, .5], [0, 1, 1.5, 2], [0, 1, 2.5, 4], [-1.5, 0, 1],
                                    [0, .2, 300.5], [0, .3, .4]))
def test_what_is_no_label_is_refused(tmp_path, values):
    x = np.zeros((10, 9, 8), np.float32); x.ravel()[:len(values)] = values
    with pytest.raises(LoadError, match="no whole numbers, such as .* resample it with nearest neighbours"):
        load_mask(volume(tmp_path, x))


def test_nan_is_refused(tmp_path):
    x = LABELS.astype(np.float32); x[0, 0, 0] = np.nan
    with pytest.raises(LoadError, match="1 NaN"): load_mask(volume(tmp_path, x))


def test_negative_is_background_unless_it_is_named(tmp_path):
    assert counts(volume(tmp_path, (LABELS - 3 * (LABELS == 2)).astype(np.int16)), (), (-1,)) == [28, 8]


@pytest.mark.parametrize("palette", ([0, 0, 0, 128, 0, 0, 0, 128, 0],
                                     [255, 255, 255, 0, 0, 0, 0, 128, 0], [9] * 9))
@pytest.mark.parametrize("suffix,more", ((".png", {}), (".png", {"transparency": 0}), (".tif", {}),
                                         (".png", {"bits": 2})))
def test_palette_is_its_indices(tmp_path, palette, suffix, more):
    im = Image.fromarray(SPOT); im.putpalette(palette); im.save(tmp_path/f"m{suffix}", **more)
    assert counts(tmp_path/f"m{suffix}", (), (1,), (2,), (128,)) == [84, 36, 48, 0]


def test_grey_pictures(tmp_path):
    assert counts(picture(tmp_path, SPOT), (), (1,), (2,)) == [84, 36, 48]
    assert counts(picture(tmp_path, 255 * (SPOT > 0).astype(np.uint8)), (), (255,), (1,)) == [84, 84, 0]
    assert counts(picture(tmp_path, 1000 * SPOT.astype(np.uint16)), (), (1000,), (2000,)) == [84, 36, 48]
    # 0.5 is half, not above
    assert counts(picture(tmp_path, SPOT.astype(np.float32) / 2, name="m.tif"), (), (1,)) == [48, 48]
    (Image.fromarray(255 * (SPOT > 0).astype(np.uint8)).convert("1")).save(tmp_path/"one.png")
    assert counts(tmp_path/"one.png", (), (1,)) == [84, 84]


def test_transparency(tmp_path):
    grey, full = 255 * (SPOT == 1).astype(np.uint8), np.full(SPOT.shape, 255, np.uint8)
    assert counts(picture(tmp_path, np.stack([grey, full], -1), "LA"), ()) == [36]
    spot = full.copy(); spot[0, 0] = 254
    # not quite opaque
    assert counts(picture(tmp_path, np.stack([grey, 0 * grey, 0 * grey, spot], -1)), (), (255,)) == [36, 36]
    # drawn on nothing
    assert counts(picture(tmp_path, np.stack([full, full, full, 255 * (SPOT > 0).astype(np.uint8)], -1)),
                  ()) == [84]
    assert counts(picture(tmp_path, np.stack([0 * full] * 3 + [255 * (SPOT > 0).astype(np.uint8)], -1)),
                  ()) == [84]
    with pytest.raises(LoadError, match="transparent in 3 degrees"):
        load_mask(picture(tmp_path, np.stack([grey, 0 * grey, grey, 90 * SPOT], -1)))


def test_colours(tmp_path):
    paint = np.array([[0, 0, 0], [255, 0, 0], [0, 200, 0]], np.uint8)
    two, one = picture(tmp_path, paint[SPOT], name="two.png"), picture(tmp_path,
        paint[(SPOT == 1).astype(int)], name="one.png")
    assert counts(one, (), (255,), (1,)) == [36, 36, 0] and counts(two, ()) == [84]
    with pytest.raises(LoadError, match=r"labels in 2 colours, "
                       r"\(0, 200, 0\) \(48 pixels\), \(255, 0, 0\) \(36 pixels\)"):
        lesion_of(load_mask(two), (255,))
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    with pytest.raises(LoadError, match="colours: a picture, not a mask"): load_mask(picture(tmp_path, noise))
    # grey in three channels
    assert counts(picture(tmp_path, np.stack([255 * (SPOT > 0).astype(np.uint8)] * 3, -1)), ()) == [84]


def test_grey_edges_end_at_half(tmp_path):
    disc = 255 * (np.hypot(*np.mgrid[-16:16, -16:16] + .5) < 9).astype(np.uint8)
    soft = Image.fromarray(disc).resize((128, 128), Image.BICUBIC); soft.save(tmp_path/"soft.png")
    assert abs(counts(tmp_path/"soft.png", ())[0] / 16 - 256) < 4   # the disc has 256 pixels
    soft.save(tmp_path/"was.jpg", quality=60); Image.open(tmp_path/"was.jpg").save(tmp_path/"was.png")
    assert abs(counts(tmp_path/"was.png", ())[0] / 16 - 256) < 4
    # few values are labels
    assert counts(picture(tmp_path, np.array([[0, 85], [170, 255]], np.uint8)), (), (85,)) == [3, 1]
    assert counts(picture(tmp_path, np.r_[0:21, [255] * 3].astype(np.uint8)[None]), ()) == [23]


@pytest.mark.parametrize("name", ("m.jpg", "m.png", "m.tif"))
def test_jpeg_is_refused_whatever_its_name(tmp_path, name):
    picture(tmp_path, 255 * SPOT, name=name, format="TIFF" if name == "m.tif" else "JPEG",
            **dict(compression="jpeg") if name == "m.tif" else {})
    with pytest.raises(LoadError, match="is a JPEG, which blurs a mask"): load_mask(tmp_path/name)


def test_channels(tmp_path):
    hot = np.stack([LABELS == v for v in (0, 1, 2, 4)], -1).astype(np.uint8)
    assert counts(volume(tmp_path, hot[..., 1:]), (), (1,)) == [36, 36]
    with pytest.raises(LoadError, match="the background among them"): load_mask(volume(tmp_path, hot))
    assert counts(volume(tmp_path, LABELS[..., None].astype(np.uint8)), *ALL) == [36, 27, 8, 36, 0]


def test_arrays_and_nrrd(tmp_path):
    np.savez(tmp_path/"m.npz", masks=np.stack([SPOT, 0 * SPOT]), flags=np.stack([SPOT > 0]),
             wrong=np.stack([SPOT / 3.]))
    assert counts(f"{tmp_path/'m.npz'}#masks/0", (), (2,)) == [84,
        48] and counts(f"{tmp_path/'m.npz'}#flags/0", ()) == [84]
    nrrd = pytest.importorskip("nrrd")
    header = {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": np.zeros(3)}
    nrrd.write(str(tmp_path/"s.seg.nrrd"), LABELS.astype(np.uint8), header)
    assert counts(tmp_path/"s.seg.nrrd", *ALL) == [36, 27, 8, 36, 0]


def slice_file(folder, x, name="slice.dcm", **k):
    d = image_header(Rows=x.shape[0], Columns=x.shape[1], PixelData=x.astype(np.int16).tobytes(),
                     PixelSpacing=[.5, .75], SliceThickness=2,
                     ImageOrientationPatient=[0, 1, 0, 0, 0, -1], ImagePositionPatient=[-10, -20, 5], **k)
    d.save_as(folder/name, enforce_file_format=True)
    return folder/name


@pytest.mark.parametrize("kind,says", ((dict(PhotometricInterpretation="MONOCHROME1"), "is MONOCHROME1"),
                                       (dict(LossyImageCompression="01"), "compressed with loss"),
                                       (dict(SegmentationType="FRACTIONAL", Modality="SEG"),
                                       "segmentation of fractions")))
def test_dicom_that_stands_for_something_else(tmp_path, kind, says):
    path = slice_file(tmp_path, SPOT, RescaleIntercept="0", **kind)
    with pytest.raises(LoadError, match=says): load_mask(path)


def test_dicom_mask_of_a_dicom_slice(tmp_path):
    mask, scan = slice_file(tmp_path, SPOT, RescaleIntercept="0", Modality="OT"), slice_file(tmp_path,
        block(24, 32), "scan.dcm")
    np.testing.assert_array_equal(fit_mask(load_mask(mask), load_scan(scan))[0], SPOT)


def test_own_masks_and_maps_fit_again(tmp_path):
    "Voxel on voxel, for a DICOM slice that lies sagittally, a volume, a picture, and an X-ray without a place"
    scans = [slice_file(tmp_path, block(24, 32)), slice_file(tmp_path, block(24, 24), "square.dcm"),
             picture(tmp_path, 9 * SPOT, name="p.png")]
    nib.save(nib.Nifti1Image(block(10, 9, 8), AFFINE), tmp_path/"v.nii.gz")
    nib.save(nib.Nifti1Image(block(10, 9, 1), AFFINE), tmp_path/"flat.nii.gz")
    for path in [*scans, tmp_path/"v.nii.gz", tmp_path/"flat.nii.gz"]:
        scan = load_scan(path)
        lesion = (np.random.default_rng(1).random(scan.shape[1:]) > .7).astype(np.uint8)
        for written in (save_mask(lesion, tmp_path/"out", scan), save_map(lesion.astype(np.float32),
                tmp_path/"map", scan)):
            (tmp_path/"t.csv").write_text(f"path,label,mask\n{path.name},1,{written.name}\n")
            got = load_row(read_table(tmp_path/"t.csv").iloc[0])[1]
            assert got.shape == (1, *scan.shape[1:])
            np.testing.assert_array_equal(got[0], lesion)


def test_other_order_of_axes(tmp_path):
    "What dcm2niix or Slicer make of a slice has its own order of axes; the affine says which voxel is which"
    scan = load_scan(slice_file(tmp_path, block(24, 32)))
    lesion = (np.random.default_rng(1).random((24, 32)) > .7).astype(np.uint8)
    own = nib.load(save_mask(lesion, tmp_path/"out", scan))
    for codes in ("RAS", "LPI", "SAR", "PIR"):
        order = nib.orientations.ornt_transform(nib.io_orientation(own.affine),
            nib.orientations.axcodes2ornt(codes))
        nib.save(own.as_reoriented(order), tmp_path/"turned.nii.gz")
        np.testing.assert_array_equal(fit_mask(load_mask(tmp_path/"turned.nii.gz"), scan)[0], lesion)
    volume(tmp_path); whole = load_scan(tmp_path/"m.nii.gz")
    nib.save(nib.as_closest_canonical(nib.load(tmp_path/"m.nii.gz")), tmp_path/"ras.nii.gz")
    np.testing.assert_array_equal(fit_mask(load_mask(tmp_path/"ras.nii.gz"), whole)[0], LABELS)


def test_pictures_fit_by_shape(tmp_path):
    scan = load_scan(slice_file(tmp_path, block(24, 32)))
    np.testing.assert_array_equal(fit_mask(load_mask(picture(tmp_path, SPOT)), scan)[0], SPOT)
    with pytest.raises(DataError, match=r"has the shape \(32, 24\)"):
        fit_mask(load_mask(picture(tmp_path, SPOT.T)), scan)
    square = np.zeros((10, 10), np.uint8)
    # which axis of it are the rows of a picture?
    nib.save(nib.Nifti1Image(block(10, 10, 1), AFFINE), tmp_path/"v.nii.gz")
    with pytest.raises(DataError, match="lies elsewhere"):
        fit_mask(load_mask(picture(tmp_path, square)), load_scan(tmp_path/"v.nii.gz"))


def test_elsewhere_is_refused(tmp_path):
    volume(tmp_path); whole = load_scan(tmp_path/"m.nii.gz")
    for affine in (np.eye(4), AFFINE + np.array([[0, 0, 0, 1.]] + [[0] * 4] * 3),
                   AFFINE @ np.diag([1, 1, 1.1, 1])):
        nib.save(nib.Nifti1Image(LABELS, affine), tmp_path/"other.nii.gz")
        with pytest.raises(DataError, match="lies elsewhere"):
            fit_mask(load_mask(tmp_path/"other.nii.gz"), whole)
    with pytest.raises(DataError, match="has the shape"):
        fit_mask(load_mask(volume(tmp_path, LABELS[:, :, :7])), whole)


def cohort(folder, masks, labels, lesion=()):
    "A table of pictures with these masks"
    lines = ["path,label,mask"]
    for i, (x, label) in enumerate(zip(masks, labels)):
        picture(folder, np.random.default_rng(i).integers(0, 255, (24, 32), np.uint8), name=f"s{i}.png")
        picture(folder, x, name=f"m{i}.png")
        lines.append(f"s{i}.png,{label},m{i}.png")
    (folder/"t.csv").write_text("\n".join(lines))
    return read_table(folder/"t.csv", lesion=lesion)


@pytest.mark.parametrize("masks,lesion,says", [
    ([255 * (SPOT > 0).astype(np.uint8)] * 3, (1,), "lesion values that occur in none of 3 masks: 1 (they "
        "hold 0, 255)"),
    ([SPOT, 0 * SPOT, 0 * SPOT], (1,), "2 of 3 masks of anomalous scans mark nothing"),
    ([SPOT, 0 * SPOT + 1], (1, 2), "1 of 2 masks mark more than 95 % of their scan"),
    ([SPOT], (), "1 of 1 masks hold several labels, of 0, 1, 2 (all above 0 count as lesion"),
    ([np.array([[0, 0, 0], [255, 0, 0], [0, 9, 0]], np.uint8)[SPOT]], (), "1 of 1 masks are drawn in "
        "several colours"),
    ([(SPOT > 0).astype(np.uint8)], (1,), "")])
def test_what_is_said(tmp_path, masks, lesion, says):
    found = mask_findings(cohort(tmp_path, masks, [1] * len(masks), lesion))
    assert any(says in text for text in found) if says else found == []


def test_what_is_refused(tmp_path):
    table = cohort(tmp_path, [SPOT, SPOT], [1, 0])
    with pytest.raises(DataError, match="1 of 2 masks cannot be used: .*s1.png has label 0"):
        mask_findings(table)
    with pytest.raises(DataError, match="s0.png is given as its own mask"):
        load_row(pd.Series({**table.iloc[0], "mask": table.path[0]}))
    assert mask_counts(table)["anomalous"] == 1


@pytest.mark.skipif(not DATA, reason="set ANOMDX_DATA to the folder of real images")
@pytest.mark.parametrize("name", ("brain_mri_lgg", "brain3d_ms_flair"))
def test_real_masks_read_as_before(name):
    table = read_table(Path(DATA)/name/"table.csv")
    rows = table[table["mask"] != ""]
    assert len(rows) >= 3
    for path in rows["mask"]:
        np.testing.assert_array_equal(lesion_of(load_mask(path)),
                                      (load_scan(path) > 0).any(0, keepdim=True).float())
    for _, row in rows[:3].iterrows():
        assert load_row(row)[1].any()
    assert mask_findings(rows[:9]) == []


def test_a_drawing_on_white(tmp_path):
    "White is a colour: without a black background nobody can say what the lesion is"
    x = np.full((16, 16, 3), 255, np.uint8)
    x[4:8, 4:8] = 255, 0, 0
    with pytest.raises(LoadError, match="2 colours on no black background"): lesion_of(load_mask(picture(tmp_path, x)))
    x[:, 12:] = 0
    assert lesion_of(load_mask(picture(tmp_path, x))).sum() == 192
