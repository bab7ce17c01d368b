"""The headers that the writer formats, and the entries that it rejects."""

from __future__ import annotations

import pytest

from gearworkers.errors import InvalidInput
from gearworkers.tar.entry import DIR, SYMLINK, TarEntry
from gearworkers.tar.pax import format_records, parse_records
from gearworkers.tar.writer import END, header, padding
from tests.support.tars import read_tar


@pytest.mark.parametrize(
    "entry",
    [
        TarEntry(b"a", mtime_ns=0o77777777777 * 10**9, size_bytes=0o77777777777, uid=0o7777777, gid=0o7777777),
        TarEntry(b"n" * 100),
        TarEntry(b"p" * 155 + b"/" + b"n" * 100),
        TarEntry(b"p" * 150 + b"/" + b"n" * 20 + b"/", DIR),
        TarEntry(b"l", SYMLINK, b"t" * 100),
    ],
)
def test_an_entry_that_fits_into_ustar_takes_one_block(entry: TarEntry) -> None:
    assert len(header(entry)) == 512


@pytest.mark.parametrize(
    "entry",
    [
        TarEntry(b"a", mtime_ns=1),
        TarEntry(b"a", mtime_ns=-(10**9)),
        TarEntry(b"a", mtime_ns=-1_500_000_000),
        TarEntry(b"a", mtime_ns=(0o77777777777 + 1) * 10**9),
        TarEntry(b"a", atime_ns=0),
        TarEntry(b"a", uid=0o7777777 + 1),
        TarEntry(b"a", gid=-1),
        TarEntry(b"n" * 101),
        TarEntry(b"p" * 156 + b"/n"),
        TarEntry(b"p/" + b"n" * 101),
        TarEntry(b"/" + b"n" * 100),
        TarEntry(b"d" * 100 + b"/", DIR),
        TarEntry(b"\x80"),
        TarEntry(b"l", SYMLINK, b"t" * 101),
        TarEntry(b"l", SYMLINK, b"\xff"),
        TarEntry(b"n" * 200_000),
        TarEntry(b"a", xattrs={b"user.a": b"1", b"security.capability": bytes(20)}),
        TarEntry(b"a", xattrs={b"user.a": b""}),
        TarEntry(b"a", gear=(bytes(range(32)), 1 << 50), size_bytes=1 << 50),
    ],
)
def test_values_that_do_not_fit_into_ustar_become_pax_records(entry: TarEntry) -> None:
    tar = header(entry)
    assert len(tar) >= 1536
    (read,) = read_tar(tar + END).entries
    read.header_offset = 0
    assert read == entry


def test_a_size_above_the_ustar_limit_becomes_a_pax_record() -> None:
    assert b"size=8589934592\n" in header(TarEntry(b"a", size_bytes=1 << 33))


def test_a_time_before_1970_is_written_as_a_negative_decimal() -> None:
    assert b"mtime=-1.5\n" in header(TarEntry(b"a", mtime_ns=-1_500_000_000))


def test_device_numbers_above_the_octal_limit_are_read_as_written() -> None:
    (read,) = read_tar(header(TarEntry(b"n", ord("3"), devmajor=1 << 40, devminor=0o7777777)) + END).entries
    assert (read.devmajor, read.devminor) == (1 << 40, 0o7777777)


def test_the_order_of_xattrs_does_not_change_the_header() -> None:
    one = TarEntry(b"a", xattrs={b"user.a": b"1", b"user.b": b"2"})
    other = TarEntry(b"a", xattrs={b"user.b": b"2", b"user.a": b"1"})
    assert header(one) == header(other)


def test_a_pax_record_counts_its_own_length() -> None:
    for length in (*range(1, 1200), 9_990, 9_991, 9_992, 9_993, 99_989, 99_990, 99_991):
        records = {b"k": b"v" * length}
        assert parse_records(format_records(records)) == records


@pytest.mark.parametrize("size_bytes", [0, 1, 511, 512, 513])
def test_padding_fills_the_block(size_bytes: int) -> None:
    assert (size_bytes + len(padding(size_bytes))) % 512 == 0
    assert len(padding(size_bytes)) < 512


@pytest.mark.parametrize(
    "entry",
    [
        TarEntry(b""),
        TarEntry(b"a\0b"),
        TarEntry(b"l", SYMLINK, b"t\0"),
        TarEntry(b"a", xattrs={b"user.a=b": b""}),
        TarEntry(b"a", xattrs={b"user.\0": b""}),
    ],
)
def test_entries_that_a_tar_cannot_contain_are_rejected(entry: TarEntry) -> None:
    with pytest.raises(InvalidInput, match="a tar cannot contain"):
        header(entry)
