"""Slides: right to the pixel or refused, by both engines and against MONAI and scikit-image, and 20 480 x 20 480 pixels in bounded memory"""
import json
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

pytest.importorskip("openslide", reason="needs the extra 'wsi'")
tifffile = pytest.importorskip("tifffile", reason="needs the extra 'wsi'")
pytest.importorskip("tiffslide", reason="needs the extra 'wsi'")

from anomdx.loaders import DataError, LoadError, keyed_hash, load_scan, save_map
from anomdx.slides import (ENGINES, Patch, iter_patches, level_factor, level_pixels, load_patch, open_slide, otsu, patch_grid, patch_path, read_patch,
                           read_region, save_slide_map, stitch, tissue_mask, write_pyramid)

ENGINES = tuple(ENGINES)


def spell(level, y, x, h, w):
    "Every pixel says its own column and row, 12 bits each."
    Y, X = np.mgrid[y:y + h, x:x + w]
    return np.stack([X & 255, Y & 255, X >> 8 << 4 | Y >> 8], -1).astype(np.uint8)


def column_row(pixels):
    r, g, b = np.moveaxis(np.asarray(pixels).astype(int), -1, 0)
    return b >> 4 << 8 | r, (b & 15) << 8 | g


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    return write_pyramid(tmp_path_factory.mktemp("slides")/"spelled.tif", spell, [(3072 >> i, 2048 >> i) for i in range(4)], .25)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mpp,level", [(.25, 0), (.5, 1), (1., 2), (2., 3)])
def test_place_to_the_pixel(spelled, engine, mpp, level):
    slide = open_slide(spelled, engine=engine)
    grid = patch_grid(slide, mpp, size=64, overlap=.25, min_tissue=0)
    w, h = slide.levels[level]
    rng = random.Random(0)
    for p in rng.sample(grid, min(len(grid), 60)) + [grid[0], grid[-1]]:
        scan = read_patch(slide, p)
        columns, rows = column_row(np.moveaxis(scan.numpy(), 0, -1))
        x, y = p.x >> level, p.y >> level
        assert (scan.meta["level"], scan.meta["place"], scan.meta["mpp"]) == (level, (p.x, p.y), mpp)
        np.testing.assert_array_equal(columns, np.arange(x, x + 64)[None].repeat(64, 0))
        np.testing.assert_array_equal(rows, np.arange(y, y + 64)[:, None].repeat(64, 1))
        down, right = scan.affine.numpy()[:2] @ [[10], [20], [0], [1]]   # row 10, column 20, in mm
        np.testing.assert_allclose([down[0], right[0]], [(y + 10.5) * mpp / 1000, (x + 20.5) * mpp / 1000], rtol=1e-12)
    assert {(p.x, p.y) for p in grid} >= {(0, 0), (3072 - 64 * 2**level, 2048 - 64 * 2**level)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("overlap", (0, .3))
def test_stitched_to_the_pixel(spelled, engine, overlap):
    slide = open_slide(spelled, engine=engine)
    for mpp in (.5, 2.):
        grid = patch_grid(slide, mpp, 100, overlap, 0)
        maps = (column_row(np.moveaxis(read_patch(slide, p).numpy(), 0, -1)) for p in grid)
        h, w = round(512 / mpp), round(768 / mpp)
        amap = stitch(grid, (c + 10_000 * r for c, r in maps), slide, mpp)[0].numpy()
        np.testing.assert_allclose(amap, np.arange(w) + 10_000. * np.arange(h)[:, None], rtol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_lone_score_lands_where_its_patch_is(spelled, engine):
    slide = open_slide(spelled, engine=engine)
    for x, y, size, mpp in [(512, 256, 64, 1.), (96, 1032, 100, .5), (3000, 2000, 256, .25), (333, 77, 50, .6)]:
        amap = stitch([Patch(x, y, size, mpp)], [5.], slide, 4.)[0].numpy()
        seen = np.isfinite(amap)
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        assert (rows[0], columns[0]) == (int(y * .25 / 4), int(x * .25 / 4))
        assert (rows[-1] + 1, columns[-1] + 1) == (min(-(-round(y * .25 + size * mpp, 6) // 4), 128), min(-(-round(x * .25 + size * mpp, 6) // 4), 192))
        np.testing.assert_allclose(amap[seen], 5, rtol=1e-6)


@pytest.mark.parametrize("w,h", [(4001, 3003), (4003, 2999)])
@pytest.mark.parametrize("part", (np.floor, np.ceil))
def test_ragged_levels(tmp_path, w, h, part):
    "Levels of odd sizes: exact with tiffslide; openslide draws them shifted by up to one of their pixels, and never more."
    levels = [tuple(int(part(n / 2**i)) for n in (w, h)) for i in range(4)]
    path = write_pyramid(tmp_path/"odd.tif", spell, levels, .25)
    exact, close = open_slide(path, engine="tiffslide"), open_slide(path, engine="openslide")
    assert exact.levels == close.levels == levels and [f[0] for f in exact.factors] == [1, 2, 4, 8]
    rng = np.random.default_rng(0)
    for level, (lw, lh) in enumerate(levels):
        for x, y in [(0, 0), (lw - 40, lh - 40), *zip(rng.integers(0, lw - 40, 6), rng.integers(0, lh - 40, 6))]:
            truth = spell(level, y, x, 40, 40)
            np.testing.assert_array_equal(level_pixels(exact, level, int(x), int(y), 40, 40), truth)
            got = level_pixels(close, level, int(x), int(y), 40, 40)
            if level == 0: np.testing.assert_array_equal(got, truth)
            elif (got[..., 2] == truth[..., 2]).all() and (truth[..., :2] < 200).all() and (truth[..., :2] > 50).all():   # no seam of tiles, no carry
                assert np.abs(got.astype(int) - truth)[..., :2].max() <= 1


def test_axes_that_differ(tmp_path):
    "0.25 um across and 0.5 um down: a patch is square on the glass, and the file's own two numbers are used."
    path = write_pyramid(tmp_path/"long.tif", spell, [(2048, 1024)], (.25, .5))
    for engine in ENGINES:
        slide = open_slide(path, engine=engine)
        assert slide.mpp == (.25, .5)
        with pytest.raises(LoadError, match="ask for 0.5 or more"): read_region(slide, 0, 0, 9, 9, .25)
        got = read_region(slide, 200, 100, 64, 64, .5)[..., 1]
        np.testing.assert_array_equal(got[:, 0], 100 + np.arange(64))   # rows as they are
        columns = read_region(slide, 512, 100, 64, 64, .5)[..., 0]      # columns in pairs: the mean of 2n and 2n + 1, rounded
        np.testing.assert_allclose(columns[0], 2 * np.arange(64) + .5, atol=.5)
        amap = stitch(patch_grid(slide, 1., 64, 0, 0), iter(np.arange(999.)[:len(patch_grid(slide, 1., 64, 0, 0))]), slide, 64.)[0].numpy()
        np.testing.assert_array_equal(amap, np.arange(64.).reshape(8, 8))


def test_same_as_monai(spelled):
    "MONAI's WSIReader, location (y, x) at level 0."
    from monai.data import WSIReader
    reader = WSIReader("openslide")
    wsi, slide = reader.read(str(spelled)), open_slide(spelled)
    for level, (x, y) in product((0, 1, 3), [(0, 0), (512, 1024)]):
        theirs, meta = reader.get_data(wsi, location=(y, x), size=(64, 48), level=level)
        ours = read_region(slide, x, y, 48, 64, .25 * 2**level)
        np.testing.assert_array_equal(np.moveaxis(ours, -1, 0), theirs)


def test_same_threshold_as_scikit_image():
    threshold_otsu = pytest.importorskip("skimage.filters").threshold_otsu
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = np.concatenate([rng.normal(m, s, n) for m, s, n in ((20, 9, 3000), (rng.integers(60, 200), 25, rng.integers(200, 4000)))]).clip(0, 255).astype(np.uint8)
        assert otsu(values) == threshold_otsu(values)


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_and_batches_change_nothing(spelled, engine):
    slide = open_slide(spelled, engine=engine)
    grid = patch_grid(slide, .5, 64, .2, 0)
    alone = [read_patch(slide, p).as_tensor() for p in grid[:200]]
    for workers, batch in ((1, 7), (8, 16)):
        many = [x for _, x in iter_patches(slide, grid[:200], batch, workers)]
        torch.testing.assert_close(torch.cat(many), torch.stack(alone), rtol=0, atol=0)
    wrong = []
    def stress(seed):
        for i in np.random.default_rng(seed).integers(0, 200, 60):
            if not torch.equal(read_patch(slide, grid[i]).as_tensor(), alone[i]): wrong.append(i)
    threads = [Thread(target=stress, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


def test_stopping_early_leaves_no_thread(spelled):
    import threading
    before = threading.active_count()
    slide = open_slide(spelled)
    for _, x in iter_patches(slide, patch_grid(slide, .5, 64, 0, 0), 4, 4): break
    import gc; gc.collect()
    assert threading.active_count() <= before   # threads of earlier tests may end meanwhile


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows): self.rows = rows
    def __len__(self): return len(self.rows)
    def __getitem__(self, i): return load_patch(self.rows[i]).as_tensor()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("start", ("fork", "spawn"))
def test_rows_in_worker_processes(spelled, start):
    slide = open_slide(spelled)
    rows = [patch_path(slide, p) for p in patch_grid(slide, 1., 64, 0, 0)]
    alone = [load_patch(r).as_tensor() for r in rows]   # the parent has it open, too
    loader = torch.utils.data.DataLoader(Rows(rows), 5, num_workers=2 if start == "fork" else 1, multiprocessing_context=start)
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack(alone), rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_cut_or_worn_is_right_or_refused(spelled, tmp_path, engine):
    content, path, rng = spelled.read_bytes(), tmp_path/"bad.tif", random.Random(0)
    changed = [content[:rng.randrange(len(content))] for _ in range(6)]
    for _ in range(14):
        b = bytearray(content)
        for _ in range(rng.choice((1, 30))): b[rng.randrange(rng.choice((400, len(b))))] = rng.randrange(256)   # the header, or anywhere
        changed.append(bytes(b))
    for b in changed:
        path.write_bytes(b)
        try: slide = open_slide(path, engine=engine)
        except DataError as e: assert str(path) in str(e); continue
        for level, (w, h) in enumerate(slide.levels[:2]):
            if (slide.levels[0], slide.factors[level][0]) != ((3072, 2048), 2**level) or w < 3072 >> level: continue   # another slide by now
            for _ in range(8):
                x, y = rng.randrange(w - 64), rng.randrange(h - 64)
                try: got = level_pixels(slide, level, x, y, 64, 64)
                except DataError as e: assert str(path) in str(e); continue
                np.testing.assert_array_equal(got, spell(level, y, x, 64, 64)[..., :got.shape[2]])


def test_a_map_of_a_patch_goes_through_save_map(spelled, tmp_path):
    patch = read_patch(open_slide(spelled), Patch(0, 0, 64, 1.))
    amap = torch.rand(1, 64, 64)
    torch.testing.assert_close(load_scan(save_map(amap, tmp_path/"patch", patch)).as_tensor(), amap)


def test_map_opens_as_a_slide_elsewhere(spelled, tmp_path):
    from tiffslide import TiffSlide
    slide = open_slide(spelled)
    grid = patch_grid(slide, .5, 64, 0, 0)
    amap = stitch(grid[:200], (float(p.x) for p in grid[:200]), slide, .5)
    saved = save_slide_map(amap, tmp_path/"map")
    back = TiffSlide(saved)
    assert back.dimensions == amap.shape[:0:-1] and back.level_count == 3 and back.properties["tiffslide.mpp-x"] == .5
    np.testing.assert_array_equal(back.read_region((0, 0), 0, back.dimensions, as_array=True)[..., 0], amap[0].numpy())
    assert np.isnan(back.read_region((0, 0), 2, back.level_dimensions[2], as_array=True)).any()
    assert [p.name for p in tmp_path.iterdir()] == ["map.tiff"]


def dicom_level(path, x, mpp, number, uids, tile=256):
    "One level of a DICOM slide, native pixels (PS3.3 A.32.8), with what a hospital would leave in it."
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid
    h, w = x.shape[:2]
    kind = ["ORIGINAL" if number == 1 else "DERIVED", "PRIMARY", "VOLUME", "NONE" if number == 1 else "RESAMPLED"]
    measures, shared, optics, frame = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness, frame.FrameType, optics.OpticalPathIdentifier = [mpp / 1000] * 2, .001, kind, "0"
    shared.PixelMeasuresSequence, shared.WholeSlideMicroscopyImageFrameTypeSequence = [measures], [frame]
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.PatientName, d.PatientID, d.PatientBirthDate = "Doe^Jane", "4711", "19700101"
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID, d.Modality, d.InstanceNumber = *uids, "SM", number
    d.ImageType, d.DimensionOrganizationType, d.ImageOrientationSlide = kind, "TILED_FULL", [0, -1, 0, -1, 0, 0]
    d.Rows = d.Columns = tile
    d.TotalPixelMatrixColumns, d.TotalPixelMatrixRows, d.TotalPixelMatrixFocalPlanes, d.NumberOfOpticalPaths = w, h, 1, 1
    d.SamplesPerPixel, d.PhotometricInterpretation, d.PlanarConfiguration, d.PixelRepresentation = 3, "RGB", 0, 0
    d.BitsAllocated, d.BitsStored, d.HighBit = 8, 8, 7
    d.SharedFunctionalGroupsSequence, d.OpticalPathSequence = [shared], [optics]
    padded = np.pad(x, ((0, -h % tile), (0, -w % tile), (0, 0)))
    d.NumberOfFrames = (padded.shape[0] // tile) * (padded.shape[1] // tile)
    d.PixelData = padded.reshape(-1, tile, padded.shape[1] // tile, tile, 3).swapaxes(1, 2).tobytes()
    d["PixelData"].VR = "OB"
    d.save_as(path, enforce_file_format=True)


def test_dicom_slide(tmp_path):
    from pydicom.uid import generate_uid
    uids = [generate_uid() for _ in range(3)]
    for i in range(3): dicom_level(tmp_path/f"{i}.dcm", spell(i, 0, 0, 1000 >> i, 1500 >> i), .25 * 2**i, i + 1, uids)
    slide = open_slide(tmp_path/"1.dcm")   # any file of it
    assert slide.mpp == (.25, .25) and slide.levels == [(1500, 1000), (750, 500), (375, 250)] and slide.patient == keyed_hash("4711")
    for mpp, level in ((.25, 0), (.5, 1), (1., 2)):
        scan = read_patch(slide, Patch(400, 200, 64, mpp))
        np.testing.assert_array_equal(np.moveaxis(scan.numpy(), 0, -1), spell(level, 200 >> level, 400 >> level, 64, 64))
        assert not any(s in str(scan.meta) for s in ("Doe", "Jane", "4711", "1970", uids[0]))


def test_transparent_is_white(tmp_path):
    "A tile that the scanner never wrote."
    x = np.full((512, 512, 4), 255, np.uint8)
    x[:256, :256, :3], x[256:, :, 3], x[256:, :, :3] = 40, 0, 7
    tifffile.imwrite(tmp_path/"alpha.tif", x, tile=(256, 256), photometric="rgb", extrasamples=["unassalpha"], resolution=(40000, 40000), resolutionunit="CENTIMETER")
    for engine in ENGINES:
        slide = open_slide(tmp_path/"alpha.tif", engine=engine)
        assert (read_region(slide, 0, 256, 512, 256, .25) == 255).all() and (read_region(slide, 0, 0, 256, 256, .25) == 40).all()
        assert (read_region(slide, -64, -64, 64, 64, .25) == 255).all() and (read_region(slide, 512, 0, 64, 64, .25) == 255).all()


def test_refusals(tmp_path):
    picture = np.zeros((600, 600, 3), np.uint8)
    scale = dict(resolution=(40000, 40000), resolutionunit="CENTIMETER")
    tifffile.imwrite(tmp_path/"dpi.tif", picture, tile=(256, 256), photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    tifffile.imwrite(tmp_path/"strip.tif", np.zeros((6000, 6000, 3), np.uint8), photometric="rgb", rowsperstrip=6000, compression="zlib", **scale)
    tifffile.imwrite(tmp_path/"float.tif", picture[..., 0].astype(np.float32), tile=(256, 256), **scale)
    tifffile.imwrite(tmp_path/"deep.tif", picture.astype(np.uint16), tile=(256, 256), photometric="rgb", **scale)
    (tmp_path/"empty.svs").touch()
    for name, words in dict(dpi="how large a pixel is", strip="damaged, or no whole-slide|in one piece", float="float.tif", deep="deep.tif", empty="empty.svs").items():
        path = next(tmp_path.glob(f"{name}.*"))
        for engine in ENGINES:
            with pytest.raises(LoadError, match=words): read_patch(open_slide(path, engine=engine), Patch(0, 0, 64, .25))
    for row in ("a.svs", "a.svs#1/2/3", "a.svs#x/0/0/256", "a.svs#0.5/0/0/0", "a.svs#0.5/0/0/99999", "a.svs#nan/0/0/9"):
        with pytest.raises(LoadError): load_patch(row)


def test_without_the_libraries(spelled, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    assert open_slide(spelled).engine == "tiffslide"
    monkeypatch.setitem(sys.modules, "tiffslide", None)
    with pytest.raises(LoadError, match=r"anomdx\[wsi\]"): open_slide(spelled)


# What streams the large slide, in a process of its own. It does not see packages that MONAI imports only because they happen to be
# installed beside it: `pip install anomdx[wsi]` brings none of them.
STREAM = """
import sys
for name in ("itk", "SimpleITK", "cv2", "h5py", "skimage", "nrrd", "gdcm"): sys.modules[name] = None
import json, time
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
def now(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
import torch, monai.data
imports = peak()   # VmHWM is this process alone; getrusage would count its parent's
from anomdx.slides import *
before, start = now(), time.time()
slide = open_slide(sys.argv[1], engine=sys.argv[2])
tissue = tissue_mask(slide)
grid = patch_grid(slide, .5, 256, .25, .5, tissue)
scores = (s for _, x in iter_patches(slide, grid, workers=int(sys.argv[4])) for s in (x[:, 0] < 160).float().mean((1, 2)))
amap = stitch(grid, scores, slide, 8.)
saved = save_slide_map(amap, sys.argv[3])
top = divmod(int(amap.as_tensor().nan_to_num_(-1).argmax()), amap.shape[2])
print(json.dumps(dict(size=slide.dimensions, tissue=float(tissue.mask.mean()), patches=len(grid), peak=peak(), imports=imports, before=before,
                      seconds=time.time() - start, top=top, file=saved.stat().st_size)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "20 480 x 20 480 pixels at 0.5 um: glass, three pieces of textured tissue, and one dark spot at (4000, 6000) um down and right."
    rng = np.random.default_rng(0)
    grain = rng.integers(-25, 25, (512, 512, 1))
    nucleus = ndimage_max(rng.random((512, 512)) > .9965, 7)
    many = ndimage_max(rng.random((512, 512)) > .985, 7)
    pieces = [(3000, 5500, 1500, 2600), (7500, 2600, 900, 1400), (7600, 7700, 1300, 1000)]   # down, right, half height, half width, in um

    def paint(level, y, x, h, w):
        out, step = np.full((h, w, 3), 242, np.uint8), .5 * 2**level
        if all(max(y * step - a, a - (y + h) * step) > c or max(x * step - b, b - (x + w) * step) > d for a, b, c, d in pieces): return out
        Y, X = (np.arange(y, y + h)[:, None] + .5) * .5 * 2**level, (np.arange(x, x + w) + .5) * .5 * 2**level
        inside = sum((((Y - a) / c)**2 + ((X - b) / d)**2 < 1) for a, b, c, d in pieces) > 0
        if not inside.any(): return out
        s = np.arange(y, y + h)[:, None] % 512, np.arange(x, x + w) % 512
        dark = np.where((Y - 4000)**2 + (X - 6000)**2 < 300**2, many[s], nucleus[s])[..., None]
        return np.where(inside[..., None], np.where(dark, (95, 60, 140), np.array((222, 150, 190)) + grain[s]), 242).astype(np.uint8)

    return write_pyramid(tmp_path_factory.mktemp("large")/"large.tif", paint, [(20480 >> i,) * 2 for i in range(6)], .5)


def ndimage_max(mask, size):
    from scipy import ndimage
    return ndimage.maximum_filter(mask, size, mode="wrap")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("engine,give_back", [("openslide", True), ("tiffslide", True), ("openslide", False)])
def test_20480_pixels_in_500_MB(large, tmp_path, engine, give_back):
    """The whole process, two reading threads. glibc keeps what was freed for later, differently in each run; a fixed threshold makes it
    give large blocks back, and the peak is what is really in use. Without it the growth is held to twice as much."""
    run = subprocess.run([sys.executable, "-c", STREAM, large, engine, tmp_path/"map", "2"], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])} | ({"MALLOC_MMAP_THRESHOLD_": "262144"} if give_back else {}))
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    print(f"\n{engine}, {'fixed threshold' if give_back else 'as it is'}: {large.stat().st_size / 2**20:.0f} MB file, {seen}")
    assert seen["size"] == [20480, 20480] and seen["patches"] > 1000
    assert np.hypot(*(np.array(seen["top"]) * 8 + 4 - [4000, 6000])) < 300
    assert seen["peak"] - seen["imports"] < (85 if give_back else 160), seen
    if give_back and seen["imports"] < 420: assert seen["peak"] < 500, seen   # importing the CPU build of torch and MONAI takes 414 MB of them
