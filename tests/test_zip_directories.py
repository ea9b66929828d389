"""Directories of ZIPs as programs really write them: read to their end, each member listed or counted, or refused by name."""
import io
import logging
import struct
import zipfile
import zlib

import numpy as np
import pytest

from anomdx.kaggle import nih_table, open_nih
from anomdx.loaders import DataError
from anomdx.sources import StreamError
from anomdx.streaming import CorruptMember, MemberReader, UnreadableMember, ZipIndex, iter_zip, open_archive

PICTURE = bytes(range(200))
END = "<4sHHHHIIH"


class Memory:
    "A source of bytes in memory"
    name, etag, conns = "a.zip", "v1", 2

    def __init__(self, data):
        self.data, self.size, self.asked = data, len(data), 0

    def read(self, start, stop, halt=None):
        self.asked += 1
        return self.data[start:stop]

    def tail(self, n):
        start = max(self.size - n, 0)
        return start, self.data[start:]


def zipped(names, method=zipfile.ZIP_STORED, data=PICTURE):
    "An archive whose members have these very names, backslashes included"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as z:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method
            z.writestr(info, data)
    return file.getvalue()


def patched(data, **fields):
    "The same with fields of its last record replaced"
    keys = ("signature", "disk", "start_disk", "here", "n", "length", "offset", "comment")
    end = dict(zip(keys, struct.unpack(END, data[-22:]))) | fields
    return data[:-22] + struct.pack(END, *end.values())


def both(data):
    "Names by the directory and by one pass; they must not differ"
    index = ZipIndex.open(Memory(data))
    names = [index.name(j) for j in index.select()]
    assert [n for n, _ in iter_zip([data])] == names
    assert all(v == PICTURE for _, v in MemberReader(Memory(data), index)(index.select()))
    return names


# How many ---------------------------------------------------------------------------------------------------
def test_more_members_than_the_record_can_count():
    "macOS counts modulo 65536 and writes no ZIP64"
    data = bytearray(zipped([f"{i}.png" for i in range(65_546)], data=b""))
    at = data.rfind(b"PK\6\6")
    length, offset = struct.unpack_from("<QQ", data, at + 40)
    data = bytes(data[:at]) + struct.pack(END, b"PK\5\6", 0, 0, 10, 10, length, offset, 0)
    index = ZipIndex.open(Memory(data))
    assert len(index) == 65_546 and index.name(65_545) == "65545.png"
    assert index.names() == zipfile.ZipFile(io.BytesIO(data)).namelist()


@pytest.mark.parametrize("stated", [0, 2, 4, 65_535])
def test_a_count_that_contradicts_is_named(stated):
    with pytest.raises(CorruptMember, match=f"a.zip.*({stated} members in|holds 3 members where its last "
        f"record says {stated};)"):
        ZipIndex.open(Memory(patched(zipped(["a.png", "b.png", "c.png"]), n=stated, here=stated)))


@pytest.mark.parametrize("change", [1, -1, 46])
def test_a_length_that_contradicts_is_named(change):
    data = zipped(["a.png", "b.png", "c.png"])
    length, = struct.unpack_from("<I", data, len(data) - 10)
    with pytest.raises(CorruptMember, match="a.zip"):
        ZipIndex.open(Memory(patched(data, length=length + change)))


def test_members_beyond_4_gb_with_places_of_32_bits():
    "Two members lie 4 GB apart, in an archive whose places are modulo 4 GB"
    far, one = 1 << 32, zipped(["a.png"])
    header, entry = one[:one.index(b"PK\1\2")], one[one.index(b"PK\1\2"):-22]

    class Sparse(Memory):
        def __init__(self, parts): self.parts, self.size = parts, max(at + len(b) for at, b in parts)

        def read(self, start, stop, halt=None):
            out = bytearray(stop - start)
            for at, b in self.parts:
                first, last = max(at, start), min(at + len(b), stop)
                if first < last: out[first - start:last - start] = b[first - at:last - at]
            return bytes(out)

        def tail(self, n): return self.size - n, self.read(self.size - n, self.size)

    second = entry[:42] + struct.pack("<I", 50) + entry[46:]
    offset = 50 + len(header)
    end = struct.pack(END, b"PK\5\6", 0, 0, 3, 3, 3 * len(entry), offset, 0)
    middle = entry[:42] + struct.pack("<I", 1 << 31) + entry[46:]
    source = Sparse([(0, header), (1 << 31, header), (far + 50, header),
                     (far + offset, entry + middle + second + end)])
    index = ZipIndex.open(source)
    assert [v for _, v in MemberReader(source, index)(range(3))] == [PICTURE] * 3


# The last record --------------------------------------------------------------------------------------------
def test_a_comment_that_holds_a_last_record():
    data = zipped(["a.png", "b.png"])
    for fake, fine in ((struct.pack(END, b"PK\5\6", 0, 0, 7, 7, 999, 3, 0), True),
                       (struct.pack(END, b"PK\5\6", 0, 0, 0, 0, 0, 0, 0), False)):
        commented = patched(data, comment=len(fake)) + fake
        if fine: assert ZipIndex.open(Memory(commented)).names() == ["a.png", "b.png"]
        else:
            with pytest.raises(CorruptMember, match="ends in 2 records"): ZipIndex.open(Memory(commented))


def test_bytes_in_front():
    "A self-extracting archive, with places that count from its own beginning or from the file's"
    data = zipped(["a.png", "b.png"])
    for glued in (b"MZ" + bytes(500) + data, io.BytesIO(b"MZ" + bytes(500))):
        if not isinstance(glued, bytes):
            glued.seek(0, 2)
            with zipfile.ZipFile(glued, "a") as z:
                for n in ("a.png", "b.png"): z.writestr(n, PICTURE)
            glued = glued.getvalue()
        index = ZipIndex.open(Memory(glued))
        assert [(index.name(j), v) for j, v in MemberReader(Memory(glued), index)(range(2))] == [("a.png",
            PICTURE), ("b.png", PICTURE)]


@pytest.mark.parametrize("comment", [b"", b"taken in May"])
@pytest.mark.parametrize("n", [1, 300, 60_000])
def test_zeros_behind(n, comment):
    data = zipped(["a.png", "b.png"])
    data = patched(data, comment=len(comment)) + comment
    assert both(data + bytes(n)) == zipfile.ZipFile(io.BytesIO(data + bytes(n))).namelist() == ["a.png", "b.png"]
    for other in (bytes(n) + b"x", b"x" + bytes(n)):
        with pytest.raises(CorruptMember, match=f"a.zip: {n + 1} bytes that are not all zero follow"):
            ZipIndex.open(Memory(data + other))
    with pytest.raises(CorruptMember, match="cut short, or not a ZIP"): ZipIndex.open(Memory(bytes(n)))
    assert both(wide(zipped(["a.png"])) + bytes(n)) == ["a.png"]


def test_a_comment_of_zeros_behind_a_last_record():
    "What is exact comes before what is padded"
    fake = struct.pack(END, b"PK\5\6", 0, 0, 0, 0, 0, 0, 0) + bytes(9)
    assert ZipIndex.open(Memory(patched(zipped(["a.png"]), comment=len(fake)) + fake)).names() == ["a.png"]


def test_a_split_archive_is_named():
    data = zipped(["a.png", "b.png"])
    for changed in (patched(data, disk=1, start_disk=1), patched(data, disk=2)):
        with pytest.raises(CorruptMember, match="part of a split archive; join the parts"):
            ZipIndex.open(Memory(changed))
    elsewhere = bytearray(data)
    struct.pack_into("<H", elsewhere, data.rfind(b"PK\1\2") + 34, 1)
    with pytest.raises(CorruptMember, match="member 1 lies in another part of a split archive"):
        ZipIndex.open(Memory(bytes(elsewhere)))


def wide(data, n=None, narrow=None):
    "With a ZIP64 record before the last one"
    _, _, _, _, count, length, offset, _ = struct.unpack(END, data[-22:])
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, n or count, n or count, length, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(data) - 22, 1)
    return data[:-22] + record + locator + struct.pack(END, b"PK\5\6", 0, 0,
        *(narrow or (0xffff, 0xffff, 0xffffffff, 0xffffffff)), 0)


def test_zip64_in_whole_and_in_part():
    data = zipped(["a.png", "b.png"])
    length, offset = struct.unpack_from("<II", data, len(data) - 10)
    for narrow in (None, (2, 2, length, offset), (0xffff, 0xffff, length, offset),
                   (2, 2, length, 0xffffffff)):
        assert ZipIndex.open(Memory(wide(data, narrow=narrow))).names() == ["a.png", "b.png"]
    with pytest.raises(CorruptMember, match="contradicts"):
        ZipIndex.open(Memory(wide(data, narrow=(3, 3, length, offset))))
    with pytest.raises(CorruptMember, match="holds 2 members where its last record says 1;"):
        ZipIndex.open(Memory(wide(data, n=1)))


# Names ------------------------------------------------------------------------------------------------------
def test_backslashes_are_read_as_slashes_and_judged_as_such():
    harmless = ["images\\0.png", "a\\b/c.png", "d.png"]
    data = zipped([*harmless, "..\\up.png", "a\\..\\..\\up.png", "C:\\c.png", "\\root.png",
                   "\\\\server\\share.png", "__MACOSX\\x.png"])
    assert both(data) == [n.replace("\\", "/") for n in harmless]
    archive = open_archive(Memory(data))
    assert archive.find("images/0.png") == archive.find("images\\0.png") == 0
    assert archive.index.select(prefix="images/").tolist() == [0]


def unflagged(data):
    "Without the flag that says UTF-8"
    data = bytearray(data)
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = data.find(signature)
        while place >= 0:
            flags, = struct.unpack_from("<H", data, place + at)
            struct.pack_into("<H", data, place + at, flags & ~0x800)
            place = data.find(signature, place + 1)
    return bytes(data)


@pytest.mark.parametrize("name", ["Röntgen/é.png", "深/á.png", "plain.png"])
def test_utf8_without_its_flag(name):
    data = unflagged(zipped([name]))
    assert both(data) == [name] and open_archive(Memory(data)).find(name) == 0


def test_names_of_msdos():
    "0x81 0x82 is no UTF-8, and ü é in cp437"
    assert both(zipped(["xx.png"]).replace(b"xx.png", b"\x81\x82.png")) == ["üé.png"]


def test_the_unicode_name_of_info_zip():
    for right in (True, False):
        raw, name = b"R#ntgen.png", "Röntgen.png".encode()
        extra = struct.pack("<HHBI", 0x7075, 5 + len(name), 1, zlib.crc32(raw if right else b"other")) + name
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as z:
            info = zipfile.ZipInfo(raw.decode())
            info.extra = extra
            z.writestr(info, PICTURE)
        assert both(file.getvalue()) == ["Röntgen.png" if right else "R#ntgen.png"]


def test_a_name_that_comes_twice(caplog):
    "As in zipfile, both are listed, and the last is found"
    with pytest.warns(UserWarning): data = zipped(["a.png", "a.png"])
    archive = open_archive(Memory(data))
    assert (archive.select().tolist(), archive.find("a.png")) == ([0, 1], 1)
    archive.select()
    assert [r.message for r in caplog.records if "stands for" in r.message] == [
        "a.zip: 1 name stands for 2 members, such as 'a.png'; find() takes the last of each"]


def test_names_that_become_one(caplog):
    names = ["i\\1.png", "i/1.png", "j/1.png", "j\\1.png", "k.png"]
    assert len(both(zipped(names))) == 5
    said = [r.message for r in caplog.records]
    assert len(said) == 1 and "2 names stand for 4 members, such as 'i/1.png'" in said[0]


def test_what_macos_adds_beside_a_picture(caplog):
    assert both(zipped(["a.png", "._a.png", "b/._c.png", "b/c._d.png", "._e/f.png"])) == ["a.png", "b/c._d.png", "._e/f.png"]
    assert not caplog.records


# What is not read -------------------------------------------------------------------------------------------
def marked(field, value, method=None):
    "One stored picture, and one whose headers say something else"
    data = bytearray(zipped(["a.png", "b.png"]))
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        struct.pack_into("<H", data, data.rfind(signature) + at + {"flags": 0, "method": 2}[field], value)
    return bytes(data)


NOT_READ = [("method", m, f"packed by {n} .method {m}.") for m, n in ((9, "Deflate64"), (12, "bzip2"),
(14, "LZMA"), (93, "zstd"), (95, "XZ"), (98, "PPMd"),
            (77, "an unknown method"))] + [("method", 99, "encrypted"), ("flags", 1, "encrypted"),
                                           ("flags", 0x41, "encrypted"), ("flags", 0x2001, "encrypted")]


@pytest.mark.parametrize("field, value, why", NOT_READ)
def test_what_is_not_read_is_counted_once_and_refused_by_name(field, value, why, caplog):
    source = Memory(marked(field, value))
    archive = open_archive(source)
    with caplog.at_level(logging.INFO, "anomdx"):
        assert [archive.select().tolist() for _ in range(3)] == [[0]] * 3
        assert [n for n, _ in iter_zip([source.data])] == ["a.png"]
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 2 and all("1 " in line for line in lines)
    asked = source.asked
    with pytest.raises(UnreadableMember, match=f"b.png is {why}, which is not read; unpack a.zip and pack "
        "it again"):
        archive.read(1)
    assert source.asked == asked   # nothing was fetched for it, least of all four times


def test_nothing_is_said_where_all_is_read(caplog):
    with caplog.at_level(logging.INFO, "anomdx"):
        archive = open_archive(Memory(zipped(["a.png", "folder/", "__MACOSX/._a.png", "notes.txt"])))
        assert archive.select().tolist() == [0]
    assert caplog.records == []


def test_an_encrypted_directory_is_no_damage_without_a_hint():
    data = zipped(["a.png", "b.png"])
    at = data.index(b"PK\1\2")
    with pytest.raises(StreamError, match="a.zip"):
        ZipIndex.open(Memory(data[:at] + bytes(np.random.default_rng(0).bytes(len(data) - 22 - at))
                             + data[-22:]))


# NIH --------------------------------------------------------------------------------------------------------
def nih(folder, slash, closed=0, closed_table=False):
    "Twelve pictures of an NIH archive, the last ones and the table packed by bzip2 if asked for"
    head = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    rows = "".join(f"{i:08d}_000.png,{'Mass' if i % 3 == 0 else 'No Finding'},0,{i},50,M,PA\n"
                   for i in range(12))
    path = folder/"nih.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("Data_Entry_2017.csv", head + rows, zipfile.ZIP_BZIP2 if closed_table
                   else zipfile.ZIP_DEFLATED)
        for i in range(12):
            info = zipfile.ZipInfo("x")
            info.filename = f"images_001{slash}images{slash}{i:08d}_000.png"
            info.compress_type = zipfile.ZIP_BZIP2 if i >= 12 - closed else zipfile.ZIP_STORED
            z.writestr(info, PICTURE)
    return path


def test_nih_with_backslashes(tmp_path):
    tables = [nih_table(open_nih(nih(tmp_path, slash))) for slash in ("/", "\\")]
    columns = ["path", "label", "patient", "split", "member", "checksum", "stage", "finding"]
    assert len(tables[0]) == 12 and tables[0][columns].equals(tables[1][columns]) and tables[
        1].attrs["missing"] == 0


def test_nih_pictures_that_cannot_be_read_are_not_called_absent(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "anomdx"): table = nih_table(open_nih(nih(tmp_path, "/", closed=5)))
    assert (len(table), table.attrs["unread"], table.attrs["missing"], table.attrs["extra"]) == (7, 5, 0, 0)
    said = [r.getMessage() for r in caplog.records if "patients" in r.getMessage()]
    assert len(
        said) == 1 and "5 pictures are there but cannot be read: 5 packed by bzip2 (method 12)" in said[0]
    with pytest.raises(DataError, match="5 pictures are there but cannot be read"):
        nih_table(open_nih(tmp_path/"nih.zip"), strict=True)


def test_an_nih_table_that_cannot_be_read_is_not_called_absent(tmp_path):
    with pytest.raises(DataError, match="has Data_Entry_2017.csv, but it is packed by bzip2 .method 12., "
                                        "which is not read"):
        open_nih(nih(tmp_path, "/", closed_table=True))
