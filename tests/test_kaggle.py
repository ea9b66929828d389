"""Kaggle's three own clients and ours, against one Kaggle-shaped server on this machine: the same answers, and no secret where it does not belong.

The clients run in processes of their own, with an empty home, and are pointed at the server by the table of addresses in `kagglesdk`."""
import importlib.util
import json
import logging
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import zipfile
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pandas as pd
import pytest

from anomdx import kaggle
from anomdx.config import ConfigError
from anomdx.datasets import check_table
from anomdx.kaggle import (NIH_KAGGLE, Answer, Credentials, KaggleStreamClient, NotFound, ask, check_credentials, find_credentials, kaggle_address,
                           kaggle_files, kaggle_link, kaggle_source, nih_table, open_nih)
from anomdx.loopback import serving
from anomdx.made_nih import write_nih
from anomdx.sources import HttpSource, StreamError, plain_url

SECRET = "5ec2e7"
TOKEN = f"KGAT_{SECRET}"
LOGINS = (f"Bearer {TOKEN}", "Basic dGVzdGVyOjVlYzJlNw==")   # tester:5ec2e7
needs = {name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}, Kaggle's own client (pip install kaggle kagglehub)")
         for name in ("kaggle", "kagglesdk", "kagglehub")}
KINDS = {"kaggle.json": "key", "key": "key", "token": "token", "token file": "token", "token path": "token", "token and key": "token", "anonymous": "anonymous"}


@pytest.fixture(scope="module")
def nih(tmp_path_factory):
    "NIH as it was uploaded (twelve ZIPs), and as one bundle"
    root = tmp_path_factory.mktemp("nih")
    return write_nih(root/"parts", 48, 64, bundle=False), write_nih(root/"bundle", 48, 64)


@pytest.fixture(scope="module")
def server(nih):
    files = {p.name: p for folder in nih for p in folder.iterdir() if p.suffix != ".json"}
    with serving(files, logins=LOGINS) as server: yield server


def environment(kind, home, **more):
    "What a user has set, and the files in the home folder"
    (home/".kaggle").mkdir(exist_ok=True)
    def secret(name, text):
        (home/".kaggle"/name).write_text(text)
        (home/".kaggle"/name).chmod(0o600)
        return str(home/".kaggle"/name)
    own = {"kaggle.json": lambda: secret("kaggle.json", json.dumps(dict(username="tester", key=SECRET))) and {},
           "key": lambda: dict(KAGGLE_USERNAME="tester", KAGGLE_KEY=SECRET), "token": lambda: dict(KAGGLE_API_TOKEN=TOKEN),
           "token file": lambda: secret("access_token", f"{TOKEN}\n") and {}, "token path": lambda: dict(KAGGLE_API_TOKEN=secret("mine", TOKEN)),
           "token and key": lambda: secret("kaggle.json", json.dumps(dict(username="tester", key="wrong"))) and dict(KAGGLE_API_TOKEN=TOKEN),
           "anonymous": dict}[kind]()
    return dict(HOME=str(home), USERPROFILE=str(home), PATH=os.environ["PATH"], KAGGLEHUB_CACHE=str(home/"cache")) | own | more


def as_user(kind, home, **more): return patch.dict(os.environ, environment(kind, home, **more), clear=True)

POINTED = """
import contextlib, json, os, sys, tempfile
import kagglesdk.kaggle_env as k
for e in (k.KaggleEnv.LOCAL, k.KaggleEnv.TEST): k._env_to_endpoint[e] = os.environ["SERVER"]
out, sys.stdout = sys.stdout, sys.stderr
def tell(**facts): print(json.dumps(facts), file=out)
"""


def their_client(script, kind, home, server, **more):
    "What a script with one of Kaggle's clients tells, and how it logged in"
    server.control(reset=True)
    done = subprocess.run([sys.executable, "-c", POINTED + script],
                          env=environment(kind, home, SERVER=server.api, **more), capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), [(line["path"], line["login"]) for line in server.log()]


def logins(calls):
    "How Kaggle, and how the storage, were asked"
    return ({login for path, login in calls if "/DatasetApiService/" in path.replace(".DatasetApiService", "/DatasetApiService")},
            {login for path, login in calls if path.startswith("/signed/")})


# The same answers as Kaggle's own clients --------------------------------------------------------------------------------------
KAGGLE_API = """
import kaggle
api = kaggle.KaggleApi(); api.authenticate()
files = [(f.name, f.total_bytes) for f in api.dataset_list_files("nih-chest-xrays/data", page_size=50).files]
with tempfile.TemporaryDirectory() as folder:
    api.dataset_download_file("nih-chest-xrays/data", "images_001.zip", path=folder)
    size = os.path.getsize(os.path.join(folder, "images_001.zip"))
tell(files=files, size=size, method=api.get_config_value("auth_method"))
"""


@needs["kaggle"]
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "anonymous"])
def test_kaggle_api(kind, nih, server, tmp_path):
    theirs, calls = their_client(KAGGLE_API, kind, tmp_path, server, KAGGLE_API_ENVIRONMENT="LOCALHOST")
    with as_user(kind, tmp_path):
        who = find_credentials()
        assert who.kind == KINDS[kind] == {"LEGACY_API_KEY": "key", "ACCESS_TOKEN": "token"}[theirs["method"]]
        server.control(reset=True)
        assert [[f.name, f.size] for f in kaggle_files(endpoint=f"{server.api}/api")] == theirs["files"]
        source = HttpSource(kaggle_link(file="images_001.zip", endpoint=f"{server.api}/api"))
        with closing(source): source.tail(1)
    assert source.size == theirs["size"] == (nih[0]/"images_001.zip").stat().st_size
    assert logins(calls) == logins([(line["path"], line["login"]) for line in server.log()]) == ({"Basic" if who.kind == "key" else "Bearer"}, {""})


KAGGLESDK = """
from kagglesdk import KaggleClient
from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest
q = ApiDownloadDatasetRequest(); q.owner_slug, q.dataset_slug, q.file_name = "nih-chest-xrays", "data", "images_001.zip"
with KaggleClient() as client:
    r = client.datasets.dataset_api_client.download_dataset(q)
    tell(url=r.url.partition("?")[0], size=int(r.headers["Content-Length"])); r.close()
"""


@needs["kagglesdk"]
@pytest.mark.parametrize("kind", ["kaggle.json", "token", "anonymous"])
def test_kagglesdk(kind, nih, server, tmp_path):
    if kind == "anonymous": server.set(logins=[])
    try: theirs, calls = their_client(KAGGLESDK, kind, tmp_path, server, KAGGLE_API_ENVIRONMENT="TEST")
    finally: server.set(logins=list(LOGINS))
    with as_user("token", tmp_path): assert plain_url(kaggle_address(NIH_KAGGLE, "images_001.zip", None, None, f"{server.api}/api")) == theirs["url"]
    assert theirs["size"] == (nih[0]/"images_001.zip").stat().st_size
    assert logins(calls) == ({{"kaggle.json": "Basic", "token": "Bearer", "anonymous": ""}[kind]}, {""})


KAGGLEHUB = """
import kagglehub
path = kagglehub.dataset_download("nih-chest-xrays/data", path="test_list.txt")
tell(text=open(path).read())
"""


@needs["kagglehub"]
@pytest.mark.parametrize("kind", ["key", "token", "anonymous"])
def test_kagglehub(kind, server, tmp_path):
    if kind == "anonymous": server.set(logins=[])
    try:
        theirs, _ = their_client(KAGGLEHUB, kind, tmp_path, server, KAGGLE_API_ENVIRONMENT="TEST")
        with as_user(kind, tmp_path): ours = open_nih("kaggle", stages=[1], endpoint=f"{server.api}/api")
    finally: server.set(logins=list(LOGINS))
    assert ours.texts["test"].decode() == theirs["text"]


@needs["kagglesdk"]
def test_without_a_patch(nih, tmp_path):
    "KAGGLE_API_ENVIRONMENT=TEST means http://localhost:7777 to kagglesdk, and to us"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 7777)) == 0: pytest.skip("port 7777 is in use")
    env = environment("token", tmp_path, KAGGLE_API_ENVIRONMENT="TEST")
    unpatched = "".join(line for line in POINTED.splitlines(True) if "_env_to_endpoint" not in line)
    with serving({"images_001.zip": nih[0]/"images_001.zip"}, port=7777, logins=LOGINS) as server:
        done = subprocess.run([sys.executable, "-c", unpatched + KAGGLESDK], env=env, capture_output=True,
                              text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        with patch.dict(os.environ, env, clear=True): ours = plain_url(kaggle_link(file="images_001.zip").get())
    assert ours == json.loads(done.stdout)["url"] == server.url("signed/images_001.zip")


# A sign-in in the browser ------------------------------------------------------------------------------------------------------
class SignIn(BaseHTTPRequestHandler):
    "Renews a sign-in, and lets only the newest token in"
    log_message = lambda *args: None
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        method, s = self.path.rpartition("/")[2], self.server
        s.calls.append(method)
        if method == "GenerateAccessToken" and asked["refreshToken"] == SECRET:
            s.token = f"KGAT_new{len(s.calls)}"
            return self.answer(200, dict(token=s.token, expiresIn=43200, username="tester"))
        if self.headers.get("Authorization") == f"Bearer {s.token}": return self.answer(302, {}, f"http://127.0.0.1:{s.server_port}/images_001.zip?key={SECRET}")
        self.answer(401, dict(code=401, message=f"Unauthenticated {SECRET}"))

    def answer(self, status, tree, location=""):
        body = json.dumps(tree).encode()
        self.send_response(status)
        for k, v in {"Content-Type": "application/json", "Content-Length": str(len(body)), **({"Location": location} if location else {})}.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(body)


@needs["kagglesdk"]
@pytest.mark.parametrize("state", ["expired", "withdrawn", "refused"])
def test_oauth(state, tmp_path):
    import kagglesdk.kaggle_env as env
    server = ThreadingHTTPServer(("127.0.0.1", 0), SignIn)
    server.calls, server.token = [], "KGAT_unknown"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    later = "2000-01-01T00:00:00+00:00" if state == "expired" else "2100-01-01T00:00:00+00:00"
    try:
        with as_user("anonymous", tmp_path, KAGGLE_API_ENVIRONMENT="TEST"), patch.dict(env._env_to_endpoint, {env.KaggleEnv.TEST: place}):
            file = tmp_path/".kaggle"/"credentials.json"
            file.write_text(json.dumps(dict(refresh_token="wrong" if state == "refused" else SECRET, access_token="KGAT_old", access_token_expiration=later)))
            file.chmod(0o600)
            link = kaggle_link(file="images_001.zip", endpoint=f"{place}/api")
            assert find_credentials().kind == "oauth"
            if state == "refused":
                with pytest.raises(StreamError, match="did not renew the sign-in in .*credentials.json") as error: link.get()
                assert SECRET not in str(error.value)
            else:
                assert plain_url(link.get()) == f"{place}/images_001.zip"
                assert json.loads(file.read_text())["access_token"] == server.token                   # kept for the next process
                assert server.calls == ["GenerateAccessToken", "DownloadDataset"][:2] if state == "expired" else server.calls == ["DownloadDataset", "GenerateAccessToken", "DownloadDataset"]
    finally: server.shutdown(); server.server_close()


# What goes wrong ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more, told", [(dict(KAGGLE_API_TOKEN=f"KGAT_wrong{SECRET}"), "the token in KAGGLE_API_TOKEN (HTTP 401); make a new one"),
                                        (dict(KAGGLE_USERNAME="tester", KAGGLE_KEY=f"wrong{SECRET}"), "the key in KAGGLE_KEY (HTTP 401); make a new one"),
                                        ({}, "no credentials (HTTP 401); set KAGGLE_API_TOKEN or save a kaggle.json")],
                         ids=["token", "key", "nobody"])
def test_wrong_credentials(more, told, server, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with as_user("anonymous", tmp_path, **more), pytest.raises(StreamError) as error: open_nih("kaggle", endpoint=f"{server.api}/api")
    assert told in str(error.value) and "\n" not in str(error.value)
    with as_user("anonymous", tmp_path, **more): rows = check_credentials(f"{server.api}/api", server.api)
    assert told in rows[0].status
    assert SECRET not in str(error.value) + caplog.text + str(rows)


@pytest.mark.parametrize("text", [f'{{"username": "tester", "key": {SECRET}', f'["{SECRET}"]', f'{{"username": "tester", "key": ["{SECRET}"]}}', f"{SECRET}\xff"], ids=range(4))
def test_malformed_key(text, tmp_path, caplog):
    with as_user("kaggle.json", tmp_path):
        (tmp_path/".kaggle"/"kaggle.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match="kaggle.json") as error: find_credentials()
        assert check_credentials("http://127.0.0.1:9", "http://127.0.0.1:9")[0].found == "unusable"
    assert SECRET not in str(error.value) + caplog.text and "\n" not in str(error.value)


@pytest.mark.parametrize("token", [f"{SECRET}\r\nHost: x", f"{SECRET} ", f"{SECRET} a", f"{SECRET}é", "/" * 5000 + SECRET], ids=range(5))
def test_odd_tokens(token, server, tmp_path, caplog):
    "A token that would break a header, or a path, is refused without being shown"
    caplog.set_level(logging.DEBUG)
    with as_user("anonymous", tmp_path, KAGGLE_API_TOKEN=token), pytest.raises((ConfigError, StreamError), match="KAGGLE_API_TOKEN") as error:
        kaggle_files(endpoint=f"{server.api}/api")
    assert SECRET not in str(error.value) + caplog.text and "\n" not in str(error.value)


def test_readable_key(server, tmp_path, caplog):
    if os.name != "posix": pytest.skip("needs file modes")
    with as_user("kaggle.json", tmp_path):
        (tmp_path/".kaggle"/"kaggle.json").chmod(0o644)
        row = check_credentials(f"{server.api}/api", server.api)[0]
    assert "can be read; other users can read the file, chmod 600" in row.status and "chmod 600" in caplog.text and SECRET not in caplog.text


def test_busy(tmp_path):
    "429 and 5xx are asked again; a server that stays busy is one error"
    with serving({f"{k}.zip": b"" for k in range(9)}, api_faults={"429": .3, "503": .3}, page=2, seed=5) as server, as_user("anonymous", tmp_path):
        assert len(kaggle_files(endpoint=f"{server.api}/api")) == 9
        assert {200} < {line["status"] for line in server.log()} <= {200, 429, 503}
        server.set(api_faults={"503": 1})
        with patch.object(kaggle, "time", SimpleNamespace(sleep=lambda s: None)), pytest.raises(StreamError, match=r"could not be asked \(HTTP 503, 5 times\)"): kaggle_files(endpoint=f"{server.api}/api")


def test_retry_after():
    "A server says how long to wait; an hour is too long"
    slept, answers = [], iter([Answer(429, {"Retry-After": "7"}, b""), Answer(503, {}, b""), Answer(200, {}, b"{}"), Answer(429, {"Retry-After": "3600"}, b"")])
    with patch.object(kaggle, "ask_once", lambda *args: next(answers)), patch.object(kaggle, "time", SimpleNamespace(sleep=slept.append)):
        assert ask("GET", "http://a.org/x", {}).status == 200 and slept == [7, .6]
        with pytest.raises(StreamError, match=r"http://a.org/x could not be asked \(HTTP 429, 1 times\)"): ask("GET", f"http://a.org/x?{SECRET}", {})


@pytest.mark.parametrize("answer, error, told", [
    (Answer(302, {"Location": "http://storage.example/x"}, b""), StreamError, "which is not safe"),
    (Answer(302, {"Location": "https://www.kaggle.com/account/login?x"}, b""), StreamError, "HTTP 403"),
    (Answer(200, {}, b'{"code": 403, "message": "no"}'), StreamError, "accept the rules at https://www.kaggle.com/datasets/nih-chest-xrays/data"),
    (Answer(200, {}, b"the file itself"), StreamError, "HTTP 403"),
    (Answer(404, {}, b""), NotFound, "images_001.zip of nih-chest-xrays/data")])
def test_refusals(answer, error, told, tmp_path):
    with as_user("anonymous", tmp_path), patch.object(kaggle, "ask", lambda *args, **options: answer), pytest.raises(error, match=told):
        kaggle_link(file="images_001.zip", endpoint="https://api.example").get()


def test_refusal_with_status_200(tmp_path):
    "Some refusals come with status 200 and a code in the body; an empty listing they are not"
    answer = Answer(200, {}, b'{"code": 403, "message": "no"}')
    with as_user("anonymous", tmp_path), patch.object(kaggle, "ask", lambda *args, **options: answer), pytest.raises(StreamError, match="HTTP 403"): kaggle_files()


def test_cut_answer(tmp_path):
    "An answer that ends early is asked for again, and never taken for a whole one"
    class Cut(BaseHTTPRequestHandler):
        log_message = lambda *args: None
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * (50 if self.server.left else 100))
            self.server.left -= 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cut)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        server.left = 1
        assert ask("GET", f"http://127.0.0.1:{server.server_port}/", {}).body == b"x" * 100
        server.left = 9
        with pytest.raises(StreamError, match=r"IncompleteRead, 2 times"): ask("GET", f"http://127.0.0.1:{server.server_port}/", {}, tries=2)
    finally: server.shutdown(); server.server_close()


# Links, layouts, processes -----------------------------------------------------------------------------------------------------
def test_link_expires_mid_epoch(nih, server, tmp_path):
    "Signed addresses live a fifth of a second; every picture comes, byte for byte"
    server.set(lifetime=.2, latency=.02)
    try:
        with as_user("key", tmp_path), kaggle_source(endpoint=f"{server.api}/api", conns=2) as archive:
            got = {archive.member_name(j)[-16:]: data for j, data in archive.reader(conns=2, gap=0, max_request=1)(archive.select())}
            renewals = sum(part.link.renewals for part in archive.source.parts)
    finally: server.set(lifetime=259_200, latency=0)
    with zipfile.ZipFile(nih[1]/"archive.zip") as z: assert got == {n[-16:]: z.read(n) for n in z.namelist() if n.endswith(".png")}
    assert renewals > 0


def test_layouts_agree(nih, server, tmp_path):
    "Twelve ZIPs, one bundle, the mirror, a ZIP and a folder: the same table, which passes the leak rules"
    with serving({"archive.zip": nih[1]/"archive.zip"}, logins=LOGINS) as bundle, as_user("key", tmp_path):
        places = [open_nih("kaggle", endpoint=f"{s.api}/api") for s in (server, bundle)] + [open_nih("hf", endpoint=server.api)]
        stage = KaggleStreamClient(stages=[3], endpoint=f"{server.api}/api"), KaggleStreamClient(stages=[3], endpoint=f"{bundle.api}/api")
        assert sorted((n[-16:], d) for n, d in stage[0]) == sorted((n[-16:], d) for n, d in stage[1])
    tables = [nih_table(p) for p in [*places, open_nih(nih[0]), open_nih(nih[1]/"archive.zip")]]
    assert len(tables[0]) == 48
    for table in tables:
        check_table(table)
        pd.testing.assert_frame_equal(table.drop(columns=["path", "member"]), tables[0].drop(columns=["path", "member"]))
        assert SECRET not in str(table.attrs) + table.to_csv() and SECRET.encode() not in pickle.dumps(table)


def test_texts_zipped(nih, server, tmp_path):
    "Kaggle sends some files as a ZIP of one file"
    def zipped(path):
        with zipfile.ZipFile(tmp_path/"x.zip", "w", zipfile.ZIP_DEFLATED) as z: z.write(path, path.name)
        return (tmp_path/"x.zip").read_bytes()
    files = {p.name: p if p.suffix == ".zip" else zipped(p) for p in nih[0].iterdir() if p.suffix != ".json"}
    with serving(files) as other, as_user("key", tmp_path):
        assert open_nih("kaggle", endpoint=f"{other.api}/api").texts == open_nih("kaggle", endpoint=f"{server.api}/api").texts


def test_any_dataset(nih, tmp_path):
    "Not only NIH: the ZIPs that a data set has, or its bundle"
    files = {"a.zip": nih[0]/"images_001.zip", "b/c.zip": nih[0]/"images_002.zip", "notes.csv": b"x"}
    with serving(files, dataset="me/my-things") as server, as_user("anonymous", tmp_path), kaggle_source("me/my-things", endpoint=f"{server.api}/api") as archive:
        names = [zipfile.ZipFile(nih[0]/f"images_00{k}.zip").namelist() for k in (1, 2)]
        assert archive.index.names() == sum(names, []) and len(archive.firsts) == 2
        assert dict(KaggleStreamClient("me/my-things", endpoint=f"{server.api}/api")).keys() == set(sum(names, []))
    with serving({"archive.zip": nih[0]/"images_001.zip"}, dataset="me/my-things") as server, as_user("anonymous", tmp_path):
        with kaggle_source("me/my-things", ["gone.zip"], endpoint=f"{server.api}/api") as archive: assert archive.index.names() == names[0]
        with pytest.raises(NotFound, match="of me/other to no credentials"): kaggle_source("me/other", endpoint=f"{server.api}/api")


def renewed(link, queue): queue.put(plain_url(link.address()))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_secret_reaches_workers_only(method, server, tmp_path):
    "Credentials given in code go to a worker process that is started, and into no other pickle"
    if method not in multiprocessing.get_all_start_methods(): pytest.skip(f"no {method} here")
    with as_user("anonymous", tmp_path, PYTHONPATH=os.pathsep.join(map(str, (Path(__file__).parent, *sys.path)))):
        link = kaggle_link(file="images_001.zip", credentials=Credentials("token", "given", secret=TOKEN), endpoint=f"{server.api}/api")
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        worker = context.Process(target=renewed, args=(link, queue))
        worker.start(); worker.join(60)
        assert worker.exitcode == 0 and queue.get() == f"http://127.0.0.1:{server.port}/signed/images_001.zip"
        archive = kaggle_source(files=["images_001.zip"], credentials=Credentials("token", "given", secret=TOKEN), endpoint=f"{server.api}/api")
        kept = pickle.dumps([link, archive, Credentials("key", "given", "tester", SECRET)])
    assert SECRET.encode() not in kept and b"X-Goog-Signature" not in kept and SECRET not in repr([link, archive, archive.source, vars(link)])
