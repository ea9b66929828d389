"""Streaming against a hostile world: faults of every kind, random and malicious archives, forks, an archive larger than any disk here.

All traffic stays on the loopback device; every fault comes from a seeded generator."""
import bisect
import io
import multiprocessing
import pickle
import random
import re
import struct
import subprocess
import sys
import threading
import time
import traceback
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from anomdx.streaming import (Changed, CorruptMember, FileSource, HttpSource, Link, MemberReader, RangeUnsupported, StreamError,
                              ZipIndex)

SECRET = "5ec2e7"


# A server that misbehaves ------------------------------------------------------------------------------------------------------
class Bytes:
    "A body held in memory"
    def __init__(self, data): self.data, self.size = data, len(data)
    def read(self, start, stop): return self.data[start:stop]


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, log_message = "HTTP/1.1", True, lambda *args: None

    def do_GET(self):
        s = self.server
        with s.lock:
            s.requests += 1
            fault = s.fault(s) if callable(s.fault) else s.fault if s.dice.random() < s.p else ""
            if fault: s.hits += 1
        if s.key and f"key={s.key}" not in self.path: return self.answer(s.refusal, b"<Code>ExpiredToken</Code>")
        if fault.isdecimal(): return self.answer(int(fault), b"no", {"Retry-After": s.after} if s.after else {})
        if fault == "loop": return self.answer(302, b"", {"Location": self.path})
        m = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not m or fault == "no range": return self.answer(200, s.body.read(0, s.body.size), fault=fault)
        start, stop = (int(m[1]), min(int(m[2]) + 1, s.body.size)) if m[1] else (max(s.body.size - int(m[2]), 0), s.body.size)
        if start >= s.body.size: return self.answer(416, b"")
        if s.etag and self.headers.get("If-Range", s.etag) != s.etag: return self.answer(200, b"another file")
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{s.body.size}", **({"ETag": s.etag} if s.etag else {})}
        if fault == "shift": headers["Content-Range"] = f"bytes {start + 1}-{stop}/{s.body.size}"
        if fault == "gzip": headers["Content-Encoding"] = "gzip"
        if fault == "multipart": headers = {"Content-Type": "multipart/byteranges; boundary=x"}
        self.answer(206, s.body.read(start, stop), headers, fault)

    def answer(self, status, body, headers={}, fault=""):
        self.send_response(status)
        for k, v in {**headers, "Content-Length": len(body)}.items(): self.send_header(k, str(v))
        self.end_headers()
        if fault == "corrupt" and len(body) > 100: body = body[:90] + bytes(x ^ 255 for x in body[90:99]) + body[99:]
        if fault == "drip": return self.drip(body)
        self.wfile.write(body[:len(body) // 2] if fault in ("cut", "reset") else body)
        if fault == "reset": self.connection.setsockopt(1, 13, struct.pack("ii", 1, 0)) # SO_LINGER 0: close sends RST
        self.close_connection = fault in ("cut", "reset")

    def drip(self, body):
        for i in range(min(len(body), 100)):
            self.wfile.write(body[i:i + 1])
            time.sleep(.05)


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads, handle_error = 128, True, lambda *args: None
    fault, p, key, refusal, after, etag, hits, requests = "", 1.0, "", 400, "", '"v1"', 0, 0

    def url(self): return f"http://127.0.0.1:{self.server_port}/images.zip?key={self.key}&signature={SECRET}"


@contextmanager
def serving(body, **options):
    server = Server(("127.0.0.1", 0), Handler)
    server.body, server.lock, server.dice = Bytes(body) if isinstance(body, bytes) else body, threading.Lock(), random.Random(7)
    for k, v in options.items(): setattr(server, k, v)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    try: yield server
    finally:
        server.shutdown()
        server.server_close()


def archive(n=40, low=2_000, high=60_000, seed=0):
    dice, file = np.random.default_rng(seed), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(n): z.writestr(f"images/{i:08d}.png", dice.integers(0, 64, dice.integers(low, high), np.uint8).tobytes())
    return file.getvalue()


ARCHIVE = archive()
TRUTH = {n: zipfile.ZipFile(io.BytesIO(ARCHIVE)).read(n) for n in zipfile.ZipFile(io.BytesIO(ARCHIVE)).namelist()}


def source_of(server, **options): return HttpSource(server.url(), **{"backoff": .001, "tries": 12, **options})


def check(reader, truth=TRUTH, seed=0):
    "Every member, in random order and with one id twice, is what zipfile reads"
    ids = np.random.default_rng(seed).permutation(len(truth)).tolist()
    got = list(reader([*ids, ids[0]]))
    assert [j for j, _ in got] == [*ids, ids[0]]
    assert all(value == truth[reader.index.name(j)] for j, value in got)


def disk(tmp_path, data):
    path = tmp_path/"a.zip"
    path.write_bytes(data)
    return FileSource(path)


# Faults --------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "cut", "corrupt"])
def test_faults(fault):
    with serving(ARCHIVE, fault=fault, p=.3, after="0" if fault == "429" else "") as server:
        source = source_of(server)
        while True: # the directory has no checksum of its own: a flipped byte in it is found as a broken member
            try: check(MemberReader(source, conns=8, gap=0, max_request=1, tries=12)); break
            except CorruptMember: assert fault == "corrupt"
        assert server.hits > 5
        if fault in ("cut", "reset"): assert source.counts["resumed"] > 3


def test_all_faults_together():
    kinds = ["500", "503", "429", "reset", "cut", "corrupt"]
    with serving(ARCHIVE) as server:
        index = ZipIndex.open(source_of(server))
        server.fault = lambda s: s.dice.choice(kinds) if s.dice.random() < .3 else ""
        for gap, budget in ((0, 128 << 20), (1 << 16, 200_000)): check(MemberReader(source_of(server), index, budget, 8, gap=gap, tries=12))


def test_resuming_costs_no_more_bytes_than_were_lost():
    with serving(ARCHIVE) as server:
        source = source_of(server)
        reader = MemberReader(source, gap=0, max_request=1)
        before, server.fault, server.p = source.counts["bytes"], "cut", .3
        check(reader)
        fetched, packed = source.counts["bytes"] - before, int(reader.index.members["packed"].sum())
        assert source.counts["resumed"] > 5
        assert fetched < 1.06 * packed + 60_000 # + the id that comes twice


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_a_refusal_is_final(status):
    with serving(ARCHIVE, fault=status) as server, pytest.raises(StreamError, match=f"HTTP {status}"):
        source_of(server).tail(100)
    assert server.requests == 1


@pytest.mark.parametrize("refusal", [400, 403])
def test_links_that_expire(refusal):
    "The key changes every nine requests, while sixteen threads read"
    keys, asked = iter(range(1000)), Counter()
    def expire(s):
        if s.requests % 9 == 0: s.key = f"k{next(keys)}."
        return ""
    with serving(ARCHIVE, key="k.", refusal=refusal) as server:
        index = ZipIndex.open(source_of(server))
        def resolve():
            asked["times"] += 1
            return server.url()
        source, server.fault = HttpSource(Link(resolve), backoff=.001), expire
        check(MemberReader(source, index, conns=4, gap=0, max_request=1))
        assert 2 < source.link.renewals == asked["times"] - 1 < 20


def test_a_link_that_stays_expired():
    with serving(ARCHIVE, key="never", refusal=403) as server:
        link = Link(lambda: server.url().replace("never", "old"))
        with pytest.raises(StreamError, match="HTTP 403"): HttpSource(link).tail(9)
        assert server.requests == 4 and link.renewals == 3


def test_a_resolver_that_fails_twice():
    tries = []
    with serving(ARCHIVE) as server:
        def resolve():
            tries.append(1)
            if len(tries) < 3: raise ConnectionError("no route")
            return server.url()
        assert HttpSource(Link(resolve), backoff=.001).tail(22)[1] == ARCHIVE[-22:]
        tries.clear()
        with pytest.raises(StreamError, match="an address not yet known: gave up after 2"): HttpSource(Link(resolve), backoff=.001, tries=2).tail(9)


def test_a_replaced_file_is_noticed():
    other = archive(seed=1)
    for change in (dict(etag='"v2"'), dict(body=Bytes(other)), dict(body=Bytes(other), etag=None), dict(body=Bytes(ARCHIVE[:5000]))):
        with serving(ARCHIVE) as server:
            reader = MemberReader(source_of(server), conns=2, gap=0, max_request=1)
            for k, v in change.items(): setattr(server, k, v)
            with pytest.raises(Changed, match="open it again"): check(reader)


@pytest.mark.parametrize("fault, error", [("shift", StreamError), ("gzip", StreamError), ("multipart", StreamError), ("loop", StreamError),
                                          ("no range", RangeUnsupported)])
def test_answers_that_cannot_be_used(fault, error):
    with serving(ARCHIVE, fault=fault) as server:
        with pytest.raises(error) as caught: source_of(server).tail(1000)
        assert server.requests == {"loop": 6, "shift": 2, "no range": 2}.get(fault, 1)   # 2: the size was asked for in another way
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_no_message_shows_the_signature():
    said = []
    for fault in ("404", "500", "cut", "reset", "403", "drip"):
        with serving(ARCHIVE, fault=fault) as server:
            with pytest.raises(StreamError) as caught: source_of(server, tries=1, deadline=.3).tail(1000)
            said.append("".join(traceback.format_exception(caught.value)))
    with pytest.raises(StreamError) as caught: source_of(server, tries=2).tail(1000) # nobody listens there any more
    said.append("".join(traceback.format_exception(caught.value)))
    assert not any(SECRET in s for s in said) and all("images.zip" in s for s in said)


def test_a_dripping_server_meets_the_deadline():
    with serving(ARCHIVE, fault="drip") as server:
        with pytest.raises(StreamError, match="of 1000 bytes came in time"): source_of(server, deadline=.4).tail(1000)


def test_retry_after_beyond_the_deadline_is_not_waited_for():
    with serving(ARCHIVE, fault="503", after="3600") as server:
        start = time.monotonic()
        with pytest.raises(StreamError, match="HTTP 503"): source_of(server).tail(9)
        assert time.monotonic() - start < 60   # of the hour that the server asks for


def test_leaving_early_stops_the_threads():
    with serving(ARCHIVE) as server:
        reader = MemberReader(source_of(server, backoff=100.), conns=8, gap=0, max_request=1)
        stream = reader(range(40))
        next(stream)
        server.fault = "503"
        stream.close()
        left = lambda: [t.name for t in threading.enumerate() if t.name.startswith("anomdx-fetch")]
        end = time.monotonic() + 10   # they would be trying again for many minutes
        while left() and time.monotonic() < end: time.sleep(.01)
        assert not left()


def test_random_state_is_left_alone():
    random.seed(3); np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    with serving(ARCHIVE, fault="503", p=.3) as server: check(MemberReader(source_of(server)))
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


# Memory and order ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [1, 70_000, 300_000, 5_000_000])
def test_the_budget_is_kept(tmp_path, budget):
    source = disk(tmp_path, ARCHIVE)
    index = ZipIndex.open(source)
    alone = int((index.members["size"] + index.members["end"] - index.members["offset"]).max())
    for order in (np.arange(40), np.random.default_rng(budget).permutation(40), np.zeros(30, int)):
        reader = MemberReader(source, index, budget)
        assert [j for j, _ in reader(order)] == order.tolist()
        assert reader.last_budget.peak <= max(budget, alone) and reader.last_budget.used == 0


def test_decoding_in_threads(tmp_path):
    reader, here = MemberReader(disk(tmp_path, ARCHIVE), decode_threads=3, decoded_bytes=1 << 20, budget=8 << 20), threading.get_ident()
    got = list(reader(range(40), lambda data: (zlib.crc32(data), threading.get_ident() != here)))
    assert [v for _, v in got] == [(zlib.crc32(v), True) for v in TRUTH.values()]
    assert reader.last_budget.peak <= 8 << 20
    with pytest.raises(ZeroDivisionError): list(reader([0, 1], lambda data: 1 // 0))


def test_neighbours_share_requests():
    with serving(ARCHIVE) as server:
        source = source_of(server)
        reader = MemberReader(source, max_request=300_000)
        before = source.counts["requests"]
        assert len(list(reader(range(40)))) == 40
        assert source.counts["requests"] - before <= 40 // 6 + 1


# Processes -----------------------------------------------------------------------------------------------------------------------
def read_some(reader, ids, queue): queue.put([(j, zlib.crc32(v)) for j, v in reader(ids)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods(): pytest.skip(f"no {method} here")
    context = multiprocessing.get_context(method)
    with serving(ARCHIVE) as server:
        for source in (source_of(server), disk(tmp_path, ARCHIVE)):
            reader = MemberReader(source, conns=4)
            check(reader)                    # its sockets, locks and files are in use before the copy is made
            queue = context.Queue()
            workers = [context.Process(target=read_some, args=(reader, list(range(k, 40, 2)), queue)) for k in range(2)]
            for w in workers: w.start()
            got = queue.get(timeout=300) + queue.get(timeout=300)
            for w in workers: w.join()
            check(reader)
            assert dict(got) == {j: zlib.crc32(v) for j, v in enumerate(TRUTH.values())}


def test_the_module_is_light():
    code = "import sys, anomdx.streaming; print([m for m in ('torch', 'monai', 'pandas', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_kept_index_is_only_used_for_the_same_file(tmp_path):
    cache = tmp_path/"index.npz"
    with serving(ARCHIVE) as server:
        ZipIndex.open(source_of(server), cache)
        for etag, kept in (('"v1"', True), ('"v2"', False), (None, False)): # without an ETag nothing proves that the file is the same
            server.etag, source = etag, source_of(server)
            index = ZipIndex.open(source, cache)
            assert (source.counts["bytes"] < 22) == kept
            check(MemberReader(source, index))
    assert list(tmp_path.iterdir()) == [cache]


# Larger than the disk ------------------------------------------------------------------------------------------------------------
class VirtualZip:
    "An archive over 4 GB of which only the directory and a few payloads exist"
    def __init__(self, n, payloads):
        self.starts, self.parts, entries, at = [], [], [], 0
        for i in range(n):
            name, data = f"images_{i * 12 // n + 1:03d}/images/{i:08d}_000.png".encode(), payloads[i % len(payloads)]
            head = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name), 0) + name
            extra = struct.pack("<HHQ", 1, 8, at) if at >= 0xffffffff else b""
            entries.append(struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name), len(extra),
                                       0, 0, 0, 0, min(at, 0xffffffff)) + name + extra)
            for part in (head, data): self.starts.append(at); self.parts.append(part); at += len(part)
        directory = b"".join(entries)
        wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, len(directory), at)
        end = struct.pack("<4sIQI", b"PK\6\7", 0, at + len(directory), 1) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
        self.starts.append(at); self.parts.append(directory + wide + end)
        self.size = at + len(self.parts[-1])

    def read(self, start, stop):
        out, i = [], bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            at = start - self.starts[i]
            out.append(self.parts[i][at:at + stop - start])
            start, i = start + len(out[-1]), i + 1
        return b"".join(out)


def test_six_gigabytes_without_a_disk():
    dice = random.Random(0)
    payloads = [dice.randbytes(395_000 + k) for k in range(16)]
    virtual = VirtualZip(15_500, payloads)
    assert virtual.size > 6e9
    with serving(virtual) as server:
        source = source_of(server)
        index = ZipIndex.open(source)
        assert len(index) == len(index.select()) == 15_500 and source.counts["requests"] <= 2
        assert len(index.select(prefix="images_012/")) in range(1285, 1297)
        ids = np.append(np.random.default_rng(0).permutation(15_500)[:60], 15_499)
        reader, before = MemberReader(source, index, budget=16 << 20, conns=16), source.counts["bytes"]
        assert all(v == payloads[j % 16] for j, v in reader(ids))
        assert reader.last_budget.peak <= 16 << 20
        assert source.counts["bytes"] - before < 1.01 * index.members["packed"][ids].sum()
        assert len(pickle.dumps(index)) < 3e6
