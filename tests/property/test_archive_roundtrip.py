"""Entries survive writer and reader, tars are rebuilt from their streams, and damage raises only GearError."""

from __future__ import annotations

import gzip
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gearworkers.errors import GearError
from gearworkers.tar.entry import BLOCK, CHAR, DIR, FIFO, HARDLINK, REG, SYMLINK, TarEntry
from gearworkers.tar.writer import END, header, padding
from tests.support.tars import read_tar, with_checksum

GOLDEN = gzip.decompress((Path(__file__).parent.parent / "data" / "docker-save.tar.gz").read_bytes())

names = st.binary(min_size=1, max_size=300).map(lambda name: name.replace(b"\0", b"/"))
xattr_names = st.binary(min_size=1, max_size=30).map(lambda name: name.replace(b"\0", b".").replace(b"=", b"."))
times = st.integers(-(2**62), 2**62) | st.integers(0, 2**33).map(lambda seconds: seconds * 10**9)
ids = st.integers(0, 2**32 - 2)
contents = st.binary(max_size=1500)


@st.composite
def entries(draw: st.DrawFn) -> tuple[TarEntry, bytes]:
    kind = draw(st.sampled_from([REG, REG, HARDLINK, SYMLINK, CHAR, BLOCK, DIR, FIFO]))
    content = draw(contents) if kind == REG else b""
    entry = TarEntry(
        draw(names),
        kind,
        draw(names) if kind in (HARDLINK, SYMLINK) else b"",
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(ids),
        gid=draw(ids),
        size_bytes=len(content),
        mtime_ns=draw(times),
        atime_ns=draw(st.none() | times),
        devmajor=draw(st.integers(0, 2**21)) if kind in (CHAR, BLOCK) else 0,
        devminor=draw(st.integers(0, 2**21)) if kind in (CHAR, BLOCK) else 0,
        xattrs=draw(st.none() | st.dictionaries(xattr_names, contents, min_size=1, max_size=3)),
        stored_bytes=len(content),
    )
    return entry, content


def as_tar(files: list[tuple[TarEntry, bytes]]) -> bytes:
    return b"".join(header(entry) + content + padding(len(content)) for entry, content in files) + END


@settings(max_examples=150, deadline=None)
@given(st.lists(entries(), min_size=1, max_size=8), st.integers(1, 5000))
def test_entries_and_tars_survive_a_round_trip(files: list[tuple[TarEntry, bytes]], step_bytes: int) -> None:
    tar = as_tar(files)
    read = read_tar(tar, buffer_bytes=4096, step_bytes=step_bytes)
    for entry in read.entries:
        entry.header_offset = 0
    assert read.files == files
    assert read.rebuilt() == tar


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255)), min_size=1, max_size=5), st.booleans())
def test_a_damaged_tar_raises_only_gear_errors(changes: list[tuple[int, int]], right_checksums: bool) -> None:
    damaged = bytearray(GOLDEN)
    for at, value in changes:
        damaged[at] = value
        if right_checksums:  # otherwise the checksum detects most damage first
            start = at // 512 * 512
            damaged[start : start + 512] = with_checksum(damaged[start : start + 512])
    try:
        read = read_tar(bytes(damaged))
    except GearError:
        return
    assert read.rebuilt() == bytes(damaged)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("0LKxg57S\0V"), st.sampled_from([b"ustar\x0000", b"ustar  \0", bytes(8)]), contents),
        min_size=1,
        max_size=5,
    ),
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=4),
)
def test_headers_of_any_kind_and_content_raise_only_gear_errors(
    members: list[tuple[str, bytes, bytes]], changes: list[tuple[int, int]]
) -> None:
    tar = b""
    for kind, magic, content in members:
        block = bytearray(header(TarEntry(b"name", size_bytes=len(content))))
        block[156], block[257:265] = ord(kind), magic
        for at, value in changes:
            block[at] = value
        tar += with_checksum(block) + content + padding(len(content))
    tar += END
    try:
        read = read_tar(tar)
    except GearError:
        return
    assert read.rebuilt() == tar


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(GOLDEN)))
def test_a_truncated_tar_raises_a_gear_error_or_has_only_complete_entries(length: int) -> None:
    whole = read_tar(GOLDEN)
    try:
        read = read_tar(GOLDEN[:length])
    except GearError:
        return
    assert read.files == whole.files[: len(read.files)]
