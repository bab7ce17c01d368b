"""Hostile and malformed tars give the same result as Docker's overlay2 or an error that names the entry.

Each test also checks that nothing outside the layer changes, that a rejected layer cannot be mounted, that no files
are left over and that the driver keeps working.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.digest import object_path
from gearworkers.fsck.layers import layer_faults
from gearworkers.layers.store import LayerStore
from gearworkers.settings import Settings
from gearworkers.tar.entry import CHAR, TarEntry
from gearworkers.tar.writer import END, header, padding
from tests.conformance.drivers import Door, Driver, DriverError, new_layer_id
from tests.conformance.layers import (
    NET_RAW,
    File,
    apply_layer,
    committed,
    device,
    directory,
    fifo,
    file,
    hardlink,
    mounted,
    shown,
    symlink,
    tar,
    whiteout,
    with_xattrs,
)
from tests.conformance.test_trees import checksummed, pax_header, sparse_tar
from tests.support.processes import wait_until

DIGEST = bytes(range(32))


def block(**fields: bytes) -> bytes:
    """Return a valid header block with raw fields written over it."""
    block = bytearray(header(TarEntry(b"entry", mtime_ns=0)))
    offsets = {"name": 0, "mode": 100, "uid": 108, "gid": 116, "size": 124, "mtime": 136, "type": 156, "link": 157}
    offsets |= {"major": 329, "minor": 337}
    for name, value in fields.items():
        at = offsets[name]
        block[at : at + len(value)] = value
    return checksummed(block)


def huge(value: int) -> bytes:
    """Return *value* in base-256 encoding for a field of 8 bytes."""
    return (value | 1 << 63).to_bytes(8, "big")


def records(pairs: dict[bytes, bytes], name: bytes = b"entry") -> bytes:
    """Return a tar with an empty file that has these PAX records."""
    return pax_header(pairs) + header(TarEntry(name, mtime_ns=0)) + END


REJECTED: dict[str, tuple[Callable[[], bytes], str]] = {
    "a hard link out of the layer": (lambda: tar(hardlink("out", "../../canary")), r"'out'.*not in this layer"),
    "a hard link to an absolute path": (lambda: tar(hardlink("out", "/etc/passwd")), r"'out'.*not in this layer"),
    "a hard link through a symlink out": (
        lambda: tar(symlink("s", "/etc"), hardlink("out", "s/passwd")),
        r"'out'.*not in this layer",
    ),
    "a hard link to itself": (lambda: tar(hardlink("me", "me")), r"'me'.*not in this layer"),
    "a hard link over the directory of its target": (
        lambda: tar(directory("d"), file("d/a", b"a"), hardlink("d", "d/a")),
        r"'d'.*not in this layer",
    ),
    "a hard link to a directory": (lambda: tar(directory("d"), hardlink("e", "d")), r"'e'.*directory"),
    "a parent that is a file": (lambda: tar(file("f"), file("f/below")), r"'f/below'.*parent"),
    "a parent that is a dangling symlink": (lambda: tar(symlink("s", "none"), file("s/a")), r"'s/a'.*parent"),
    "a parent that is a symlink to itself": (lambda: tar(symlink("s", "s"), file("s/a")), r"'s/a'.*(parent|symbolic)"),
    "an overlay redirect": (
        lambda: tar(with_xattrs(file("r", b"x"), trusted__overlay__redirect=object_path(DIGEST))),
        r"'r'.*trusted\.overlay\.redirect",
    ),
    "an overlay mark on a directory": (
        lambda: tar(with_xattrs(directory("d"), trusted__overlay__opaque=b"y")),
        r"'d/'.*trusted\.overlay\.opaque",
    ),
    "a forged digest": (
        lambda: tar(with_xattrs(file("g", b"x"), trusted__gear__sha256=DIGEST)),
        r"'g'.*trusted\.gear\.sha256",
    ),
    "a name that would shadow the object store": (
        lambda: tar(file(object_path(DIGEST)[1:], b"evil")),
        r"\\x01a?.*top-level",
    ),
    "such a name through a symlink": (
        lambda: tar(symlink("s", "."), file(b"s/\x01A/x", b"evil")),
        r"top-level|'s/\\x01A/x'.*parent",
    ),
    "a whiteout of an object": (lambda: tar(whiteout("\x01A")), r"top-level"),
    "a hard link at the path of an object": (lambda: tar(file("f", b"x"), hardlink(b"\x01A", "f")), r"top-level"),
    "a whiteout without a name": (lambda: tar(file("d/.wh.")), r"'d/\.wh\.'"),
    "a whiteout of the directory above": (lambda: tar(file("d/.wh...")), r"'d/\.wh\.\.\.'"),
    "a whiteout of a path in the same layer": (lambda: tar(file("a", b"a"), whiteout("a")), r"'\.wh\.a'.*same layer"),
    "a name of 5000 characters": (lambda: tar(file("n" * 5000, b"x")), r"'nnn.*5000 bytes.*too long"),
    "a path of 5000 characters": (lambda: tar(file("d/" * 2500 + "f", b"x")), r"'d/d/.*too long"),
    "a symlink to 5000 characters": (lambda: tar(symlink("s", "t" * 5000)), r"'s'.*too long"),
    "a symlink with an empty target": (lambda: block(type=b"2") + END, r"'entry'.*(empty|long)"),
    "an end inside a file": (lambda: tar(file("cut", b"c" * 9000))[:4096], r"'cut'.*content is cut"),
    "an end inside a header": (lambda: tar(file("a", b"a"), file("b", b"b"))[:2148], r"ends early.*header"),
    "an end after an extended header": (
        lambda: pax_header({b"path": b"never"}),
        r"ends early",
    ),
    "a wrong checksum": (lambda: b"X" + tar(file("a", b"a"))[1:], r"byte 0.*checksum"),
    "no tar at all": (
        lambda: b"\x1f\x8b\x08\x00" + os.urandom(2000),
        r"compressed with gzip|compressed data are damaged",
    ),
    "a size that is not a number": (lambda: block(size=b"12x45678901\0") + END, r"'entry'.*octal"),
    "a negative size": (lambda: block(size=b"\xff" * 12) + END, r"'entry'.*negative"),
    "a size of 8 EiB": (lambda: block(size=b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7) + END, r"'entry'"),
    "a wrong size of 1 TiB": (lambda: block(size=b"\x80" + bytes(5) + b"\x01" + bytes(5)) + END, r"'entry'"),
    "a wrong PAX size": (lambda: records({b"size": b"1099511627776"}), r"'entry'"),
    "a PAX size that is not a number": (lambda: records({b"size": b"many"}), r"'entry'.*number"),
    "a PAX size beyond 64 bits": (lambda: records({b"size": b"9" * 40}), r"'entry'.*64 bits"),
    "a PAX record with a wrong length": (
        lambda: checksummed_x(b"999 path=x\n") + header(TarEntry(b"entry")) + END,
        r"length",
    ),
    "a PAX bomb": (lambda: block(type=b"x", size=b"77777777777\0") + bytes(4096), r"extended header is larger"),
    "a long-name bomb": (lambda: block(type=b"L", size=b"77777777777\0") + bytes(4096), r"extended header is larger"),
    "a sparse map that runs backwards": (
        lambda: records({b"GNU.sparse.map": b"10,5,0,5", b"GNU.sparse.size": b"20", b"GNU.sparse.numblocks": b"2"}),
        r"'entry'",
    ),
    "a sparse map larger than the file": (
        lambda: records({b"GNU.sparse.map": b"0,999", b"GNU.sparse.size": b"20", b"GNU.sparse.numblocks": b"1"}),
        r"'entry'",
    ),
    "a sparse file of 4 EiB": (lambda: sparse_tar(b"sparse", 1 << 62, b"t" * 512), r"'sparse'.*free"),
    "a uid beyond 32 bits": (lambda: block(uid=huge(1 << 40)) + END, r"'entry'.*uid"),
    "a gid beyond 32 bits": (lambda: records({b"gid": b"4294967296"}), r"'entry'.*gid"),
    "a negative uid": (lambda: records({b"uid": b"-5"}), r"'entry'.*uid"),
    "a device number beyond the kernel's range": (
        lambda: block(type=b"3", major=huge(1 << 40)) + END,
        r"'entry'.*device",
    ),
    "an unknown type": (lambda: block(type=b"Q") + END, r"'entry'.*type"),
    "a socket": (lambda: block(type=b"s") + END, r"'entry'.*type"),
    "an attribute of 100 KiB": (
        lambda: tar(with_xattrs(file("x", b"x"), user__big=b"v" * 100_000)),
        r"'x'.*attribute",
    ),
    "an attribute's name of 300 characters": (
        lambda: records({b"SCHILY.xattr.user." + b"n" * 300: b"v"}),
        r"'entry'.*attribute",
    ),
    "a NUL in a PAX path": (lambda: records({b"path": b"a\0b"}), r"NUL"),
    "invalid Gear records": (lambda: records({b"GEAR.sha256": b"xyz", b"GEAR.size": b"5"}), r"'entry'.*Gear"),
    "Gear records that contradict the size": (
        lambda: (
            pax_header({b"GEAR.sha256": DIGEST.hex().encode(), b"GEAR.size": b"5"})
            + header(TarEntry(b"entry", size_bytes=3))
            + b"abc"
            + padding(3)
            + END
        ),
        r"'entry'",
    ),
}

ACCEPTED: dict[str, tuple[Callable[[], bytes], set[bytes]]] = {
    "names with ..": (lambda: tar(file("../../canary", b"x"), file("a/../../b", b"y")), {b"canary", b"b"}),
    "absolute names": (lambda: tar(file("/etc/passwd", b"x")), {b"etc", b"etc/passwd"}),
    "a parent that is a symlink out": (
        lambda: tar(directory("etc"), symlink("s", "/etc"), file("s/canary", b"x")),
        {b"etc", b"s", b"etc/canary"},
    ),
    "a parent that is a symlink up and out": (
        lambda: tar(symlink("up", "../../.."), file("up/canary", b"x")),
        {b"up", b"canary"},
    ),
    "a symlink out of the layer": (lambda: tar(symlink("s", "/etc/shadow")), {b"s"}),
    "a file where a directory was": (lambda: tar(directory("d"), file("d/a", b"a"), file("d", b"f")), {b"d"}),
    "a directory where a file was": (lambda: tar(file("d", b"f"), directory("d"), file("d/a")), {b"d", b"d/a"}),
    "the same name twice": (lambda: tar(file("a", b"1"), file("a", b"2")), {b"a"}),
    "names that are not UTF-8": (lambda: tar(file(b"\xff\xfe", b"x")), {b"\xff\xfe"}),
    "a reserved byte below the top level": (lambda: tar(file(b"d/\x01A", b"x")), {b"d", b"d/\x01A"}),
    "a device of the host's disk": (lambda: tar(device("vda", 254, 0, CHAR)), {b"vda"}),
    "an aufs link directory": (
        lambda: tar(directory(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", b"x")),
        {b".wh..wh.plnk", b".wh..wh.plnk/1.2"},
    ),
    "a time before 1970 and one after 2500": (
        lambda: records({b"mtime": b"-1.5"}, b"old")[:-1024] + records({b"mtime": b"9223372036854775807"}, b"new"),
        {b"old", b"new"},
    ),
    "no end marker": (lambda: tar(file("a", b"a"))[:-1024], {b"a"}),
    "a size on a directory": (lambda: block(type=b"5", size=b"00000001000\0") + END, {b"entry"}),
    "a global header": (
        lambda: checksummed_x(b"30 comment=of the whole tar.\n\n"[:30], b"g") + tar(file("a", b"a")),
        {b"a"},
    ),
}


def checksummed_x(content: bytes, kind: bytes = b"x") -> bytes:
    """Return an extended header with arbitrary content."""
    size = b"%011o\0" % len(content)
    return block(type=kind, size=size) + content + padding(len(content))


@pytest.fixture
def untouched(door: Door, tmp_path: Path) -> Iterator[None]:
    """Check that nothing around GEAR_ROOT changes and that no leftovers stay in it."""
    root = door.settings.gear_root
    canaries = {root.parent / "canary", root / "canary", tmp_path / "canary"}
    for canary in canaries:
        canary.write_text("untouched")
    hosts = [Path("/etc"), Path("/etc/passwd"), root.parent]
    before = [facts(path) for path in hosts]
    yield
    assert [facts(path) for path in hosts] == before
    for canary in canaries:
        assert (canary.read_text(), canary.stat().st_nlink) == ("untouched", 1)
        canary.unlink()
    check_consistency(door.settings)


def facts(path: Path) -> tuple[int, int, int, int]:
    """Return the attributes that a write to *path* would change."""
    status = path.stat()
    return status.st_mtime_ns, status.st_nlink, status.st_mode, status.st_uid


def check_consistency(settings: Settings) -> None:
    """Check that staging is empty, all objects match their digests and all published layers are complete."""
    build = settings.gear_build_path
    wait_until(lambda: not any(build.iterdir()), "staging is empty")
    store = ObjectStore(settings.gear_public_cache_path)
    faults = [
        fault for fault in layer_faults(LayerStore(settings, store), store, []) if "not finish" not in fault.problem
    ]
    assert not faults


@pytest.mark.parametrize("case", REJECTED)
@pytest.mark.usefixtures("untouched")
def test_the_error_names_the_entry(door: Door, case: str) -> None:
    make_tar, reason = REJECTED[case]
    base = apply_layer(door, file("lower", b"lower"))
    id = new_layer_id()
    door.create(id, base)
    with pytest.raises(DriverError, match=f"(?s){reason}") as refused:
        door.apply_diff(id, base, make_tar())
    assert "internal error" not in str(refused.value)
    with pytest.raises(DriverError):
        door.get(id)
    door.remove(id)
    after = apply_layer(door, file("after", b"after"), parent=base)
    assert set(shown(door, after)) == {b"lower", b"after"}, "the driver still works"


@pytest.mark.parametrize("case", ACCEPTED)
@pytest.mark.usefixtures("untouched")
def test_the_result_equals_that_of_overlay2(door: Door, case: str) -> None:
    make_tar, names = ACCEPTED[case]
    id = new_layer_id()
    data = make_tar()
    door.create(id)
    door.apply_diff(id, "", data)
    assert set(shown(door, id)) == names


@pytest.mark.parametrize("case", ACCEPTED)
def test_diff_returns_the_same_tar(driver: Driver, case: str) -> None:
    id, data = new_layer_id(), ACCEPTED[case][0]()
    driver.create(id)
    driver.apply_diff(id, "", data)
    assert driver.diff(id) == data


def test_whiteouts_in_odd_places_hide_only_in_their_layer(door: Door) -> None:
    base = apply_layer(door, directory("d"), file("d/a", b"a"), file("keep", b"k"))
    top = apply_layer(door, whiteout("../d/a"), whiteout("/x/../not-there"), parent=base)
    assert set(shown(door, top)) == {b"d", b"keep"}


def test_a_container_removes_a_name_of_255_bytes(driver: Driver) -> None:
    base, id = apply_layer(driver, file("n" * 255, b"n"), file("kept", b"k")), new_layer_id()
    driver.create_read_write(id, base)
    with mounted(driver, id) as merged:
        (merged / ("n" * 255)).unlink()
    assert set(shown(driver, committed(driver, id, base))) == {b"kept"}


def test_many_long_names_fit_in_one_directory(door: Door) -> None:
    names = [b"%d-" % number + b"x" * (number * 7 % 240) for number in range(3000)]
    id = apply_layer(door, directory("d"), *(file(b"d/" + name) for name in names))
    assert set(shown(door, id)) == {b"d"} | {b"d/" + name for name in names}


def test_a_deep_tree_is_imported_and_read(driver: Driver) -> None:
    id = apply_layer(driver, file("d/" * 1900 + "deepest", b"found"))
    with mounted(driver, id) as merged:
        here = os.open(merged, os.O_RDONLY)
        for _ in range(1900):
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        assert os.listdir(here) == ["deepest"]
        os.close(here)
    assert len(driver.changes(id)) == 1901


@pytest.mark.parametrize(("depth", "name", "reached"), [(1050, "d", 1050), (30, "n" * 200, 20)])
def test_directories_deeper_than_the_stack_or_path_limit_are_measured_committed_and_removed(
    driver: Driver, depth: int, name: str, reached: int
) -> None:
    """A commit omits files whose paths are too long to reach, as with overlay2."""
    base, id = apply_layer(driver, file("a", b"a")), new_layer_id()
    driver.create_read_write(id, base)
    with mounted(driver, id) as merged:
        make_nested_directories(merged, depth, name)
    has_file = reached == depth
    assert driver.diff_size(id, base) == 5 * has_file
    assert len(driver.changes(id, base)) >= reached + has_file
    image = committed(driver, id, base)
    assert len(driver.changes(image, base)) == reached + has_file
    for layer in (image, id):
        driver.remove(layer)
    assert not list(driver.settings.gear_build_path.iterdir())


def make_nested_directories(top: Path, depth: int, name: str) -> None:
    """Create nested directories, and a file of 5 bytes in the last one."""
    here = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    fd = os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(fd, b"found")
    os.close(fd)
    os.close(here)


@pytest.mark.parametrize("entry", [symlink("x", "y"), device("x", 1, 3), fifo("x"), file("x", b"x")])
def test_xattrs_that_the_kernel_rejects_for_the_file_type_are_omitted(driver: Driver, entry: File) -> None:
    """Docker ignores the error as well. With these xattrs, containers could not change the file."""
    entry[0].xattrs = {b"user.a": b"1", b"system.posix_acl_default": b"\2\0\0\0", b"trusted.a": b"2"}
    base, id = apply_layer(driver, entry), new_layer_id()
    driver.create_read_write(id, base)
    with mounted(driver, id) as merged:
        (merged / "x").rename(merged / "renamed")
        os.chown(merged / "renamed", 7, 8, follow_symlinks=False)
        names = set(os.listxattr(merged / "renamed", follow_symlinks=False))
    assert names == {"trusted.a"} | ({"user.a"} if entry[1] else set())
    assert set(shown(driver, committed(driver, id, base))) == {b"renamed"}


@pytest.mark.parametrize("value", [b"", b"junk", NET_RAW[:12], NET_RAW + bytes(4), b"\4" + NET_RAW[1:]])
def test_a_malformed_capability_is_rejected(door: Door, value: bytes) -> None:
    id = new_layer_id()
    door.create(id)
    with pytest.raises(DriverError, match=r"'x'.*capability.*malformed"):
        door.apply_diff(id, "", tar(with_xattrs(file("x", b"x"), security__capability=value)))
    door.remove(id)
