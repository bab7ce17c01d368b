"""A mounted layer shows the contents of its tar, and its Diff is byte for byte that tar."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from gearworkers.tar.entry import BLOCK
from gearworkers.tar.writer import END, header, padding
from tests.conformance.drivers import Driver, new_layer_id
from tests.conformance.layers import (
    MTIME_NS,
    NET_RAW,
    File,
    apply_layer,
    device,
    directory,
    fifo,
    file,
    hardlink,
    mounted,
    object_names,
    object_path,
    opaque,
    shown,
    symlink,
    tar,
    whiteout,
    with_xattrs,
)

GIB = 1 << 30


def test_every_kind_of_file_appears_as_in_the_tar(driver: Driver) -> None:
    id = apply_layer(
        driver,
        directory("d", 0o1777, 3, 4),
        file("d/setuid", b"suid", 0o4755, 1000, 1001),
        file("d/empty", b"", 0o600, 7, 8),
        symlink("d/link", "../nowhere"),
        hardlink("d/hard", "d/setuid", 0o4755, 1000, 1001),
        device("d/null", 1, 3),
        device("d/disk", 259, 70000, BLOCK),
        fifo("d/fifo"),
    )
    nodes = shown(driver, id)
    assert set(nodes) == {b"d"} | {b"d/" + name for name in b"setuid empty link hard null disk fifo".split()}
    assert nodes[b"d"].mode == stat.S_IFDIR | 0o1777
    assert nodes[b"d/setuid"].mode == stat.S_IFREG | 0o4755
    assert (nodes[b"d/setuid"].uid, nodes[b"d/setuid"].gid) == (1000, 1001)
    assert nodes[b"d/setuid"].content == hashlib.sha256(b"suid").digest()
    assert nodes[b"d/hard"].links == {b"d/setuid", b"d/hard"}
    assert nodes[b"d/link"].content == b"../nowhere"
    assert (nodes[b"d/null"].mode, nodes[b"d/null"].rdev) == (stat.S_IFCHR | 0o620, os.makedev(1, 3))
    assert (nodes[b"d/disk"].mode, nodes[b"d/disk"].rdev) == (stat.S_IFBLK | 0o620, os.makedev(259, 70000))
    assert nodes[b"d/fifo"].mode == stat.S_IFIFO | 0o600
    assert all(node.mtime_ns == MTIME_NS for node in nodes.values()), "times to the nanosecond"


def test_capabilities_and_xattrs_are_kept(driver: Driver) -> None:
    id = apply_layer(
        driver,
        with_xattrs(file("ping", b"elf", 0o755, 5), security__capability=NET_RAW, user__note=b"any\0bytes\xff"),
        with_xattrs(directory("d"), user__note=b"of a directory"),
        with_xattrs(file("empty"), user__note=b""),
    )
    nodes = shown(driver, id)
    assert nodes[b"ping"].xattrs == (("security.capability", NET_RAW), ("user.note", b"any\0bytes\xff"))
    assert nodes[b"d"].xattrs == (("user.note", b"of a directory"),)
    assert nodes[b"empty"].xattrs == (("user.note", b""),)


def test_a_capability_survives_a_hard_link_in_the_tar(driver: Driver) -> None:
    ping = with_xattrs(file("ping", b"elf", 0o755, 5), security__capability=NET_RAW)
    id = apply_layer(driver, ping, hardlink("ping4", "ping", 0o755, 5))
    assert shown(driver, id)[b"ping4"].xattrs == (("security.capability", NET_RAW),)


def test_diff_of_an_image_layer_returns_its_exact_tar(driver: Driver) -> None:
    data = tar(directory("d"), file("d/a", b"a" * 1000), hardlink("d/b", "d/a"), file("d/a.dot", b"a" * 1000))
    data += bytes(7 * 512) + b"bytes after the end marker"
    id = new_layer_id()
    driver.create(id)
    driver.apply_diff(id, "", data)
    assert driver.diff(id) == data


def test_whiteouts_hide_files_and_trees_of_lower_layers(driver: Driver) -> None:
    base = apply_layer(driver, directory("d"), file("d/a", b"a"), file("d/b", b"b"), directory("e"), file("e/c", b"c"))
    top = apply_layer(driver, whiteout("d/a"), whiteout("e"), parent=base)
    assert set(shown(driver, top)) == {b"d", b"d/b"}
    assert driver.changes(top, base) == [("/d", 0), ("/d/a", 2), ("/e", 2)]


def test_an_opaque_directory_hides_lower_entries_and_keeps_its_own(driver: Driver) -> None:
    base = apply_layer(driver, directory("d"), file("d/a", b"a"), directory("d/e"), file("d/e/b", b"b"))
    top = apply_layer(driver, directory("d"), opaque("d"), file("d/new", b"new"), parent=base)
    assert set(shown(driver, top)) == {b"d", b"d/new"}
    after = apply_layer(driver, directory("d"), file("d/new", b"newer"), opaque("d"), parent=base)
    assert set(shown(driver, after)) == {b"d", b"d/new"}, "the marker may come last"


def test_files_and_directories_replace_each_other(driver: Driver) -> None:
    base = apply_layer(driver, directory("was-dir"), file("was-dir/a", b"a"), file("was-file", b"b"))
    top = apply_layer(driver, file("was-dir", b"file"), directory("was-file"), file("was-file/c", b"c"), parent=base)
    assert set(shown(driver, top)) == {b"was-dir", b"was-file", b"was-file/c"}


def test_the_last_entry_of_a_name_wins(driver: Driver) -> None:
    id = apply_layer(
        driver,
        file("twice", b"first"),
        file("twice", b"second!", 0o600),
        directory("d"),
        file("d/a", b"a"),
        file("d", b"now a file"),
        symlink("l", "elsewhere"),
        directory("l", 0o700),
    )
    nodes = shown(driver, id)
    assert set(nodes) == {b"twice", b"d", b"l"}
    assert nodes[b"twice"].content == hashlib.sha256(b"second!").digest()
    assert driver.diff_size(id) == len(b"second!") + len(b"now a file")


def test_equal_contents_with_different_owners_and_modes_share_one_object(driver: Driver) -> None:
    content = os.urandom(100)
    before = object_names(driver.settings)
    id = apply_layer(driver, file("a", content, 0o755, 1, 1), file("b", content, 0o400, 2, 2))
    assert object_names(driver.settings) - before == {object_path(driver.settings, content)}
    nodes = shown(driver, id)
    assert (nodes[b"a"].mode & 0o7777, nodes[b"a"].uid) == (0o755, 1)
    assert (nodes[b"b"].mode & 0o7777, nodes[b"b"].uid) == (0o400, 2)
    assert nodes[b"a"].content == nodes[b"b"].content == hashlib.sha256(content).digest()
    assert nodes[b"a"].links == {b"a"}, "they are not linked in the container"


def test_contents_of_many_layers_are_stored_once(driver: Driver) -> None:
    content = os.urandom(5000)
    before = object_names(driver.settings)
    first = apply_layer(driver, file("a", content))
    second = apply_layer(driver, file("elsewhere/b", content), parent=first)
    assert len(object_names(driver.settings) - before) == 1
    assert driver.diff_size(second, first) == 5000, "a layer's size counts all its files, already stored or not"


def test_missing_parents_are_created(driver: Driver) -> None:
    id = apply_layer(driver, file("a/b/c", b"deep"))
    nodes = shown(driver, id)
    assert nodes[b"a/b"].mode == stat.S_IFDIR | 0o755


def test_names_of_any_bytes_are_kept(driver: Driver) -> None:
    names = [b"caf\xe9", "grüße".encode(), b"new\nline", b"back\\slash", b" ", b"n" * 255]
    id = apply_layer(driver, *(file(name, b"content") for name in names))
    assert set(shown(driver, id)) == set(names)


def test_the_tar_may_begin_with_the_root(driver: Driver) -> None:
    id = apply_layer(driver, directory("."), directory("./d"), file("./d/a", b"a"))
    assert set(shown(driver, id)) == {b"d", b"d/a"}


def test_an_image_layer_is_mounted_read_only(driver: Driver) -> None:
    id = apply_layer(driver, file("a", b"a"))
    with mounted(driver, id) as merged, pytest.raises(OSError) as refused:
        (merged / "new").touch()
    assert refused.value.errno == errno.EROFS


def test_an_empty_layer_is_valid(driver: Driver) -> None:
    id = new_layer_id()
    driver.create(id)
    assert driver.apply_diff(id, "", tar()) == 0
    assert shown(driver, id) == {}
    assert driver.diff(id) == tar()


def test_a_sparse_file_over_4_gib_is_imported_and_read(driver: Driver) -> None:
    size_bytes = 4 * GIB + 4096
    id = new_layer_id()
    driver.create(id)
    data = sparse_tar(b"huge", size_bytes, b"tail".rjust(4096, b"-"))
    assert driver.apply_diff(id, "", data) == size_bytes
    with mounted(driver, id) as merged, (merged / "huge").open("rb") as huge:
        assert os.fstat(huge.fileno()).st_size == size_bytes
        assert huge.read(10) == bytes(10)
        huge.seek(-4, os.SEEK_END)
        assert huge.read() == b"tail"
    assert driver.diff(id) == data


def sparse_tar(name: bytes, size_bytes: int, tail: bytes) -> bytes:
    """Return a tar with a sparse file that has data only in its *tail*, in GNU's PAX format 1.0."""
    sparse_map = b"1\n%d\n%d\n" % (size_bytes - len(tail), len(tail))
    stored = sparse_map + padding(len(sparse_map)) + tail
    records = {
        b"GNU.sparse.major": b"1",
        b"GNU.sparse.minor": b"0",
        b"GNU.sparse.name": name,
        b"GNU.sparse.realsize": b"%d" % size_bytes,
    }
    entry = file(b"GNUSparseFile.0/" + name, stored)[0]
    entry.mtime_ns = 0  # any other time needs an extended header
    return pax_header(records) + header(entry) + stored + END


def pax_header(records: dict[bytes, bytes]) -> bytes:
    """Return an extended header with these records."""
    content = b""
    for key, value in records.items():
        body = b" %s=%s\n" % (key, value)
        length = len(body) + len(str(len(body) + 2))
        length += len(str(length)) - len(str(len(body) + 2))
        content += str(length).encode() + body
    entry: File = file("PaxHeaders/x", content)
    block = bytearray(header(entry[0])[-512:])
    block[156] = ord("x")
    return checksummed(block) + content + padding(len(content))


def checksummed(block: bytearray) -> bytes:
    """Return the header block with a correct checksum."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.slow
def test_a_plain_file_over_4_gib_is_imported_and_read(driver: Driver, tmp_path: Path) -> None:
    size_bytes = 4 * GIB + 1
    id = new_layer_id()
    driver.create(id)
    assert driver.apply_diff(id, "", Zeros(size_bytes)) == size_bytes
    with mounted(driver, id) as merged:
        status = (merged / "zeros").stat()
        assert status.st_size == size_bytes
        with (merged / "zeros").open("rb") as zeros:
            zeros.seek(-1, os.SEEK_END)
            assert zeros.read() == b"\0"


class Zeros:
    """A tar with one file of zeros, generated while it is read."""

    def __init__(self, size_bytes: int) -> None:
        entry = file("zeros")[0]
        entry.size_bytes = size_bytes
        self._head = header(entry)
        self._left_bytes = size_bytes + len(padding(size_bytes)) + len(END)

    def readinto(self, buffer: memoryview, /) -> int:
        if self._head:
            taken = min(len(buffer), len(self._head))
            buffer[:taken] = self._head[:taken]
            self._head = self._head[taken:]
            return taken
        taken = min(len(buffer), self._left_bytes)
        buffer[:taken] = bytes(taken)
        self._left_bytes -= taken
        return taken
