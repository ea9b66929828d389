"""Streams as training data: every picture exactly once for any workers and ranks, killed and resumed to the batch, and a cache that is never believed

All traffic stays on this machine; the archives are made here."""
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from anomdx.cohorts import phantom
from anomdx.datasets import ScanDataset, collate, make_loader
from anomdx.loaders import DataError, atomic_path
from anomdx.loopback import serving
from anomdx.made_nih import virtual_nih
from anomdx.stream_dataset import (MemberDataset, StreamData, StreamingDataset, StreamingNIHDataset, TensorCache, from_levels, open_cache,
                                   to_levels)
from anomdx.streaming import StreamError, open_archive
from anomdx.transforms import create_preset
from machine import assert_within

pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="needs fork, SIGKILL and pread"),
              pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")]
FORK = multiprocessing.get_context("fork")
N, PRESET = 48, create_preset("chest_xray", size=32)


def png(i, mode="L", size=64):
    file = io.BytesIO()
    Image.fromarray((255 * phantom(i, size)[0][0]).astype(np.uint8)).convert(mode).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The same pictures in a ZIP and in files; every eighth as RGBA, every fifth stored"
    home = tmp_path_factory.mktemp("stream")
    with zipfile.ZipFile(home/"images.zip", "w") as z:
        z.writestr("labels.csv", "no picture")
        for i in range(N):
            data = png(i, "RGBA" if i % 8 == 0 else "L")
            (home/f"{i:03d}.png").write_bytes(data)
            z.writestr(f"images/{i:03d}.png", data, zipfile.ZIP_STORED if i % 5 == 0 else zipfile.ZIP_DEFLATED)
    return home


def table_of(archive, n=N):
    return pd.DataFrame([dict(path=f"{archive.name}#images/{i:03d}.png", label=0, patient=f"p{i // 2}", mask="", split="train", id=f"i{i:03d}",
                              member=archive.find(f"images/{i:03d}.png")) for i in range(n)])


def stream_of(where, large=False, **options):
    "A stream; `large`: read as members of the usual size, one by one"
    archive = open_archive(where)
    stream = StreamingDataset(table_of(archive), archive, PRESET, **{"batch_size": 4, **options})
    if large: stream.members.block = 1
    return stream


def ids(batches): return [tuple(b["id"]) for b in batches]
def children(): return multiprocessing.active_children()
def our_threads(): return [t.name for t in threading.enumerate() if t.name.startswith("anomdx")]


# a worker process has one thread, and sums of float32 are rounded otherwise
ROUNDED = dict(rtol=0, atol=1e-6)
# a value that lies between two of the 256 levels of a cache may then become either
ONE_LEVEL = dict(rtol=0, atol=1 / 255 + 1e-6)


def wait_until(done, seconds=60):
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end: time.sleep(.01)
    assert done()


# Order ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("large", [False, True])
def test_any_workers_and_ranks_see_every_picture_once(home, large):
    for world in (1, 2, 4):
        seen = []
        for rank in range(world):
            stream = stream_of(home/"images.zip", large, rank=rank, world=world, seed=3)
            orders = [ids(stream.loader(epoch=1, num_workers=w)) for w in ((0, 1, 2, 3) if world == 1 else (rank % 3,))]
            assert all(o == orders[0] for o in orders) and len(orders[0]) == len(stream) == N // world // 4
            seen += [i for batch in orders[0] for i in batch]
        assert sorted(seen) == [f"i{i:03d}" for i in range(N)]


def test_epochs_and_seeds_differ_and_repeat(home):
    stream = stream_of(home/"images.zip")
    orders = {(s, e): ids(stream.loader(seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}
    assert len(set(map(tuple, orders.values()))) == 4
    assert all(ids(stream_of(home/"images.zip").loader(seed=s, epoch=e, num_workers=1)) == o for (s, e), o in orders.items())


def test_the_tail_of_uneven_ranks(home):
    for even, lengths in ((True, [9] * 5), (False, [10, 10, 10, 9, 9])):
        streams = [stream_of(home/"images.zip", rank=r, world=5, even=even, shuffle=even) for r in range(5)]
        assert [len(s.rows_of(0)) for s in streams] == lengths
    left = [frozenset(range(N)) - set(np.concatenate([stream_of(home/"images.zip", rank=r, world=5).rows_of(e) for r in range(5)])) for e in range(4)]
    assert {len(rows) for rows in left} == {3} and len(set(left)) > 1   # other ones in every epoch


def test_drop_last_and_start_batch_mean_what_they_mean_in_make_loader(home):
    stream, disk = stream_of(home/"images.zip", large=True), ScanDataset(table_of(open_archive(home/"images.zip")).assign(
        path=[str(home/f"{i:03d}.png") for i in range(N)]), PRESET)
    for size, start, drop, shuffle, workers in ((5, 0, True, True, 2), (5, 3, False, True, 0), (7, 6, False, False, 2), (7, 99, False, True, 2), (50, 0, True, True, 0)):
        options = dict(batch_size=size, shuffle=shuffle, seed=2, epoch=3, start_batch=start, num_workers=workers, drop_last=drop)
        ours, theirs = stream.loader(**options), make_loader(disk, **options)
        assert len(ours) == len(theirs) and ids(ours) == ids(theirs)


# The same pictures as on the disk ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_batches_equal_those_of_files_on_disk(home, context):
    stream = stream_of(home/"images.zip", large=True, augment=True, seed=7)
    disk = ScanDataset(table_of(open_archive(home/"images.zip")).assign(path=[str(home/f"{i:03d}.png") for i in range(N)]), PRESET, augment=True, seed=7)
    pairs = zip(stream.loader(epoch=2, num_workers=2, context=context), make_loader(disk, 4, True, seed=7, epoch=2), strict=True)
    for ours, theirs in pairs:
        assert list(ours) == list(theirs) and ours["id"] == theirs["id"] and ours["patient"] == theirs["patient"]
        torch.testing.assert_close(ours["image"], theirs["image"], atol=.02, rtol=0)   # half a level, then the gain and gamma of the augmentation
        for k in ("label", "mask", "has_mask"): torch.testing.assert_close(ours[k], theirs[k])
    assert not children()


def test_items_to_the_bit_in_any_order(home):
    archive = open_archive(home/"images.zip")
    members, disk = MemberDataset(table_of(archive), archive, PRESET), ScanDataset(
        table_of(archive).assign(path=[str(home/f"{i:03d}.png") for i in range(N)]), PRESET)
    rows = np.random.default_rng(0).integers(0, N, 60).tolist()
    for i, ours in zip(rows, members.__getitems__(rows), strict=True):
        theirs = disk[i]
        torch.testing.assert_close(ours["image"], from_levels(to_levels(theirs["image"], "")), rtol=0, atol=0)
        assert {k: v for k, v in ours.items() if k not in ("image", "mask")} == {k: v for k, v in theirs.items() if k not in ("image", "mask")}
        torch.testing.assert_close(ours["mask"], theirs["mask"])
    torch.testing.assert_close(members[5]["image"], members.__getitems__([7, 5])[1]["image"], rtol=0, atol=0)


def test_a_sampler_and_monai_take_a_map_of_members(home):
    from monai.data import DataLoader, Dataset
    archive = open_archive(home/"images.zip")
    members = MemberDataset(table_of(archive), archive, PRESET)
    sampler = torch.utils.data.WeightedRandomSampler(torch.arange(N).float(), 24, generator=torch.Generator().manual_seed(0))
    batches = list(torch.utils.data.DataLoader(members, batch_size=8, sampler=sampler, num_workers=2, collate_fn=collate))
    assert [len(b["id"]) for b in batches] == [8] * 3 and "i000" not in sum((b["id"] for b in batches), [])
    doubled = Dataset(members, lambda item: {**item, "image": 2 * item["image"]})
    batch = next(iter(DataLoader(doubled, batch_size=4)))
    torch.testing.assert_close(batch["image"][2], 2 * members[2]["image"])


# Killed and resumed --------------------------------------------------------------------------------------------------------------
def learn(where, folder, workers, journal, slow=0.):
    "Something like training: a weight that depends on every batch and their order, kept after each"
    torch.set_num_threads(1)
    state = json.loads((folder/"state.json").read_text()) if (folder/"state.json").is_file() else dict(weight=0., stream=None)
    stream = stream_of(where, augment=True, seed=5)
    if state["stream"]: stream.load_state_dict(state["stream"])
    while stream.epoch < 3:
        loader = stream.loader(num_workers=workers)
        for batch in loader:
            state = dict(weight=.9 * state["weight"] + float(batch["image"].double().square().mean()), stream=loader.state_dict())
            with atomic_path(folder/"state.json") as part: part.write_text(json.dumps(state))
            with open(journal, "a") as file: file.write(f"{stream.epoch} {' '.join(batch['id'])}\n")
            time.sleep(slow)
        stream.set_epoch(stream.epoch + 1)
    (folder/"done").write_text(str(state["weight"]))


def test_killed_at_twenty_random_batches_and_resumed(home, tmp_path):
    dice = random.Random(0)
    learn(home/"images.zip", tmp_path, 0, tmp_path/"whole")
    whole, weight = (tmp_path/"whole").read_text().splitlines(), (tmp_path/"done").read_text()
    assert len(whole) == 3 * N // 4
    for name in ("done", "state.json"): (tmp_path/name).unlink()
    kills = 0
    while not (tmp_path/"done").exists():
        lines = len((tmp_path/"parts").read_text().splitlines()) if (tmp_path/"parts").exists() else 0
        process = FORK.Process(target=learn, args=(home/"images.zip", tmp_path, dice.choice((0, 1, 2, 3)), tmp_path/"parts", .01))
        process.start()
        if kills < 20:
            more = lines + dice.randint(1, 2)
            wait_until(lambda: (tmp_path/"parts").exists()
                       and len((tmp_path/"parts").read_text().splitlines()) >= more
                       or not process.is_alive(), 600)
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    parts = (tmp_path/"parts").read_text().splitlines()
    assert list(dict.fromkeys(parts)) == whole            # a batch that was done but not yet noted may come twice
    assert len(parts) <= len(whole) + kills and kills == 20
    # in other processes than the whole
    assert float((tmp_path/"done").read_text()) == pytest.approx(float(weight), rel=1e-6)


def test_resumed_at_twenty_random_batches_by_other_workers(home):
    dice, stream = random.Random(1), stream_of(home/"images.zip", augment=True)
    whole = list(stream.loader(epoch=2))
    for turn, k in enumerate(dice.choices(range(len(whole) + 1), k=20)):
        loader = stream.loader(epoch=2, num_workers=2 * (turn % 3 == 0))
        batches = iter(loader)
        for _ in range(k): next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
        batches.close()
        again = stream_of(home/"images.zip", augment=True)
        again.load_state_dict(state)
        rest = list(again.loader(num_workers=(0, 3, 0, 1)[turn % 4]))
        assert ids(rest) == ids(whole[k:])
        for a, b in zip(rest, whole[k:]): torch.testing.assert_close(a["image"], b["image"], **ROUNDED)


def test_another_archive_is_refused(home, tmp_path):
    state = stream_of(home/"images.zip").state_dict()
    with zipfile.ZipFile(home/"images.zip") as old, zipfile.ZipFile(tmp_path/"images.zip", "w") as new:
        for info in old.infolist(): new.writestr(info, old.read(info) if info.filename != "images/007.png" else png(99))
    with pytest.raises(DataError, match="read other data than this"): stream_of(tmp_path/"images.zip").load_state_dict(state)
    (tmp_path/"same.zip").write_bytes((home/"images.zip").read_bytes())
    stream_of(tmp_path/"same.zip").load_state_dict(state)   # the same content from another place is the same archive


# The cache -----------------------------------------------------------------------------------------------------------------------
def images(stream, **options): return torch.cat([b["image"] for b in stream.loader(shuffle=False, **options)])


def test_the_second_epoch_asks_for_nothing(home, tmp_path):
    with serving({"images.zip": home/"images.zip"}) as server:
        stream = stream_of(server.url("images.zip"), cache=tmp_path)
        first = images(stream, num_workers=2)
        asked = server.counts()
        assert asked["requests"] > 1
        np.testing.assert_array_equal(images(stream, num_workers=2), first)
        assert server.counts()["requests"] == asked["requests"]
    np.testing.assert_array_equal(images(stream), first)   # the server is gone
    # prepared here, not in a worker
    np.testing.assert_allclose(images(stream_of(home/"images.zip")), first, **ONE_LEVEL)


def test_damage_of_every_kind_is_a_missing_row(home, tmp_path):
    stream, dice = stream_of(home/"images.zip", cache=tmp_path), np.random.default_rng(0)
    truth, cache = images(stream), stream.members.cache
    size = os.path.getsize(cache.path)
    for k in range(12):
        with open(cache.path, "r+b") as file:
            for _ in range(40):                              # of rows and marks, but not of the head
                file.seek(int(dice.integers(4096, size))); file.write(dice.bytes(3))
            if k % 3 == 0: file.seek(4096); file.write(bytes(8 * 20))   # marks that never reached the disk
            if k % 3 == 1: file.seek(cache.start); file.write(bytes(20 * cache.row))   # rows that did not
            if k % 3 == 2: file.truncate(size - 5 * cache.row)          # the end did not
        np.testing.assert_array_equal(images(stream), truth)
        np.testing.assert_array_equal(images(stream), truth)   # and what was missing is there again
        assert cache.has(stream.members.member, stream.members.crc).all()


def test_an_old_or_foreign_cache_is_replaced(home, tmp_path):
    stream = stream_of(home/"images.zip", cache=tmp_path)
    truth, path = images(stream), stream.members.cache.path
    size = os.path.getsize(path)
    for head in ({**stream.members.cache.head, "archive": "another"}, {**stream.members.cache.head, "anomdx": "0.0.1"}, None):
        data = bytearray(path.read_bytes())
        data[:4095] = (json.dumps(head).encode() if head else b"\xff").ljust(4095, b" ")
        data[stream.members.cache.start:] = bytes(len(data) - stream.members.cache.start)   # what would be believed
        path.write_bytes(data)
        fresh = stream_of(home/"images.zip", cache=tmp_path)
        assert not fresh.members.cache.marks().any()
        np.testing.assert_array_equal(images(fresh), truth)
    for length in (4096, 4200, 5000, size - 1):   # cut within the marks, or the rows
        os.truncate(path, length)
        np.testing.assert_array_equal(images(stream_of(home/"images.zip", cache=tmp_path)), truth)
    other = StreamingDataset(table_of(a := open_archive(home/"images.zip")), a, create_preset("chest_xray", size=32, foreground="mask"), cache=tmp_path)
    assert other.members.cache.path != path


def fill(path, n, seed, most):
    cache = TensorCache(path, {}, n, (1, 8, 8))
    for j in np.random.default_rng(seed).permutation(n)[:most].tolist(): cache.put(j, j + 1, np.full((1, 8, 8), j % 251, np.uint8))


def test_many_processes_share_a_cache_and_some_are_killed(tmp_path):
    n, dice = 4000, random.Random(0)
    for k in range(8):
        processes = [FORK.Process(target=fill, args=(tmp_path/"a.rows", n, 10 * k + i, n)) for i in range(3)]
        for p in processes: p.start()
        time.sleep(dice.uniform(.01, .1))
        for p in processes: os.kill(p.pid, signal.SIGKILL); p.join()
    cache = TensorCache(tmp_path/"a.rows", {}, n, (1, 8, 8))
    marked = np.flatnonzero(cache.marks())
    assert 100 < len(marked)
    for j in marked.tolist(): assert (cache.get(j, j + 1) == j % 251).all()
    fill(tmp_path/"a.rows", n, 0, n)
    assert all(cache.get(j, j + 1) is not None and cache.get(j, j + 2) is None for j in range(n))


def test_a_budget_bounds_the_disk_and_the_rest_is_streamed(home, tmp_path):
    archive = open_archive(home/"images.zip")
    cache = open_cache(tmp_path, archive, PRESET, gb=10.5 * 32 * 32 / 1e9)
    stream = StreamingDataset(table_of(archive), archive, PRESET, cache=cache, batch_size=4)
    truth = images(stream_of(home/"images.zip"))
    for workers in (0, 2): np.testing.assert_allclose(images(stream, num_workers=workers), truth, **ONE_LEVEL)
    assert np.count_nonzero(cache.marks()) == 10
    assert os.stat(cache.path).st_blocks * 512 < 64_000


def put_until_full(path, results):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cache, said = TensorCache(path, {}, 40, (1, 64, 64)), []
    logging.getLogger("anomdx.stream_dataset").addHandler(type("Ear", (logging.Handler,), {"emit": lambda self, r: said.append(r.getMessage())})())
    resource.setrlimit(resource.RLIMIT_FSIZE, (cache.start + 10 * cache.row + 100, resource.RLIM_INFINITY))   # the eleventh row fits in part
    for j in range(40): cache.put(j, 1, np.full((1, 64, 64), j, np.uint8))
    results.put((said, np.count_nonzero(cache.marks()), [cache.get(j, 1) is not None for j in range(12)]))


def test_a_full_disk_ends_the_caching_with_one_warning(tmp_path):
    results = FORK.Queue()
    for _ in range(2):   # a process that comes later may find room again, and says so once more if not
        process = FORK.Process(target=put_until_full, args=(tmp_path/"a.rows", results)); process.start()
        said, marks, kept = results.get(timeout=300); process.join()
        assert len(said) == 1 and "a.rows" in said[0] and "training goes on" in said[0] and "\n" not in said[0]
        assert marks == 10 and kept == [True] * 10 + [False] * 2


def test_a_folder_that_cannot_be_written_is_one_line(home, tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(DataError, match="the cache .* cannot be written .*; make room, or choose another folder") as caught:
        stream_of(home/"images.zip", cache=tmp_path/"file")
    assert "\n" not in str(caught.value)


# From end to end -----------------------------------------------------------------------------------------------------------------
def test_a_remote_nih_in_stages(tmp_path):
    with serving({"archive.zip": virtual_nih(n=2400, size=64, payloads=8)}) as server:
        cfg = StreamData(n_train=60, cache=str(tmp_path))
        stages = ["images_002", "images_003", "images_011"]
        stream = StreamingNIHDataset(server.url("archive.zip"), size=32, batch_size=8, stages=stages, cfg=cfg, augment=True)
        orders = [ids(stream.loader(epoch=e, num_workers=2 * (e % 2))) for e in range(5)]
        assert [stream.stage(e).name for e in range(5)] == stages + 2 * stages[-1:]
        shown = [frozenset(i for b in o for i in b) for o in orders]
        assert shown[0] < shown[1] < shown[2] == shown[3] == shown[4] and len(shown[4]) == 60
        asked = server.counts()["requests"]
        again = StreamingNIHDataset(server.url("archive.zip"), size=32, batch_size=8, stages=stages, cfg=cfg, augment=True)
        opened = server.counts()["requests"] - asked
        assert ids(again.loader(epoch=4)) == orders[4] and server.counts()["requests"] - asked == opened


# Errors and endings --------------------------------------------------------------------------------------------------------------
def with_bad(home, tmp_path, data):
    with zipfile.ZipFile(home/"images.zip") as old, zipfile.ZipFile(tmp_path/"images.zip", "w") as new:
        for info in old.infolist(): new.writestr(info, old.read(info) if info.filename != "images/020.png" else data)
    return tmp_path/"images.zip"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_one_line_with_its_name(home, tmp_path, workers):
    noise = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(noise, "png")
    for data, text in ((b"no picture", "cannot be read as a picture"), (png(0)[:200], "cannot be read as a picture"),
                       (noise.getvalue(), "has 3; set channels=3 or convert it")):
        stream = stream_of(with_bad(home, tmp_path, data))
        with pytest.raises(DataError, match=text) as caught: list(stream.loader(num_workers=workers))
        assert "images.zip#images/020.png" in str(caught.value) and "\n" not in str(caught.value)
    wait_until(lambda: not our_threads() and not children())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_fails_is_one_line(home, workers):
    with serving({"images.zip": home/"images.zip"}) as server:
        archive = open_archive(server.url("images.zip"), tries=2, backoff=.01)
        stream = StreamingDataset(table_of(archive), archive, PRESET, batch_size=4)
        server.set(faults={"503": 1.})
        with pytest.raises(StreamError, match="gave up after 2 attempts") as caught: list(stream.loader(num_workers=workers))
        assert "\n" not in str(caught.value)
        wait_until(lambda: not our_threads() and not children())


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_leaves_nothing_behind(home, workers):
    with serving({"images.zip": home/"images.zip"}, latency=.02) as server:
        stream = stream_of(server.url("images.zip"))
        for _ in stream.loader(num_workers=workers): pass
        archive, before = stream.members.archive, len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        for _ in range(4):
            batches = iter(stream.loader(num_workers=workers))
            next(batches); batches.close()
        wait_until(lambda: not our_threads() and not children())
        archive.close()
        if before: assert len(os.listdir("/proc/self/fd")) <= before


INTERRUPTED = """
import sys, time; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_stream_dataset import children, our_threads, stream_of
try:
    for batch in stream_of({url!r}, large=True, batch_size=2, conns=4, budget_mb=.5).loader(num_workers={workers}): print("batch", flush=True)
except KeyboardInterrupt: pass
while children() or our_threads(): time.sleep(.01)
print(time.monotonic(), flush=True)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_control_c_ends_everything_within_a_second(tmp_path, workers):
    "Loop, worker processes and threads; taking down an interpreter that has imported torch and MONAI takes about as long again"
    with zipfile.ZipFile(tmp_path/"large.zip", "w") as z:   # 48 pictures of 100 KB
        for i in range(N): z.writestr(f"images/{i:03d}.png", png(i) + np.random.default_rng(i).bytes(100_000))
    with serving({"large.zip": tmp_path/"large.zip"}, apart=True) as server:
        code = INTERRUPTED.format(tests=os.path.dirname(__file__), url=server.url("large.zip"), workers=workers)
        assert_within(1, lambda: interrupted(code, server))


def interrupted(code, server):
    "Seconds from Ctrl-C until loop, worker processes and threads are gone"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    server.set(latency=.2)
    assert process.stdout.readline() == "batch\n"
    server.set(latency=8.)   # requests that would hold a thread for long
    time.sleep(1)
    sent = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    said, error = process.communicate(timeout=300)
    assert process.returncode == 0 and not error
    return float(said.split()[-1]) - sent
