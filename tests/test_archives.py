"""Archives of every shape the format allows, and of shapes it does not: read as zipfile reads them, or refused

The random ones are drawn by hypothesis, from a fixed seed."""
import io
import pickle
import random
import struct
import warnings
import zipfile
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings, strategies as st

from anomdx.sources import FileSource
from anomdx.streaming import WIDE, CorruptMember, MemberReader, StreamError, ZipIndex, iter_zip, open_archive, widen, zip64

SOME = settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


class Memory:
    "A source of bytes in memory"
    name, etag, conns = "a.zip", "v1", 2
    def __init__(self, data): self.data, self.size = data, len(data)
    def read(self, start, stop, halt=None): return self.data[start:stop]
    def tail(self, n): return (start := max(self.size - n, 0)), self.data[start:]


def archive(n=40, low=2_000, high=60_000, seed=0):
    dice, file = np.random.default_rng(seed), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(n): z.writestr(f"images/{i:08d}.png", dice.integers(0, 64, dice.integers(low, high), np.uint8).tobytes())
    return file.getvalue()


ARCHIVE = archive()


# Archives as the format allows them ------------------------------------------------------------------------------------------------
class Pipe(io.RawIOBase):
    "A file that cannot seek: zipfile then writes data descriptors"
    def __init__(self): self.data = bytearray()
    def writable(self): return True
    def write(self, b): self.data += b; return len(b)


stems = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)
sizes = st.integers(0, 3) | st.integers(0, 9000)
datas = st.binary(max_size=300) | st.builds(lambda seed, n: random.Random(seed).randbytes(n), st.integers(0, 99), sizes) | st.builds(bytes, sizes)
member = st.fixed_dictionaries(dict(
    name=st.builds("{}{}{}".format, st.sampled_from(["", "a/", "ä/", "深/", "../", "/", "x/../", "C:", "__MACOSX/"]), stems,
                   st.sampled_from([".png", ".PNG", ".jpg", ".txt", "/", ""])),
    data=datas, deflated=st.booleans(), comment=st.binary(max_size=50), wide=st.booleans(),
    extra=st.binary(max_size=40).map(lambda x: struct.pack("<HH", 0x9999, len(x)) + x if x else b""),
    junk=st.just(b"") | st.binary(min_size=1, max_size=60) | st.integers(1, 80_000).map(lambda n: random.Random(n).randbytes(n))))
shapes = st.fixed_dictionaries(dict(
    members=st.lists(member, max_size=12), piped=st.booleans(), junk=st.booleans(), front=st.just(b"") | st.binary(max_size=400),
    comment=st.just(b"") | st.binary(max_size=400) | st.integers(0, 9).map(lambda seed: random.Random(seed).randbytes(60_000))))


def write(shape):
    "The archive of a drawn shape"
    file, piped = Pipe() if shape["piped"] else io.BytesIO(), shape["piped"]
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", allowZip64=True) as z:
        warnings.simplefilter("ignore") # of a name that comes twice
        for m in shape["members"]:
            info, is_folder = zipfile.ZipInfo(m["name"]), m["name"].endswith("/")
            info.compress_type = zipfile.ZIP_DEFLATED if not is_folder and (piped or m["deflated"]) else zipfile.ZIP_STORED
            info.comment, info.extra = m["comment"], m["extra"]
            with z.open(info, "w", force_zip64=m["wide"]) as f: f.write(b"" if is_folder else m["data"])
            if shape["junk"] and not piped:
                z.fp.seek(z.start_dir); z.fp.write(m["junk"]); z.start_dir = z.fp.tell()
        z.comment = shape["comment"]
    return shape["front"] + bytes(file.data if piped else file.getvalue())


def zipfile_reads(data):
    "What the standard library finds, by place in the archive's directory; None where it takes a random comment for an end"
    try: z = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile: return None
    return [(i.filename.replace("\\", "/"), z.open(i).read()) for i in z.infolist()]


def is_harmless(name):
    parts = name.split("/")
    return bool(name) and not (name[0] == "/" or name[1:2] == ":" or "\\" in name or {"..", "__MACOSX"} & set(parts))


@SOME
@given(shapes, st.integers(0, 5), st.integers(1, 5000))
def test_random_archives_read_as_zipfile_reads_them(shape, seed, piece):
    data = write(shape)
    truth = zipfile_reads(data)
    if truth is None: return
    source = Memory(data)
    index = ZipIndex.open(source)
    assert index.names() == [n for n, _ in truth]
    ids = np.random.default_rng(seed).permutation(len(index))
    for reader in (MemberReader(source, index), MemberReader(source, index, budget=20_000, gap=0)):
        assert [(j, v) for j, v in reader(ids)] == [(j, truth[j][1]) for j in ids]
    pictures = [(n, v) for n, v in truth if n.lower().endswith((".png", ".jpg")) and is_harmless(n)]
    assert [(index.name(j), v) for j, v in MemberReader(source, index)(index.select())] == pictures
    if not shape["front"] and (shape["piped"] or not shape["junk"]):
        assert list(iter_zip(data[i:i + piece] for i in range(0, len(data), piece))) == pictures


@SOME
@given(st.lists(shapes.filter(lambda s: s["members"]), min_size=2, max_size=3), st.integers(0, 5))
def test_joined_archives_read_as_one_after_the_other(several, seed):
    datas = [write(s) for s in several]
    if None in (truths := [zipfile_reads(d) for d in datas]): return
    truth = sum(truths, [])
    joined = open_archive([Memory(d) for d in datas])
    ids = np.random.default_rng(seed).permutation(len(joined))
    for options in ({}, dict(gap=1 << 20, max_request=1 << 30)):
        assert list(joined.reader(**options)(ids)) == [(j, truth[j][1]) for j in ids]
    assert [joined.part(j) for j in range(len(joined))] == [k for k, t in enumerate(truths) for _ in t]
    for j, (name, _) in enumerate(truth): assert joined.member_name(joined.find(name)) == joined.member_name(j) == name
    assert all(joined.find(name) == max(j for j, (n, _) in enumerate(truth) if n == name) for name, _ in truth)


@SOME
@given(st.dictionaries(st.lists(stems.filter(lambda s: s not in (".", "..") and "/" not in s), min_size=1, max_size=3).map(
    lambda parts: "/".join(p[:8] for p in parts) + ".png"), datas, min_size=1, max_size=6))
def test_folders_read_as_their_files(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("loose")
    for name, data in files.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(data)
    archive = open_archive(root)
    assert {archive.member_name(j): archive.read(j) for j in range(len(archive)) if archive.index.members["size"][j]} == {n: d for n, d in files.items() if d}
    assert [archive.member_name(j) for j in archive.select()] == sorted(n for n, d in files.items() if d and is_harmless(n))


wide_rows = st.lists(st.tuples(*[st.sampled_from([0, 7, 0xffffffff]) | st.integers(0, 2**32 - 1)] * 3,
    st.lists(st.tuples(st.sampled_from([1, 1, 9]), st.integers(0, 40), st.binary(max_size=32)), max_size=3)), min_size=1, max_size=8)

@SOME
@given(wide_rows, st.binary(max_size=3))
def test_all_members_at_once_are_widened_as_each_alone(drawn, rest):
    "Fields that lie about their own length included"
    extras = [b"".join(struct.pack("<HH", kind, n) + value for kind, n, value in fields) + rest for *_, fields in drawn]
    rows = np.zeros(len(drawn), [("extra", "<u2"), *((k, "<u4") for k in WIDE)])
    for row, (*numbers, _), extra in zip(rows, drawn, extras): row["extra"], row["size"], row["packed"], row["offset"] = len(extra), *numbers
    members = np.zeros(len(drawn), [(k, "<i8") for k in WIDE])
    for k in WIDE: members[k] = rows[k]
    widen(members, rows, b"".join(extras), np.cumsum([0, *map(len, extras)])[:-1])
    assert members.tolist() == [zip64(e, *map(int, numbers)) for e, (*numbers, _) in zip(extras, drawn)]


def disk(tmp_path, data):
    path = tmp_path/"a.zip"
    path.write_bytes(data)
    return FileSource(path)


def test_a_comment_that_looks_like_the_end():
    "Python 3.11's zipfile calls this archive no ZIP at all"
    comment = b"PK\5\6" * 30
    data = ARCHIVE[:-2] + struct.pack("<H", len(comment)) + comment
    assert list(iter_zip([ARCHIVE])) == [(n, v) for n, (_, v) in zip(ZipIndex.open(Memory(data)).names(), MemberReader(Memory(data))(range(40)))]


def test_damage_anywhere_is_an_error_or_the_truth(tmp_path):
    "Flip, cut or overwrite anywhere: each member is still the truth, or a StreamError says so; nothing else is raised, nothing hangs"
    dice, outcome = random.Random(0), Counter()
    small = archive(6, 50, 400)
    truth = set(zipfile.ZipFile(io.BytesIO(small)).read(n) for n in zipfile.ZipFile(io.BytesIO(small)).namelist())
    directory = small.rfind(b"PK\1\2", 0, small.find(b"PK\1\2") + 1)
    for _ in range(600):
        data, at = bytearray(small), dice.choice([dice.randrange(len(small)), dice.randrange(directory, len(small))])
        kind = dice.randrange(3)
        if kind == 0: data[at] ^= 1 << dice.randrange(8)
        elif kind == 1: data[at:at + 8] = dice.choice([b"\xff", b"\0", dice.randbytes(1)]) * 8
        else: del data[at:at + dice.randrange(1, 40)]
        try:
            source = disk(tmp_path, bytes(data))
            index = ZipIndex.open(source)
            for j in index.select(("",)):
                try:
                    assert {v for _, v in MemberReader(source, index, tries=1, conns=1)([j])} <= truth
                    outcome["truth"] += 1
                except StreamError: outcome["member"] += 1
        except StreamError: outcome["archive"] += 1
        try: assert {v for _, v in iter_zip([bytes(data)])} <= truth
        except StreamError: outcome["one pass"] += 1
    assert min(outcome[k] for k in ("truth", "member", "archive", "one pass")) > 50


# Hostile archives -------------------------------------------------------------------------------------------------------------------
CENTRAL_FIELDS = {"made": (4, "<H"), "flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "packed": (20, "<I"), "size": (24, "<I"),
                  "name": (28, "<H"), "extra": (30, "<H"), "comment": (32, "<H"), "offset": (42, "<I")}
LOCAL_FIELDS = {"flags": (6, "<H"), "method": (8, "<H"), "crc": (14, "<I"), "packed": (18, "<I"), "size": (22, "<I"), "name": (26, "<H"), "extra": (28, "<H")}
lies = st.lists(st.one_of(
    st.tuples(st.just(b"PK\1\2"), st.sampled_from(list(CENTRAL_FIELDS.values())), st.integers(0, 5), st.integers(0, 70_000) | st.integers(0, 2**32 - 1)),
    st.tuples(st.just(b"PK\3\4"), st.sampled_from(list(LOCAL_FIELDS.values())), st.integers(0, 5), st.integers(0, 70_000) | st.integers(0, 2**32 - 1))),
    min_size=1, max_size=3)


@settings(SOME, max_examples=250)
@given(lies)
def test_lies_in_headers_are_found_out(told):
    "Any fields of any headers replaced: each member is the truth, or left out, or a StreamError"
    small = archive(6, 50, 400)
    truth = {zipfile.ZipFile(io.BytesIO(small)).read(n) for n in zipfile.ZipFile(io.BytesIO(small)).namelist()}
    data = bytearray(small)
    for signature, (at, form), k, value in told:
        place = -1
        for _ in range(k + 1): place = small.index(signature, place + 1)
        struct.pack_into(form, data, place + at, value & (0xffff if form == "<H" else 0xffffffff))
    for values in (lambda: [v for j in range(6) for v in one(bytes(data), j)], lambda: [v for _, v in iter_zip([bytes(data)])]):
        try: found = values()
        except StreamError: continue
        assert set(found) <= truth


def one(data, j):
    "Member `j` in a list, or nothing where it is refused"
    source = Memory(data)
    index = ZipIndex.open(source)
    if j not in index.select(): return []
    try: return [v for _, v in MemberReader(source, index, tries=1, conns=1)([j])]
    except StreamError: return []


def test_a_folder_of_archives_and_a_name_that_is_absent(tmp_path):
    for k in (2, 10, 1): (tmp_path/f"images_{k:03d}.zip").write_bytes(archive(3, 50, 90, seed=k))
    joined = open_archive(tmp_path)
    assert [joined.read(j) for j in range(9)] == [v for k in (1, 2, 10) for _, v in iter_zip([archive(3, 50, 90, seed=k)])]
    with pytest.raises(StreamError, match="no member 'images/0.png'; it has images/00000000.png"): joined.find("images/0.png")
    with pytest.raises(FileNotFoundError): open_archive(tmp_path/"none.zip")
    (tmp_path/"empty").mkdir()
    with pytest.raises(StreamError, match="without files"): open_archive(tmp_path/"empty")


def patched(members, field, value, form="<I", local=False):
    "An archive with a lie in the directory's entry of its last member"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for n, d in members.items(): z.writestr(n, d)
    data = bytearray(file.getvalue())
    struct.pack_into(form, data, data.rfind(b"PK\1\2") + field, value)
    if local: struct.pack_into(form, data, data.rfind(b"PK\3\4") + field - 2, value)
    return bytes(data)


def test_hostile_members_are_not_selected_or_not_believed(tmp_path):
    two = {"a.png": bytes(range(256)) * 8, "b.png": bytes(2000)}
    for name, data in {"encrypted": patched(two, 8, 1, "<H", True), "bzip2": patched(two, 10, 12, "<H", True), "overlap": patched(two, 42, 0),
                       "beyond": patched(two, 42, 1 << 31), "long": patched(two, 20, 1 << 30), "huge": patched(two, 24, 1 << 30)}.items():
        index = ZipIndex.open(disk(tmp_path, data))
        assert "b.png" not in [index.name(j) for j in index.select()], name
        if name in ("encrypted", "bzip2"): assert [n for n, _ in iter_zip([data])] == ["a.png"]
        with pytest.raises(StreamError): list(MemberReader(FileSource(tmp_path/"a.zip"), index)([1]))
    for field, value in ((16, 1), (24, 1999), (24, 2001), (20, 5)): # CRC, size, packed
        source = disk(tmp_path, patched(two, field, value))
        with pytest.raises(CorruptMember, match="b.png"): list(MemberReader(source)([0, 1]))
    source = disk(tmp_path, patched({"a.png": b"x", "bomb.png": bytes(50 << 20)}, 24, 1000)) # 50 MB that claim to be 1000 bytes
    with pytest.raises(CorruptMember, match="bomb.png does not have the length"): list(MemberReader(source)([1]))


@pytest.mark.parametrize("field, form, value", [(10, "<H", 60_000), (12, "<I", 1 << 31), (16, "<I", 1 << 31), (4, "<H", 1), (12, "<I", 3)])
def test_impossible_directories_are_refused(tmp_path, field, form, value):
    data = bytearray(ARCHIVE)
    struct.pack_into(form, data, len(data) - 22 + field, value)
    with pytest.raises(CorruptMember): ZipIndex.open(disk(tmp_path, bytes(data)))


def test_every_truncation_is_noticed(tmp_path):
    data = archive(5, 50, 300)
    for n in range(0, len(data), 23):
        with pytest.raises(StreamError): ZipIndex.open(disk(tmp_path, data[:n]))
        if n < data.find(b"PK\1\2"):
            with pytest.raises(StreamError): list(iter_zip([data[:n]]))


def test_archives_in_buckets(tmp_path):
    "fsspec's file system in memory stands for s3:// and gs://"
    fsspec = pytest.importorskip("fsspec")
    for k in (1, 2): fsspec.filesystem("memory").pipe(f"/bucket/images_{k}.zip", archive(5, 50, 900, seed=k))
    joined = open_archive([f"memory://bucket/images_{k}.zip" for k in (1, 2)], cache=tmp_path)
    truth = [v for k in (1, 2) for _, v in iter_zip([archive(5, 50, 900, seed=k)])]
    assert [v for _, v in pickle.loads(pickle.dumps(joined)).reader()(range(10))] == truth
    assert joined.name == "memory://bucket/*" and len(list(tmp_path.iterdir())) == 2
    before = joined.etag
    fsspec.filesystem("memory").pipe("/bucket/images_2.zip", archive(5, 50, 900, seed=3))
    assert open_archive([f"memory://bucket/images_{k}.zip" for k in (1, 2)], cache=tmp_path).etag != before
    with pytest.raises(StreamError): list(joined.reader(tries=1)(range(10)))
