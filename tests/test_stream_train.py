"""A detector that is trained on an archive behind a server: killed at random moments, on another server, with a tracker that listens"""
import multiprocessing
import random
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from tqdm import tqdm

from anomdx.experiment import load_config, run
from anomdx.loopback import serving
from anomdx.made_nih import write_nih
from anomdx.progressive import stage_table
from anomdx.runs import evaluate, progressive
from anomdx.train import checkpoint_path, read_checkpoint, read_metrics

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and a fork server")
STAGES = ["images_001", "images_002", "images_003"]


def changes(source, **more):
    options = {"data.source": source, "data.stages": f"[{', '.join(STAGES)}]", "data.val": .5, "transform.size": 32, "train.batch_size": 4, "train.epochs": 2,
               "train.save_every": 2, "train.num_workers": 0, "data.cache": "", "eval.n_boot": 50} | more
    return [f"{k}={v}" for k, v in options.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The same pictures as one archive, and as twelve beside their tables"
    folder = tmp_path_factory.mktemp("nih")
    return [write_nih(folder/name, n=360, size=48, bundle=bundle) for name, bundle in (("one", True), ("twelve", False))]


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")   # imports once; every child is a process of its own that can be killed
    context.set_forkserver_preload(["anomdx.runs", "anomdx.progressive", "torch._dynamo"])
    return context


def train(source, folder, ready):
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())   # its own lock is a semaphore, which a killed process leaves behind
    ready.send(True)
    run(load_config("nih_stream", changes(source)), folder, resume=True)


@contextmanager
def running(processes, source, folder):
    here, there = processes.Pipe()
    child = processes.Process(target=train, args=(source, folder, there))
    child.start()
    try:
        assert here.poll(600)
        yield child
    finally:
        child.kill()
        child.join()


def clockless(rows): return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s", "waited")} for r in rows]


def at(folder):
    "Epoch, batch and step of the last checkpoint"
    kept = checkpoint_path(folder, "last").is_file()
    return [read_checkpoint(folder)["progress"][k] if kept else 0 for k in ("epoch", "batch", "step")]


def test_killed_in_the_middle_of_stages(made, processes, tmp_path):
    "Killed three times, each time resumed from another server, of the other layout; the same weights, rows and stage checkpoints"
    one, twelve = made
    files = {p.relative_to(one.parent).as_posix(): p for folder in made for p in folder.iterdir() if p.suffix in (".zip", ".csv", ".txt")}
    (bundle,) = [f"one/{p.name}" for p in one.glob("*.zip")]
    rng, places = random.Random(0), []
    with serving(files, latency=.01, apart=True) as server:
        with running(processes, server.url(bundle), tmp_path/"whole") as child: child.join(600)
        assert child.exitcode == 0
        steps = at(tmp_path/"whole")[2]
        sources = [server.url(bundle), str(twelve), str(one/bundle.split("/")[1])]
        for k, source in enumerate(sources):
            # killed by steps, not by a clock: as often on a slow machine
            with running(processes, source, tmp_path/"killed") as child:
                wanted = int((k + rng.random()) * steps / 3.5)
                while child.is_alive() and at(tmp_path/"killed")[2] < wanted: time.sleep(.005)
                time.sleep(rng.uniform(0, .03))   # in the middle of anything
            places.append(tuple(at(tmp_path/"killed")[:2]))
        with running(processes, server.url(bundle), tmp_path/"killed") as child: child.join(600)
        assert child.exitcode == 0
    print("went on from (epoch, batch)", places)
    assert len(set(places)) > 1
    for which in ("last", "best", *(f"stage-{s}" for s in STAGES)):
        a, b = (read_checkpoint(tmp_path/f, which) for f in ("whole", "killed"))
        for key in ("model", "optimizers"): torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    for name in ("metrics.jsonl", "stages.jsonl"):
        assert clockless(read_metrics(tmp_path/"whole"/name)) == clockless(read_metrics(tmp_path/"killed"/name)), name
    assert not list((tmp_path/"killed").glob("checkpoints/*/.*"))


def test_a_tracker_gets_every_stage(made, tmp_path, monkeypatch):
    "wandb's own `log`, without a network"
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker, seen = wandb.init(mode="offline", dir=tmp_path, project="anomdx", settings=wandb.Settings(console="off")), []
    try:
        table = progressive("nih_stream", changes(str(made[0])), ["ae"], tmp_path/"runs", tell=lambda row: (tracker.log(row), seen.append(dict(row))))
        known = dict(tracker.summary)
    finally: tracker.finish()
    assert [r["stage"] for r in seen] == STAGES == list(table.index) and all(0 <= r["auroc"] <= 1 for r in seen)
    assert {k: known[k] for k in ("stage", "auroc", "images")} == {k: seen[-1][k] for k in ("stage", "auroc", "images")}
    assert list((tmp_path/"wandb").glob("offline-run-*/*.wandb"))


def test_a_second_detector_needs_no_network(made, tmp_path):
    "What the first detector has decoded, the second one reads from the disk"
    (bundle,) = made[0].glob("*.zip")
    with serving({"nih.zip": bundle}) as server:
        stream = changes(server.url("nih.zip"), **{"data.cache": tmp_path/"cache"})
        progressive("nih_stream", stream, ["ae"], tmp_path/"runs")
        server.counts(reset=True)
        progressive("nih_stream", stream, ["ae", "ae_u"], tmp_path/"runs")
        counts = server.counts()
        assert evaluate(tmp_path/"runs"/"ae")["n"] > 50
    assert counts["requests"] <= 6, counts   # the archive is opened, no picture is fetched
    assert set(stage_table({m: tmp_path/"runs"/m for m in ("ae", "ae_u")}).auroc) == {"ae", "ae_u"}
