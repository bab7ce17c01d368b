"""The tars that the reader accepts, and the errors for the tars that it rejects."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma

import pytest

from gearworkers.errors import IntegrityError, InvalidInput
from gearworkers.tar import pax
from gearworkers.tar.entry import CHAR, DIR, HARDLINK, REG, SYMLINK, TarEntry
from gearworkers.tar.reader import TarReader
from gearworkers.tar.tar_split import TarSplitWriter
from gearworkers.tar.writer import END, header, padding
from tests.support.tars import read_tar, with_checksum, with_header_bytes

NAME, SIZE, MTIME, TYPE, MAGIC, PREFIX = 0, 124, 136, 156, 257, 345


def member(entry: TarEntry, content: bytes = b"") -> bytes:
    return header(entry) + content + padding(len(content))


def a_file(name: bytes = b"a", content: bytes = b"hello", **fields: object) -> bytes:
    return member(TarEntry(name, size_bytes=len(content), **fields), content)  # type: ignore[arg-type]


def special(kind: bytes, content: bytes) -> bytes:
    return with_header_bytes(a_file(b"special", content), TYPE, kind)


def extended(*records: tuple[bytes, bytes]) -> bytes:
    return special(b"x", b"".join(pax.format_records({key: value}) for key, value in records))


def only_entry(tar: bytes) -> TarEntry:
    (entry,) = read_tar(tar).entries
    return entry


def test_an_old_header_without_magic_is_read() -> None:
    entry = only_entry(with_header_bytes(a_file(), MAGIC, bytes(8)) + END)
    assert (entry.name, entry.type, entry.size_bytes) == (b"a", REG, 5)


def test_a_v7_name_with_a_slash_at_the_end_is_a_directory() -> None:
    entry = only_entry(with_header_bytes(member(TarEntry(b"dir/")), TYPE, b"\0") + END)
    assert (entry.name, entry.type) == (b"dir/", DIR)


def test_files_of_type_nul_and_contiguous_files_are_regular_files() -> None:
    tar = with_header_bytes(a_file(b"old"), TYPE, b"\0") + with_header_bytes(a_file(b"contiguous"), TYPE, b"7") + END
    assert [(entry.name, entry.type) for entry in read_tar(tar).entries] == [(b"old", REG), (b"contiguous", REG)]


def test_a_prefix_applies_in_ustar_but_not_in_gnu_headers() -> None:
    assert only_entry(with_header_bytes(a_file(), PREFIX, b"dir") + END).name == b"dir/a"
    gnu = with_header_bytes(with_header_bytes(a_file(), MAGIC, b"ustar  \0"), PREFIX, b"00000000012\0")
    assert (only_entry(gnu + END).name, only_entry(gnu + END).atime_ns) == (b"a", 10 * 10**9)


def test_a_prefix_in_a_gnu_header_of_an_old_go_version_applies() -> None:
    gnu = with_header_bytes(with_header_bytes(a_file(), MAGIC, b"ustar  \0"), PREFIX, b"some/dir")
    assert (only_entry(gnu + END).name, only_entry(gnu + END).atime_ns) == (b"some/dir/a", None)


def test_a_star_header_has_a_short_prefix_and_an_access_time() -> None:
    star = with_header_bytes(with_header_bytes(a_file(), 508, b"tar\0"), PREFIX, b"dir")
    entry = only_entry(with_header_bytes(star, 476, b"00000000012\0") + END)
    assert (entry.name, entry.atime_ns) == (b"dir/a", 10 * 10**9)


def test_binary_numbers_may_be_large_and_negative() -> None:
    tar = with_header_bytes(a_file(), 108, b"\x80\0\0\0\x01\0\0\0")
    tar = with_header_bytes(tar, MTIME, b"\xff" * 11 + b"\xfe")
    entry = only_entry(tar + END)
    assert (entry.uid, entry.mtime_ns) == (1 << 24, -2 * 10**9)


def test_numbers_may_be_blank_or_padded_with_spaces() -> None:
    entry = only_entry(with_header_bytes(with_header_bytes(a_file(), 108, b"    17 \0"), 116, bytes(8)) + END)
    assert (entry.uid, entry.gid) == (0o17, 0)


def test_a_signed_checksum_is_accepted() -> None:
    block = bytearray(a_file(b"ab")[:512])
    block[:2] = b"\xff\xfe"
    block[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % signed
    assert only_entry(bytes(block) + a_file()[512:] + END).name == b"\xff\xfe"


def test_a_link_with_a_size_has_no_content() -> None:
    link = with_header_bytes(member(TarEntry(b"l", HARDLINK, b"a")), SIZE, b"00000000005\0")
    entries = read_tar(a_file() + link + a_file(b"b") + END).entries
    assert [(entry.name, entry.size_bytes, entry.stored_bytes) for entry in entries] == [
        (b"a", 5, 5),
        (b"l", 0, 0),
        (b"b", 5, 5),
    ]


def test_gnu_long_names_override_pax_paths_and_end_at_a_nul() -> None:
    tar = special(b"L", b"long/" * 300 + b"\0rest") + special(b"K", b"target\0")
    tar += extended((b"path", b"pax"), (b"linkpath", b"pax")) + member(TarEntry(b"s", SYMLINK, b"t")) + END
    entry = only_entry(tar)
    assert (entry.name, entry.linkname) == (b"long/" * 300, b"target")


def test_the_last_of_two_extended_headers_replaces_the_first() -> None:
    tar = extended((b"path", b"first"), (b"uid", b"7")) + extended((b"gid", b"8")) + a_file() + END
    assert (only_entry(tar).name, only_entry(tar).uid, only_entry(tar).gid) == (b"a", 0, 8)


def test_a_global_header_is_skipped_and_cancels_earlier_headers() -> None:
    tar = extended((b"path", b"lost")) + special(b"g", b"15 comment=abc\n") + a_file() + END
    assert only_entry(tar).name == b"a"


def test_pax_records_override_the_header() -> None:
    tar = extended(
        (b"path", b"\xff name"),
        (b"uid", b"5000000000"),
        (b"mtime", b"-1.5"),
        (b"atime", b"1.0000000019"),
        (b"size", b"5"),
    )
    entry = only_entry(tar + with_header_bytes(a_file(), SIZE, b"00000000000\0") + END)
    assert (entry.name, entry.uid, entry.size_bytes) == (b"\xff name", 5_000_000_000, 5)
    assert (entry.mtime_ns, entry.atime_ns) == (-1_500_000_000, 1_000_000_001)


def test_an_empty_pax_value_changes_no_field_but_sets_an_empty_xattr() -> None:
    entry = only_entry(extended((b"path", b""), (b"SCHILY.xattr.user.e", b"")) + a_file() + END)
    assert (entry.name, entry.xattrs) == (b"a", {b"user.e": b""})


def test_xattr_values_may_contain_any_bytes() -> None:
    value = bytes(range(256))
    assert only_entry(extended((b"SCHILY.xattr.user.x", value)) + a_file() + END).xattrs == {b"user.x": value}


def test_gear_records_name_content_that_is_not_in_the_tar() -> None:
    records = extended((b"GEAR.sha256", b"ab" * 32), (b"GEAR.size", b"7"))
    entry = only_entry(records + member(TarEntry(b"a")) + END)
    assert (entry.gear, entry.size_bytes, entry.stored_bytes) == ((b"\xab" * 32, 7), 7, 0)


@pytest.mark.parametrize("others", [[], [(b"uid", b"7")], [(b"path", b"b"), (b"SCHILY.xattr.user.x", b"y")]])
def test_gear_records_alone_are_read_as_those_with_others(others: list[tuple[bytes, bytes]]) -> None:
    gear = (b"GEAR.sha256", b"ab" * 32), (b"GEAR.size", b"%d" % (1 << 50))
    entry = only_entry(extended(*gear, *others) + member(TarEntry(b"a")) + END)
    assert (entry.gear, entry.size_bytes) == ((b"\xab" * 32, 1 << 50), 1 << 50)
    assert only_entry(extended(*gear) + extended((b"gid", b"8")) + a_file() + END).gear is None
    later = only_entry(extended((b"uid", b"7")) + extended(*gear) + member(TarEntry(b"a")) + END)
    assert (later.uid, later.gear) == (0, entry.gear)


@pytest.mark.parametrize("empty", [b"", bytes(512), END, bytes(10240)])
def test_an_empty_archive_has_no_entries(empty: bytes) -> None:
    read = read_tar(empty)
    assert read.files == []
    assert read.rebuilt() == empty


@pytest.mark.parametrize("name", [b"BZh", b"LZIP", b"]"])
def test_a_name_may_begin_like_compressed_data(name: bytes) -> None:
    assert only_entry(a_file(name) + END).name == name


@pytest.mark.parametrize("end", [END, END[:512], b"", END + b"old data on the tape" * 1000])
def test_the_archive_ends_with_two_zero_blocks_one_or_none(end: bytes) -> None:
    tar = a_file() + end
    read = read_tar(tar)
    assert read.content(b"a") == b"hello"
    assert read.rebuilt() == tar


@pytest.mark.parametrize(
    ("tar", "why"),
    [
        (b"x" * 512, "checksum"),
        (gzip.compress(a_file(), mtime=0), "compressed with gzip"),
        (lzma.compress(bytes(1 << 20)), "compressed with xz"),
        (bz2.compress(a_file()), "compressed with bzip2"),
        (a_file()[:-1] + b"\0" * 512 + a_file(), "checksum"),
        (END[:512] + a_file(), "single zero block"),
        (with_header_bytes(a_file(), SIZE, b"-0000000005\0"), "not octal"),
        (with_header_bytes(a_file(), SIZE, b"00000000_05\0"), "not octal"),
        (with_header_bytes(a_file(), SIZE, b"00000000009\0"), "not octal"),
        (with_header_bytes(a_file(), SIZE, b"\xff" * 12), "'a' at byte 0: its size is negative"),
        (with_header_bytes(a_file(), SIZE, b"\x80\0\0\xff" + bytes(8)), "64 bits"),
        (with_header_bytes(a_file(), TYPE, b"V"), "unhandled tar header type 86"),
        (with_header_bytes(a_file(), TYPE, b"X"), "unhandled tar header type 88"),
        (with_header_bytes(a_file(), TYPE, b"S"), "not GNU's"),
        (special(b"x", b"no record"), "length"),
        (special(b"x", b"99 a=b\n"), "length"),
        (special(b"x", b"7 abcd\n"), "length"),
        (special(b"x", b"6 a=bc"), "length"),
        (special(b"x", b"3 =" * 2), "length"),
        (extended((b"path", b"a\0b")), "NUL"),
        (extended((b"ke\0y", b"a")), "NUL"),
        (extended((b"size", b"-1")) + a_file(), "'a' at byte 1024: its size is negative"),
        (extended((b"size", b"1_0")) + a_file(), "not a number"),
        (extended((b"uid", b"9" * 20)) + a_file(), "64 bits"),
        (extended((b"mtime", b"1.x")) + a_file(), "not a time"),
        (extended((b"mtime", b"-9223372036854775808.5")) + a_file(), "64 bits"),
        (extended((b"ctime", b"")) + extended((b"ctime", b"soon")) + a_file(), "not a time"),
        (extended((b"GEAR.size", b"1")) + a_file(), "Gear"),
        (extended((b"GEAR.guard", b"1")) + a_file(), "guard"),
        (extended((b"GEAR.sha256", b"ab" * 32), (b"GEAR.size", b"4")) + a_file(), "Gear"),
        (extended((b"GEAR.sha256", b"ab"), (b"GEAR.size", b"5")) + a_file(), "Gear"),
        (special(b"x", b"80 GEAR.sha256=%b\n16 GEAR.size=5\n" % (b"ab" * 32)) + a_file(), "length"),
        (special(b"x", b"x" * ((1 << 20) + 1)), "larger than"),
        (special(b"L", b"x" * ((1 << 20) + 1)), "larger than"),
        (extended((b"GNU.sparse.map", b"0,9"), (b"GNU.sparse.numblocks", b"1")) + a_file(), "outside the file"),
        (extended((b"GNU.sparse.map", b"0,4"), (b"GNU.sparse.numblocks", b"1")) + a_file(), "are stored"),
        (
            extended((b"GNU.sparse.map", b"0,5"), (b"GNU.sparse.numblocks", b"2")) + a_file(),
            "differs from GNU.sparse.numblocks",
        ),
        (extended((b"GNU.sparse.map", b"3,2,0,3"), (b"GNU.sparse.numblocks", b"2")) + a_file(), "out of order"),
        (extended((b"GNU.sparse.numbytes", b"3")) + a_file(), "out of order"),
        (extended((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + a_file(), "truncated"),
    ],
)
def test_malformed_tars_are_rejected_with_the_reason(tar: bytes, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        read_tar(tar + END)


def test_a_sparse_map_in_the_content_is_bounded() -> None:
    content = (b"9" * 511 + b"\n") * 3000
    tar = extended((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + a_file(content=content) + END
    with pytest.raises(InvalidInput, match="not a number"):
        read_tar(tar)
    content = b"100000\n" + b"0\n" * 600_000
    tar = extended((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + a_file(content=content) + END
    with pytest.raises(InvalidInput, match="sparse segments have 0 bytes"):
        read_tar(tar)
    content = b"1000000\n" + b"0\n" * 600_000
    tar = extended((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + a_file(content=content) + END
    with pytest.raises(InvalidInput, match="longer than"):
        read_tar(tar)


def test_an_endless_old_sparse_map_is_rejected() -> None:
    block = bytearray(with_header_bytes(with_header_bytes(a_file(), MAGIC, b"ustar  \0"), TYPE, b"S")[:512])
    block[482] = 1
    tar = with_checksum(block) + (bytes(504) + b"\1" + bytes(7)) * 3000
    with pytest.raises(InvalidInput, match="longer than"):
        read_tar(tar)


def test_a_sparse_directory_is_rejected() -> None:
    tar = extended((b"GNU.sparse.map", b"0,0"), (b"GNU.sparse.numblocks", b"1")) + member(TarEntry(b"d", DIR)) + END
    with pytest.raises(InvalidInput, match="not a regular file"):
        read_tar(tar)


def test_the_error_for_a_truncated_tar_names_the_entry() -> None:
    tar = a_file(b"first") + a_file(b"second", b"x" * 5000)
    with pytest.raises(IntegrityError, match=r"at byte 3000: entry 'second': its content is cut short"):
        read_tar(tar[:3000])


def test_a_truncated_tar_is_an_error_or_ends_after_a_whole_entry() -> None:
    tar = a_file(b"one") + extended((b"path", b"two")) + a_file() + member(TarEntry(b"c", CHAR, devmajor=1)) + END
    whole = {1: 517, 2: 512 * 5 + 5, 3: 512 * 7}  # number of entries: end of the last entry's content
    for length in range(1, len(tar)):
        try:
            files = read_tar(tar[:length]).files
        except IntegrityError:
            continue
        assert [content for _, content in files] == [b"hello", b"hello", b""][: len(files)]
        assert length >= whole[len(files)]
        assert length % 512 == 0 or tar[length : length + -length % 512].strip(b"\0") == b""


def test_content_larger_than_the_buffer_is_read_in_pieces_only() -> None:
    content = bytes(range(256)) * 100
    reader = TarReader(io.BytesIO(a_file(content=content)), buffer_bytes=4096)
    assert reader.next() is not None
    assert reader.payload() is None
    pieces = [bytes(piece) for piece in reader.chunks()]
    assert max(map(len, pieces)) <= 4096
    assert b"".join(pieces) == content


def test_unread_content_is_logged_as_raw_bytes() -> None:
    tar = a_file(content=b"x" * 9000) + a_file(b"b") + END
    file = io.BytesIO()
    log = TarSplitWriter(file)
    reader = TarReader(io.BytesIO(tar), log, buffer_bytes=4096)
    reader.next()
    log.raw(next(reader.chunks()))
    reader.finish()
    assert log.size_bytes == len(tar)


def test_a_caller_that_does_not_log_its_content_gets_an_error() -> None:
    reader = TarReader(io.BytesIO(a_file() + END), TarSplitWriter(io.BytesIO()))
    reader.next()
    reader.payload()
    with pytest.raises(RuntimeError, match="517 bytes of the tar were returned, 512 logged"):
        reader.next()


@pytest.mark.parametrize("step_bytes", [1, 7, 511, 513])
def test_a_source_with_short_reads_gives_the_same_result(step_bytes: int) -> None:
    tar = a_file() + extended((b"path", b"two")) + a_file(content=b"y" * 5000) + END
    read = read_tar(tar, step_bytes=step_bytes, buffer_bytes=4096)
    assert [(entry.name, content) for entry, content in read.files] == [(b"a", b"hello"), (b"two", b"y" * 5000)]
    assert read.rebuilt() == tar


def test_errors_of_the_source_pass_through() -> None:
    class Broken:
        def readinto(self, buffer: memoryview, /) -> int:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        TarReader(Broken()).next()
