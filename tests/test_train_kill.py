"""A training run that is killed at random moments, and one that is spread over two processes, end like one that was left alone"""
import io
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
import zipfile
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from anomdx.cohorts import phantom
from anomdx.datasets import ScanDataset, healthy_rows, read_table
from anomdx.models import Detector
from anomdx.stream_dataset import StreamingDataset
from anomdx.streaming import open_archive
from anomdx.train import TrainConfig, Trainer, read_checkpoint, read_metrics
from anomdx.transforms import create_preset

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and a fork server")


class Plain(Detector):
    "Neither noise nor batch normalisation: the same on any number of processes"
    def __init__(self, **options):
        super().__init__(**options)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1))
    def loss(self, x): return {"loss": F.mse_loss(self.net(x), x)}
    def forward(self, x): return self.anomaly((self.net(x) - x).abs())


class Noisy(Plain):
    "Draws from every random stream there is, and keeps running statistics"
    def __init__(self, **options):
        super().__init__(**options)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.2), nn.ConvTranspose2d(8, 1, 4, 2, 1))
    def loss(self, x): return super().loss(x + torch.randn_like(x) * np.random.rand() * random.random() * .2)


def train(kind, data, folder, ready=None, **cfg):
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())   # its own lock is a semaphore, which a killed process leaves behind
    preset = create_preset("chest_xray", size=32)
    if data.suffix == ".zip":   # a stream
        archive = open_archive(data)
        rows = [pd.DataFrame(dict(member=ids, checksum="", mask="", label=0, id=list(map(archive.member_name, ids)), patient=list(map(str, ids)))) for ids in (range(40), range(40, 56))]
        train_set, val_set = (StreamingDataset(r, archive, preset, augment=k == 0) for k, r in enumerate(rows))
    else:
        table = read_table(data)
        train_set, val_set = (ScanDataset(healthy_rows(table, split), preset, augment=split == "train") for split in ("train", "val"))
    torch.manual_seed(0)
    trainer = Trainer(kind(size=32), train_set, val_set, TrainConfig(batch_size=4, cpu=True, **cfg), folder, seed=1)
    if ready: ready.send(True)
    trainer.fit(resume=True)


def train_one_of_two(rank, port, *args, **cfg):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    train(*args, **cfg)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")/"phantoms.npz"
    images = np.stack([(phantom(i, size=32)[0][0] * 255).astype(np.uint8) for i in range(56)])
    np.savez(path, train_images=images[:40], train_labels=np.zeros((40, 1), int), val_images=images[40:], val_labels=np.zeros((16, 1), int))
    return path


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")  # imports once; every child is a process of its own that can be killed
    context.set_forkserver_preload(["anomdx.train", "anomdx.datasets", "anomdx.transforms", "anomdx.cohorts", "torch._dynamo"])
    return context


@contextmanager
def running(processes, target, *args, **cfg):
    child = processes.Process(target=target, args=args, kwargs=cfg)
    child.start()
    try: yield child
    finally:
        child.kill()
        child.join()


def check_files(folder):
    "Whatever has its final name can be read at any moment"
    for path in folder.glob("checkpoints/*/[!.]*"):
        assert path.name == "state.pt"
        assert read_checkpoint(folder, path.parent.name)["progress"]["step"] >= 0
    read_metrics(folder/"metrics.jsonl")


def assert_same_run(a, b, **tolerance):
    for which in ("best", "last"):
        one, two = read_checkpoint(a, which), read_checkpoint(b, which)
        for key in ("model", "optimizers"): torch.testing.assert_close(one[key], two[key], **tolerance)
    rows = [[{k: v for k, v in r.items() if k not in ("seconds", "images_per_s", "waited")} for r in read_metrics(f/"metrics.jsonl")] for f in (a, b)]
    return rows, read_checkpoint(a)["rng"], read_checkpoint(b)["rng"]


def test_killed_run_ends_with_the_same_weights(data, processes, tmp_path):
    # 60 steps
    whole, killed, rng, cfg = tmp_path/"whole", tmp_path/"killed", random.Random(0), dict(epochs=6,
        save_every=3)

    def at(folder):
        "Epoch, batch and step of the last checkpoint"
        kept = (folder/"checkpoints"/"last"/"state.pt").is_file()
        return [read_checkpoint(folder)["progress"][k] if kept else 0 for k in ("epoch", "batch", "step")]

    def run_until(folder, step=1000):
        "Train in a process of its own, and kill it some milliseconds after its checkpoint of `step`; its exit code"
        here, there = processes.Pipe()
        with running(processes, train, Noisy, data, folder, ready=there, **cfg) as child:
            assert here.poll(600)
            while child.is_alive() and at(folder)[2] < step:
                check_files(folder)
                time.sleep(.005)
            time.sleep(rng.uniform(0, .03))   # in the middle of anything
        check_files(folder)
        return child.exitcode

    assert run_until(whole) == 0
    places = []
    for _ in range(4):
        # counted in steps, so that a slow machine is killed as often
        code = run_until(killed, at(killed)[2] + rng.randint(1, 6))
        if code != 0: places.append(tuple(at(killed)[:2]))
    print(f"killed {len(places)} times, went on from (epoch, batch)", places)
    assert run_until(killed) == 0 and len(places) >= 2
    (rows, again), rng_a, rng_b = assert_same_run(whole, killed, rtol=0, atol=0)
    assert rows == again and len(rows) == 6
    torch.testing.assert_close(rng_a, rng_b, rtol=0, atol=0)
    assert not list(killed.glob("checkpoints/*/.*"))   # nothing half-written is left


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")/"pictures.zip"
    with zipfile.ZipFile(path, "w") as z:
        for i in range(56):
            Image.fromarray((phantom(i, size=32)[0][0] * 255).astype(np.uint8)).save(file := io.BytesIO(), "png")
            z.writestr(f"{i:03d}.png", file.getvalue())
    return path


@pytest.mark.parametrize("kind", ["files", "stream"])
def test_two_processes_train_like_one(data, pictures, kind, processes, tmp_path):
    data = data if kind == "files" else pictures
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with running(processes, train, Plain, data, tmp_path/"one", epochs=2) as child: child.join(600)
    with running(processes, train_one_of_two, 0, port, Plain, data, tmp_path/"two", epochs=2) as a, \
         running(processes, train_one_of_two, 1, port, Plain, data, tmp_path/"two", epochs=2) as b:
        a.join(600)
        b.join(600)
    assert (a.exitcode, b.exitcode) == (0, 0)
    (rows, again), _, both = assert_same_run(tmp_path/"one", tmp_path/"two", rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose([r["val_loss"] for r in rows], [r["val_loss"] for r in again], rtol=1e-4)
    assert len(both) == 2   # each process has random streams of its own
