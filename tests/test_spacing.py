"""A spacing that nobody wrote down is not known: `nan` from the file to the map, never 1 mm. And a slice that is stored as a
volume one voxel thick is a picture where pictures are asked for."""
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from anomdx.anatomy import left_right_axis
from anomdx.artifacts import corrupt
from anomdx.loaders import DataError, load_picture, load_scan, save_map, save_mask
from anomdx.oct import load_oct
from anomdx.planting import plant
from anomdx.robustness import usual_diameters, voxel_size
from anomdx.series import ScanReader
from anomdx.transforms import OneSlice, create_preset
from anomdx.viz import pixel_mm
from scans import block, write_series


def grey(*shape): return (np.abs(block(*shape)) % 255 + 1).astype(np.uint8)


@pytest.fixture(params=["a.png", "a.jpg", "a.tif", "print.tif", "a.npz#x/1", "volumes.npz#x/1", "flat.oct",
                        "bare.nii", "bare.nrrd"])
def unknown(request, tmp_path):
    "A scan whose file does not say how large its pixels are"
    name = request.param
    file = tmp_path/name.partition("#")[0]
    if name.endswith((".png", ".jpg", "a.tif", ".oct")):
        Image.fromarray(grey(40, 30)).save(file.with_suffix(".png" if ".oct" in name else file.suffix))
    elif name == "print.tif": Image.fromarray(grey(40, 30)).save(file, dpi=(300, 300))   # the size of a print
    elif name == "a.npz#x/1": np.savez(file, x=grey(3, 40, 30))
    elif name == "volumes.npz#x/1": np.savez(file, x=np.stack([grey(12, 40, 30)] * 2))
    elif name == "bare.nii":
        img = nib.Nifti1Image(grey(12, 40, 30), None); img.header["xyzt_units"] = 0; nib.save(img, file)
    elif name == "bare.nrrd": pytest.importorskip("nrrd").write(str(file), grey(12, 40, 30))
    if name == "flat.oct": return load_oct(file.with_suffix(".png"))
    return load_scan(tmp_path/name, allow=("unoriented",))


def test_no_spacing_is_made_up(unknown):
    assert len(unknown.meta["spacing"]) == unknown.ndim - 1 and np.isnan(unknown.meta["spacing"]).all()
    np.testing.assert_array_equal(unknown.affine, np.eye(4))   # counts voxels


def test_the_preset_keeps_it_unknown_and_refuses_millimetres(unknown):
    n = unknown.ndim - 1
    options = dict(size=24, spatial_dims=n, orientation="")
    x, _ = create_preset("mri", **options)(unknown)
    assert np.isnan(x.meta["spacing"]).all() and pixel_mm(x) is None
    with pytest.raises(DataError, match=r"does not say how large its pixels are along axis 1, "
            r"2.*transform.spacing=0.5 mm needs; leave") as e:
        create_preset("mri", spacing=.5, **options)(unknown)
    assert str(e.value).startswith(unknown.meta["source"])


def test_lesions_are_measured_in_pixels(unknown):
    assert voxel_size(unknown) == ([1.] * (unknown.ndim - 1), "px")
    assert usual_diameters(unknown) == usual_diameters(unknown.as_tensor())
    with pytest.raises(DataError, match="does not say how large its pixels are; leave it out, or plant in "
                                        "scan.as_tensor"):
        plant("blob", unknown, diameter=4.)


def test_the_map_claims_no_millimetres(unknown, tmp_path):
    amap = torch.rand(1, *unknown.shape[1:])
    path = save_map(amap, tmp_path/"map", unknown)
    if path.name.endswith(".nii.gz"): assert nib.load(path).header.get_xyzt_units()[0] == "unknown"
    if path.suffix == ".nrrd": assert "spacings" not in pytest.importorskip("nrrd").read_header(str(path))
    if path.suffix == ".tiff":
        with Image.open(path) as im: assert 282 not in im.tag_v2   # no resolution
    back = load_scan(path, allow=("unoriented",))
    torch.testing.assert_close(back.as_tensor(), amap, rtol=0, atol=0)
    assert np.isnan(back.meta["spacing"]).all()
    assert np.isnan(load_scan(save_mask(amap > .5, tmp_path/"mask", unknown),
                              allow=("unoriented",)).meta["spacing"]).all()


def test_a_streamed_picture_is_the_same(tmp_path):
    Image.fromarray(grey(40, 30)).save(tmp_path/"a.png")
    scan = load_picture((tmp_path/"a.png").read_bytes(), "a.zip#a.png")
    assert np.isnan(scan.meta["spacing"]).all()


def test_monai_batches_scans_of_unknown_spacing(tmp_path):
    monai = pytest.importorskip("monai")
    for k in range(2): Image.fromarray(grey(40, 30)).save(tmp_path/f"{k}.png")
    load = monai.transforms.LoadImaged("image", reader=ScanReader(), ensure_channel_first=True)
    batch = monai.data.list_data_collate([load({"image": tmp_path/f"{k}.png"}) for k in range(2)])
    assert batch["image"].shape == (2, 1, 40, 30) and math.isnan(float(batch["image"].meta["spacing"][0][0]))


def test_what_is_known_stays_known(tmp_path):
    "1 mm is a spacing like any other where a file states it"
    img = nib.Nifti1Image(grey(12, 40, 30), np.eye(4)); nib.save(img, tmp_path/"a.nii.gz")
    scan = load_scan(tmp_path/"a.nii.gz")
    assert scan.meta["spacing"] == (1, 1, 1) and voxel_size(scan)[1] == "mm"
    assert nib.load(save_map(scan, tmp_path/"map", scan)).header.get_xyzt_units()[0] == "mm"
    affine = write_series(tmp_path/"s", block(1, 40, 30), (1.5, .75, 3.))
    picture = load_scan(next((tmp_path/"s").iterdir()))
    assert picture.meta["spacing"] == pytest.approx((1.5, .75)) and pixel_mm(picture) == pytest.approx((1.5,
        .75)) and affine.shape == (4, 4)


AFFINE = nib.affines.from_matvec(nib.eulerangles.euler2mat(.1, -.2, .3) @ np.diag([.5, 2., 3.]), [5, 6, 7])
SHAPES = [(48, 40, 1), (48, 1, 40), (1, 48, 40)]


def one_slice(path, shape, extra=()):
    "A slice stored as a volume, with a bright spot at a known place"
    x = grey(48, 40).reshape(shape).astype(np.int16)
    img = nib.Nifti1Image(x.reshape(*shape, *extra), AFFINE)
    img.set_qform(AFFINE, 1); img.set_sform(AFFINE, 4); nib.save(img, path)
    return x


@pytest.mark.parametrize("extra", [(), (1,), (1, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_volume_of_one_slice_is_a_picture_and_its_map_a_volume(shape, extra, tmp_path):
    one_slice(tmp_path/"a.nii.gz", shape, extra)
    scan, preset = load_scan(tmp_path/"a.nii.gz"), create_preset("mri", size=48)
    assert scan.shape == (1, *shape)
    lesion = torch.zeros(48, 40); lesion[26:34, 17:25] = 1
    lesion = lesion.reshape(scan.shape)
    x, mask = preset(scan, lesion)
    assert x.shape == mask.shape == (1, 48, 48) and mask.any()
    known = [h for h, n in zip((.5, 2., 3.), shape) if n > 1]
    side = max(h * n for h, n in zip(known, (48, 40))) / 48   # mm of a pixel of the detector's grid
    assert x.meta["spacing"] == pytest.approx((side, side), rel=.1)
    back = preset.restore(mask, x)
    assert back.shape == scan.shape
    path = save_map(back, tmp_path/"map", scan)
    out = nib.load(path)
    assert out.shape == shape and [int(out.header[k]) for k in ("qform_code", "sform_code")] == [1, 4]
    np.testing.assert_allclose(out.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(out.header.get_zooms(), [.5, 2, 3], atol=1e-5)
    centre = [np.average(np.argwhere(v > 0), axis=0, weights=v[v > 0])
              for v in (out.get_fdata(), lesion[0].numpy())]
    assert np.linalg.norm(AFFINE[:3, :3] @ (centre[0] - centre[1])) < side


@pytest.mark.parametrize("shape", SHAPES)
def test_each_pixel_of_the_picture_lies_where_it_lay(shape, tmp_path):
    x = one_slice(tmp_path/"a.nii", shape)
    scan = load_scan(tmp_path/"a.nii"); flat = OneSlice()({"image": scan})["image"]
    np.testing.assert_array_equal(flat[0], x.squeeze())
    for at in ((0, 0), (30, 21)):
        full = np.insert(at, shape.index(1), 0)
        np.testing.assert_allclose(nib.affines.apply_affine(np.asarray(flat.affine), [*at, 0]),
                                   nib.affines.apply_affine(np.asarray(scan.affine), full), atol=1e-6)
    # a sagittal slice has no left and right to mirror
    assert left_right_axis(flat) == (None if shape[0] == 1 else 1)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(flat.affine)[:3, :2], axis=0),
                               flat.meta["spacing"], rtol=1e-6)


def test_the_slice_that_anomdx_wrote_itself_is_a_picture(tmp_path):
    "A DICOM slice's map is NIfTI (rows, columns, 1); it goes through the same preset as the slice"
    write_series(tmp_path/"s", block(1, 40, 30), (1.5, .75, 3.), turn=.2)
    scan = load_scan(next((tmp_path/"s").iterdir()))
    copy = load_scan(save_map(scan, tmp_path/"copy", scan)); assert copy.shape == (1, 40, 30, 1)
    preset = create_preset("mri", size=32)
    (x, _), (y, _) = preset(scan), preset(copy)
    torch.testing.assert_close(x.as_tensor(), y.as_tensor(), rtol=1e-5, atol=1e-6)   # float32 on disk
    np.testing.assert_allclose(x.affine, y.affine, atol=1e-4)


def test_volumes_and_lines_stay_refused_with_advice_that_can_be_followed(tmp_path):
    preset = create_preset("mri", size=32)
    for shape, said in (((48, 40, 5), "set spatial_dims=3, or save the slice that is meant"),
                        ((48, 1, 1), r"has 3 \(48, 1, 1\)")):
        nib.save(nib.Nifti1Image(grey(*shape), AFFINE), tmp_path/"v.nii")
        with pytest.raises(DataError, match=said): preset(load_scan(tmp_path/"v.nii"))
    nib.save(nib.Nifti1Image(grey(48, 40, 1), AFFINE), tmp_path/"one.nii")
    # asked for as a volume
    x, _ = create_preset("mri", size=16, spatial_dims=3)(load_scan(tmp_path/"one.nii")); assert x.ndim == 4


def test_lesions_and_artefacts_of_one_slice(tmp_path):
    "What robustness does to pictures is done to the picture"
    one_slice(tmp_path/"a.nii", (48, 1, 40))
    scan = OneSlice()({"image": load_scan(tmp_path/"a.nii")})["image"]
    planted = plant("blob", scan, 3, torch.ones(1, 48, 40), diameter=20.)
    assert planted.mask.shape == (1, 48, 40) and planted.image.meta["spacing"] == scan.meta["spacing"]
    assert corrupt("rician_noise", scan, 2, 0)[0].shape == scan.shape
