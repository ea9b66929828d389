"""Headers that claim more than their file holds: refused before a decoder, which may abort the process, or an allocation sees the claim."""
import struct

import numpy as np
import pytest

from anomdx.loaders import LoadError
from anomdx.oct import load_oct
from anomdx.slides import load_patch
from fuzz_loaders import write_topcon, write_vol

EYE = np.random.default_rng(0).integers(0, 256, (3, 24, 16), np.uint8)
LIES = [(0, 16, 2_499_805_187), (24, 0, 2**31), (0, 0, 2**32 - 1), (24, 16, 2**31), (2**31, 16, 3),
        (24, 2**31, 3), (24, 16, 0)]


@pytest.mark.parametrize("tag", [324, 325])
@pytest.mark.parametrize("claim", [2**31, 2**32 - 1])
@pytest.mark.parametrize("packing", ["zlib"])
def test_a_slide_whose_tiles_lie_outside_the_file(tmp_path, tag, claim, packing):
    "OpenSlide asks for as many bytes as TileByteCounts says, and GLib ends the process where there are none"
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("openslide")
    path = tmp_path/"a.tif"
    x = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    with tifffile.TiffWriter(path) as f:
        f.write(x, tile=(16, 16), photometric="rgb", compression=packing, resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER", metadata=None)
    assert load_patch(f"{path}#0.5/0/0/32").shape == (3, 32, 32)
    with tifffile.TiffFile(path) as f: at, kind = f.pages[0].tags[tag].valueoffset, f.pages[0].tags[tag].dtype
    data = bytearray(path.read_bytes())
    struct.pack_into({3: "<H", 4: "<I"}[int(kind)], data, at, claim if int(kind) == 4 else 0xffff)
    path.write_bytes(data)
    with pytest.raises(LoadError, match=r"a.tif has \d+ of \d+ bytes; copy or download it again"):
        load_patch(f"{path}#0.5/0/0/32")


@pytest.mark.parametrize("height, width, n", LIES)
@pytest.mark.parametrize("name", ["eye.fda", "eye.fds", "eye.vol"])
def test_an_oct_file_that_claims_what_it_cannot_hold(tmp_path, name, height, width, n):
    path = tmp_path/name
    if name.endswith("vol"):
        pytest.importorskip("eyepy")
        write_vol(path, EYE.astype(np.float32))
        was, lie = struct.pack("<3I", 16, 3, 24), struct.pack("<3I", width, n, height)
    else:
        pytest.importorskip("oct_converter")
        write_topcon(path, EYE, raw=name.endswith("fds"))
        was, lie = (struct.pack("<IIII", 16, 24, 16, 3), struct.pack("<IIII", width, height, 16, n)) if name.endswith("fds") else \
            (struct.pack("<3I", 16, 24, 3), struct.pack("<3I", width, height, n))
    assert load_oct(path).shape == (1, 24, 16, 3)
    data = path.read_bytes()
    assert data.count(was) == 1
    path.write_bytes(data.replace(was, lie))
    with pytest.raises(LoadError, match="cannot hold|cannot be read|asks for|of another size"): load_oct(path)
