"""Sources against a hostile world: every fault at p = 0.3, requests that hang, Ctrl-C, and what is left behind.

All traffic stays on the loopback device; every fault comes from a seeded generator."""
import io
import os
import pickle
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from anomdx.loopback import serving
from anomdx.ranges import Halt, HttpSource
from anomdx.streaming import Changed, CorruptMember, Link, RangeUnsupported, StreamError, open_archive
from machine import assert_within


def made(n=40, low=2_000, high=60_000, seed=0):
    dice, file = np.random.default_rng(seed), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(n): z.writestr(f"images/{i:08d}.png", dice.integers(0, 64, dice.integers(low, high), np.uint8).tobytes())
    return file.getvalue()


ARCHIVE = made()
TRUTH = [zipfile.ZipFile(io.BytesIO(ARCHIVE)).read(n) for n in zipfile.ZipFile(io.BytesIO(ARCHIVE)).namelist()]
QUICK = dict(backoff=.001, tries=15, patience=.05, conns=8)


def held():
    "Threads of ours and open sockets of this process"
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try: links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError: pass # the folder's own
    return sum(t.name.startswith("anomdx") for t in threading.enumerate()), sum(x.startswith("socket:") for x in links)


@contextmanager
def nothing_left():
    "No thread and no socket more at the end than at the beginning"
    before = held()
    yield
    end = time.monotonic() + 60   # a busy machine takes its time; what is left behind stays for ever
    while held() > before and time.monotonic() < end: time.sleep(.01)
    assert held() <= before


# Every fault at p = 0.3 ----------------------------------------------------------------------------------------------------------
FINAL = {"no-range": RangeUnsupported, "changed": Changed}
FAULTS = {**{k: {k: .3} for k in ("500", "503", "429", "reset", "truncated", "corrupt", "drip", "no-range", "changed")}, "expired": {},
          "mixed": {k: .06 for k in ("500", "503", "429", "reset", "truncated", "corrupt")}}


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault(kind, tmp_path):
    "Every member is byte-identical, or one clear error says why not; nothing is left behind"
    with nothing_left():
        with serving({"images.zip": ARCHIVE}, apart=True) as server: # in another process, so that all sockets here are ours
            life = .3 if kind == "expired" else 3600
            link = Link(lambda: server.signed("images.zip", life))
            with open_archive(link, cache=tmp_path, **QUICK) as archive:
                server.set(faults=FAULTS[kind], latency=.02)
                if kind == "expired": time.sleep(life)
                stream = archive.reader(gap=0, max_request=1, tries=15)(np.random.default_rng(0).permutation(40))
                if kind in FINAL:
                    with pytest.raises(FINAL[kind], match="images.zip .*(open it again|any more)") as caught: list(stream)
                    assert "X-Goog" not in str(caught.value)
                else: assert all(value == TRUTH[j] for j, value in stream)
                if kind == "expired": assert link.renewals > 0
                else: assert server.counts()["faults"] > (0 if kind in FINAL else 3)
                assert all(f.suffix == ".npz" for f in tmp_path.iterdir())


def test_an_iterator_that_is_left_leaves_nothing():
    with serving({"images.zip": ARCHIVE}, apart=True) as server, nothing_left():
        archive = open_archive(server.url("images.zip"), **QUICK)
        for hang in (0, 600):
            stream = archive.reader(gap=0, max_request=1)(range(40))
            next(stream)
            server.set(latency=hang)
            stream.close()
            end = time.monotonic() + 60
            while held()[0] and time.monotonic() < end: time.sleep(.01)
            assert held()[0] == 0
        archive.close()


# No last bytes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("etag", ["auto", "", 'W/"weak"'])
@pytest.mark.parametrize("status", [200, 400, 405, 416, 500, 501])
def test_a_server_that_knows_no_suffix_range_is_read_from(status, etag, tmp_path):
    "It is asked for its last bytes once; the size comes from its first byte, and no whole body is taken"
    with serving({"images.zip": ARCHIVE}, suffix=status, etag=etag) as server:
        with open_archive(Link(lambda: server.signed("images.zip")), cache=tmp_path, **QUICK) as archive:
            assert [archive.read(j) for j in range(0, 40, 7)] == TRUTH[::7]
            assert archive.source.counts["bytes"] < 1.5 * len(
                ARCHIVE) and archive.source.counts["retries"] == 0
            before = archive.source.counts["requests"]
            assert archive.source.tail(22)[1] == ARCHIVE[-22:] and archive.source.counts[
                "requests"] == before + 2


def test_a_server_of_whole_files_is_said_to_be_one():
    with serving({"images.zip": ARCHIVE}, ranges=False) as server:
        with pytest.raises(RangeUnsupported, match="does not serve byte ranges .it sent all of"):
            open_archive(server.url("images.zip"), **QUICK)


def test_a_suffix_range_refused_and_a_changed_file():
    with serving({"images.zip": ARCHIVE}, suffix=416) as server, open_archive(server.url("images.zip"),
            **QUICK) as archive:
        server.set(etag='"other"')
        with pytest.raises(Changed): archive.source.tail(22)


def test_an_empty_file_is_said_to_be_empty():
    with serving({"images.zip": b""}) as server:
        with pytest.raises(StreamError, match="images.zip is an empty file"):
            open_archive(server.url("images.zip"), **QUICK)


# Slow ------------------------------------------------------------------------------------------------------------------------------

@contextmanager
def ranges(before, context=None):
    "A server of ARCHIVE that calls before(number of the request) first; its port, and an event that is set at the end"
    count, leave, lock = [0], threading.Event(), threading.Lock()
    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm, log_message = "HTTP/1.1", True, lambda *args: None
        def do_GET(self):
            with lock: count[0] += 1; n = count[0]
            before(n)
            a, b = self.headers["Range"][6:].split("-")
            start, stop = (int(a), int(b) + 1) if a else (max(len(ARCHIVE) - int(b), 0), len(ARCHIVE))
            self.send_response(206)
            for k, v in {"Content-Range": f"bytes {start}-{stop - 1}/{len(ARCHIVE)}", "ETag": '"v1"', "Content-Length": stop - start}.items():
                self.send_header(k, str(v))
            self.end_headers()
            self.wfile.write(ARCHIVE[start:stop])
    class Server(ThreadingHTTPServer): request_queue_size, handle_error = 64, lambda *args: None
    server = Server(("127.0.0.1", 0), Handler)
    if context: server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    try: yield server.server_port, leave
    finally:
        leave.set()
        server.shutdown()
        server.server_close()


def test_a_request_that_hangs_is_asked_twice():
    "Two of forty requests hang for good: each costs one more request, and nobody waits for them"
    # answers that a busy machine delays are not asked for twice, as long as it delays them by less
    calm = QUICK | dict(patience=.5)
    with ranges(lambda n: n in (15, 30) and leave.wait(600)) as (port,
            leave), open_archive(f"http://127.0.0.1:{port}/images.zip", **calm) as archive:
        assert all(value == TRUTH[j] for j, value in archive.reader(gap=0, max_request=1)(range(40)))
        assert 2 <= archive.source.counts["hedged"] <= 2 + archive.source.counts["requests"] / 25
        assert archive.source.counts["retries"] == 0


def test_hedging_is_bounded_where_everything_is_slow():
    with serving({"images.zip": ARCHIVE}, latency=.3) as server, open_archive(server.url("images.zip"), **QUICK) as archive:
        assert all(value == TRUTH[j] for j, value in archive.reader(gap=0, max_request=1)(range(40)))
        assert archive.source.counts["hedged"] <= 2 + archive.source.counts["requests"] / 25 + 8 # eight decided at the same time


def test_a_connection_that_the_server_closed_costs_no_attempt():
    source = None
    for _ in range(2): # the second server listens at the same address
        with serving({"a": ARCHIVE}, port=source.link.port if source else 0) as server:
            if source is None:
                source = HttpSource(server.url("a"), tries=1)
                source.link.port = server.port
            assert source.read(5, 50) == ARCHIVE[5:50]
    assert source.counts["retries"] == 0
    source.close()


# TLS ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_over_tls(tmp_path, monkeypatch):
    "Ranges, kept connections, a certificate that nobody vouches for, and a read that is stopped while the server is silent"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path/"key.pem", "-out", tmp_path/"cert.pem", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path/"cert.pem", tmp_path/"key.pem")
    silent = threading.Event()
    with ranges(lambda n: silent.is_set() and leave.wait(600), context) as (port, leave):
        url = f"https://localhost:{port}/images.zip?X-Goog-Signature=5ec2e7"
        with pytest.raises(StreamError, match="images.zip: the certificate .* is not valid") as caught: HttpSource(url).tail(9)
        assert "5ec2e7" not in str(caught.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path/"cert.pem"))
        with open_archive(url, **QUICK) as archive:
            for _ in range(2): assert all(value == TRUTH[j] for j, value in archive.reader(gap=0, max_request=1)(range(40)))
            halt = Halt()
            silent.set()
            threading.Timer(.2, halt.set).start()
            # not "no answer", after 20 s
            with pytest.raises(StreamError, match="stopped"): archive.source.read(0, 9, halt)


# Ctrl-C ------------------------------------------------------------------------------------------------------------------------------
SCRIPT = """
import sys
from anomdx.loopback import serving
from anomdx.streaming import open_archive
sys.path.insert(0, {tests!r})
from test_sources import ARCHIVE, Members
if {workers} >= 0: import torch.utils.data as data
with serving({{"images.zip": ARCHIVE}}) as server:
    archive = open_archive(server.url("images.zip"), conns=8, patience=60)
    server.set({fault})
    members = Members(archive)
    if {workers} >= 0: members = data.DataLoader(type("Set", (Members, data.IterableDataset), {{}})(archive), batch_size=None, num_workers={workers})
    print("reading", flush=True)
    for _ in members: pass
"""
IDLE = "import time{torch}; print('reading', flush=True); time.sleep(60)"


class Members:
    "An iterable data set; torch's base class only adds a type"
    def __init__(self, archive): self.archive = archive
    def __iter__(self): return (len(value) for _, value in self.archive.reader(gap=0, max_request=1)(range(40)))


def interrupted(script, wait):
    "Seconds that a process takes to end after Ctrl-C, which a terminal sends to all its children, too"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "reading\n"
    time.sleep(wait)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert "KeyboardInterrupt" in said and process.returncode != 0
    return time.monotonic() - start


@pytest.mark.parametrize("fault", ["latency=600", "faults={'drip': 1.}"])
@pytest.mark.parametrize("workers", [-1, 0, 2])
def test_ctrl_c_ends_the_process(fault, workers):
    "Within a second of what a process that only sleeps needs (torch alone takes most of one), in the main thread and in workers"
    script = SCRIPT.format(tests=os.path.dirname(__file__), fault=fault, workers=workers)
    idle = IDLE.format(torch=", torch.utils.data" if workers >= 0 else "")
    assert_within(1, lambda: interrupted(script, .7) - interrupted(idle, 0))


# Joined ------------------------------------------------------------------------------------------------------------------------------
def test_several_archives_over_http_and_from_disk(tmp_path):
    other = made(30, seed=1)
    (tmp_path/"b.zip").write_bytes(other)
    truth = TRUTH + [zipfile.ZipFile(io.BytesIO(other)).read(n) for n in zipfile.ZipFile(io.BytesIO(other)).namelist()]
    with serving({"a.zip": ARCHIVE}) as server, open_archive([server.url("a.zip"), tmp_path/"b.zip"], cache=tmp_path/"kept", **QUICK) as archive:
        assert len(archive) == 70 and [archive.part(j) for j in (0, 39, 40, 69)] == [0, 0, 1, 1]
        for options in ({}, dict(gap=1 << 20, max_request=1 << 30), dict(budget=70_000)): # the second joins across the border
            for ids in (np.random.default_rng(3).permutation(70), range(70)):
                assert all(value == truth[j] for j, value in pickle.loads(pickle.dumps(archive)).reader(**options)(ids))
        assert archive.find("images/00000029.png") == 69 # the last of that name
        before = archive.etag
        (tmp_path/"b.zip").write_bytes(other + b"!")
        with pytest.raises(Changed, match="b.zip"): list(pickle.loads(pickle.dumps(archive)).reader()([45]))
        with pytest.raises(CorruptMember): open_archive([server.url("a.zip"), tmp_path/"b.zip"], **QUICK)
        (tmp_path/"b.zip").write_bytes(made(30, seed=2))
        assert open_archive([server.url("a.zip"), tmp_path/"b.zip"], cache=tmp_path/"kept").etag != before


def test_twelve_archives_of_one_host_share_their_connections():
    with nothing_left(), serving({f"{k}.zip": made(8, 500, 3000, seed=k) for k in range(12)}, apart=True, latency=.005) as server:
        before = held()[1]
        with open_archive([server.url(f"{k}.zip") for k in range(12)], **QUICK) as archive:
            for copy in (archive, pickle.loads(pickle.dumps(archive))):
                assert len(list(copy.reader(gap=0, max_request=1)(np.random.default_rng(0).permutation(96)))) == 96
                assert 0 < held()[1] - before <= QUICK["conns"] * (1 + (copy is not archive))
            copy.close()


def test_no_secret_in_names_or_files(tmp_path):
    with serving({"a.zip": ARCHIVE}) as server:
        links = [Link(lambda: server.signed("a.zip")), server.signed("a.zip")]
        with open_archive(links, cache=tmp_path) as archive:
            kept = b"".join(f.read_bytes() for f in tmp_path.iterdir()) + repr([f.name for f in tmp_path.iterdir()]).encode()
            for text in (archive.name, repr(archive), str(archive.etag)): assert "X-Goog" not in text
            assert b"X-Goog" not in kept
