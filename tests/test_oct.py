"""load_oct on real B-scans that ship nowhere: they are found through ANOMDX_DATA, and the test is skipped where it is not set."""
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomdx.loaders import LoadError
from anomdx.oct import load_oct

DATA = os.environ.get("ANOMDX_DATA")
pytestmark = pytest.mark.skipif(not DATA or not (Path(DATA)/"oct_srf").is_dir(), reason="ANOMDX_DATA names no folder with oct_srf")


@pytest.fixture
def pictures():
    return sorted((Path(DATA)/"oct_srf"/"images").glob("*.png"))


def test_each_picture_is_one_bscan(pictures):
    "Grey stored as RGBA comes out as one channel with the picture's own values, and claims no mm."
    for p in pictures:
        scan = load_oct(p)
        assert scan.shape[0] == 1 and scan.ndim == 3 and scan.meta["unit"] == "uint8" and np.isnan(
            scan.meta["spacing"]).all()
        np.testing.assert_array_equal(scan[0], np.array(Image.open(p).convert("RGBA"))[..., 0])


def test_a_folder_of_many_eyes_is_no_volume(pictures, tmp_path):
    with pytest.raises(LoadError, match="differ in more than one number"): load_oct(pictures[0].parent)
    for p in pictures:
        if p.name.startswith("srf"): shutil.copy(p, tmp_path)
    with pytest.raises(LoadError, match="lacks B-scans"): load_oct(tmp_path)


def test_renumbered_they_are_read_in_the_order_of_their_numbers(pictures, tmp_path):
    chosen = [p for p in pictures if p.name.startswith("srf")]
    for i, p in enumerate(chosen): shutil.copy(p, tmp_path/f"bscan{i}.png")
    scan = load_oct(tmp_path)
    assert scan.shape[-1] == len(chosen) > 10
    for i in (0, 2, 10): np.testing.assert_array_equal(scan[..., i], load_oct(chosen[i]))
