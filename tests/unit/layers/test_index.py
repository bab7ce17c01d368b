"""Layer indexes: names have the same meaning as in Docker, and the kernel reads the images correctly."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gearworkers.digest import object_path
from gearworkers.errors import InvalidInput, ResourceExhausted
from gearworkers.layers.idmap import IdMaps, IdRange
from gearworkers.layers.index import tree as index_module
from gearworkers.layers.index.mount import mount_index
from gearworkers.layers.index.probe import CHECK_NAME, check_index
from gearworkers.layers.index.tree import LayerTree
from gearworkers.mounts.overlay import unmount
from gearworkers.mounts.probe import probe
from gearworkers.tar.entry import CHAR, DIR, FIFO, HARDLINK, REG, SYMLINK, TarEntry
from gearworkers.util import syscalls
from tests.support.processes import wait_until

DIGEST = bytes(range(32))
LOOP_MAJOR = 7
FIRST = 1 << 31


def index_of(*entries: TarEntry, ids: IdMaps | None = None) -> LayerTree:
    index = LayerTree(ids or IdMaps(), time_ns=1_700_000_000_000_000_007)
    for entry in entries:
        index.add(entry, DIGEST if entry.type == REG and entry.size_bytes else None)
    return index


@contextmanager
def mounted(index: LayerTree, place: Path) -> Iterator[Path]:
    image, tree = place / "index.erofs", place / "tree"
    with open(image, "xb") as file:
        index.image(bytes(16)).write(file, FIRST)
    tree.mkdir()
    mount_index(image, tree)
    try:
        yield tree
    finally:
        unmount(tree)


@pytest.mark.parametrize("count", [1, 2, 150, 151, 152, 153, 154, 5000])
def test_every_name_of_a_directory_is_found(count: int, tmp_path: Path) -> None:
    check_names("dir", count, tmp_path)


@pytest.mark.parametrize("count", [0, 1, 53, 54, 55, 56, 57, 150, 5000])
def test_every_name_of_the_root_is_found_in_block_0_or_after_it(count: int, tmp_path: Path) -> None:
    check_names(".", count, tmp_path)


def check_names(directory: str, count: int, place: Path) -> None:
    names = {f"file-{number:07d}-of-many".encode() for number in range(count)}
    with mounted(index_of(*(TarEntry(os.fsencode(directory) + b"/" + name) for name in names)), place) as tree:
        assert set(os.listdir(os.fsencode(tree / directory))) == names
        for name in names:
            os.lstat(os.fsencode(tree / directory) + b"/" + name)
        assert not (tree / directory / "file-0000000-of-man").exists()


@pytest.mark.parametrize("name_bytes", range(240, 256))
def test_a_single_name_at_the_end_of_a_directory_is_found(name_bytes: int, tmp_path: Path) -> None:
    names = [b"%02d" % number + b"x" * (name_bytes - 2) for number in range(16)]
    entries = [TarEntry(b"dir/" + name) for name in names] + [TarEntry(b"zz-behind", size_bytes=1)]
    with mounted(index_of(*entries), tmp_path) as tree:
        assert sorted(os.listdir(os.fsencode(tree / "dir"))) == names
        for name in names:
            os.lstat(os.fsencode(tree / "dir") + b"/" + name)


def test_the_index_has_the_metadata_of_the_tar(tmp_path: Path) -> None:
    index = index_of(
        TarEntry(
            b"f", mode=0o6754, uid=70000, gid=4, size_bytes=5 << 30, mtime_ns=-1_500_000_000, xattrs={b"user.a": b"b"}
        ),
        TarEntry(b"d", type=DIR, mode=0o1777, mtime_ns=123_456_789_987_654_321),
        TarEntry(b"c", type=CHAR, mode=0o600, devmajor=300, devminor=70000),
        TarEntry(b"p", type=FIFO, mode=0o640),
        TarEntry(b"h", type=HARDLINK, linkname=b"f", mode=0o6754, uid=70000, gid=4, mtime_ns=-1_500_000_000),
    )
    with mounted(index, tmp_path) as tree:
        file = (tree / "f").stat()
        assert (file.st_mode, file.st_uid, file.st_gid, file.st_size) == (stat.S_IFREG | 0o6754, 70000, 4, 5 << 30)
        assert (file.st_mtime_ns, file.st_nlink, (tree / "h").stat().st_ino) == (-1_500_000_000, 2, file.st_ino)
        assert os.getxattr(tree / "f", "user.a") == b"b"
        assert os.getxattr(tree / "f", "trusted.overlay.metacopy") == b""
        assert os.getxattr(tree / "f", "trusted.overlay.redirect") == object_path(DIGEST)
        assert (tree / "d").stat().st_mtime_ns == 123_456_789_987_654_321
        assert (tree / "d").stat().st_mode == stat.S_IFDIR | 0o1777
        assert (tree / "c").stat().st_rdev == os.makedev(300, 70000)
        assert stat.S_ISFIFO((tree / "p").stat().st_mode)


@pytest.mark.parametrize("target_bytes", [1, 3000, 3950, 4030, 4031, 4032, 4095])
def test_symlinks_of_every_length_are_read(target_bytes: int, tmp_path: Path) -> None:
    target = b"t" * target_bytes
    with mounted(
        index_of(TarEntry(b"a", size_bytes=3), TarEntry(b"l", type=SYMLINK, linkname=target)), tmp_path
    ) as tree:
        assert os.readlink(os.fsencode(tree / "l")) == target


def test_attributes_larger_than_a_block_are_read(tmp_path: Path) -> None:
    xattrs = {b"user.%02d" % number: bytes([number]) * 1000 for number in range(40)}
    entries = [TarEntry(b"f", size_bytes=1, xattrs=xattrs), TarEntry(b"l", type=SYMLINK, linkname=b"f")]
    with mounted(index_of(*entries), tmp_path) as tree:
        assert os.getxattr(tree / "f", "user.39") == xattrs[b"user.39"]
        assert os.readlink(tree / "l") == "f"


def test_a_parent_that_is_a_symlink_is_followed_inside_the_layer(tmp_path: Path) -> None:
    index = index_of(
        TarEntry(b"usr/lib", type=DIR),
        TarEntry(b"lib", type=SYMLINK, linkname=b"usr/lib"),
        TarEntry(b"out", type=SYMLINK, linkname=b"/../../usr"),
        TarEntry(b"lib/one"),
        TarEntry(b"out/two"),
        TarEntry(b"../../three"),
    )
    with mounted(index, tmp_path) as tree:
        assert {path.name for path in (tree / "usr").rglob("*")} == {"lib", "one", "two"}
        assert (tree / "three").exists()


def test_the_last_entry_of_a_name_wins(tmp_path: Path) -> None:
    index = index_of(
        TarEntry(b"a/b/c"),
        TarEntry(b"a", size_bytes=2),
        TarEntry(b"d", size_bytes=3),
        TarEntry(b"d", type=DIR, mode=0o700),
        TarEntry(b"d/e"),
        TarEntry(b"d", type=DIR, mode=0o711),
    )
    assert index.size_bytes() == 2
    with mounted(index, tmp_path) as tree:
        assert (tree / "a").is_file()
        assert (tree / "d" / "e").exists()
        assert (tree / "d").stat().st_mode & 0o7777 == 0o711


def test_the_owners_of_the_tar_are_mapped_to_the_host(tmp_path: Path) -> None:
    ids = IdMaps((IdRange(0, 100000, 65536),), (IdRange(0, 200000, 65536),))
    with mounted(index_of(TarEntry(b"implied/f", uid=1, gid=2), ids=ids), tmp_path) as tree:
        owners = [(path.stat().st_uid, path.stat().st_gid) for path in (tree, tree / "implied", tree / "implied/f")]
        assert owners == [(100000, 200000), (100000, 200000), (100001, 200002)]


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([TarEntry(b"a"), TarEntry(b"a/b")], "not a directory"),
        ([TarEntry(b"l", type=SYMLINK, linkname=b"nowhere"), TarEntry(b"l/b")], "not a directory"),
        ([TarEntry(b"l", type=SYMLINK, linkname=b"l"), TarEntry(b"l/b")], "too many symbolic links"),
        ([TarEntry(b"h", type=HARDLINK, linkname=b"../etc/shadow")], "not in this layer"),
        ([TarEntry(b"h", type=HARDLINK, linkname=b"h")], "not in this layer"),
        ([TarEntry(b"d", type=DIR), TarEntry(b"h", type=HARDLINK, linkname=b"d")], "is a directory"),
        ([TarEntry(b"\x01a/x")], "0x01"),
        ([TarEntry(b"l", type=SYMLINK, linkname=b"/"), TarEntry(b"l/\x01a/x")], "0x01"),
        ([TarEntry(b".wh.\x01a")], "0x01"),
        ([TarEntry(b"f", xattrs={b"trusted.overlay.redirect": b"/x"})], "would redirect"),
        ([TarEntry(b"f", xattrs={b"trusted.gear.sha256": DIGEST})], "would redirect"),
        ([TarEntry(b"n" * 256)], "too long"),
        ([TarEntry(b"n/" * 2500 + b"n")], "too long"),
        ([TarEntry(b"f"), TarEntry(b".wh.f")], "whiteout"),
        ([TarEntry(b"l", type=SYMLINK, linkname=b"")], "link target"),
    ],
)
def test_entries_that_docker_rejects_or_that_reach_outside_are_rejected(entries: list[TarEntry], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        index_of(*entries)


def test_an_index_is_mounted_through_a_loop_device_if_the_kernel_does_not_mount_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))

    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "fsconfig_create", refuse)
        with mounted(index_of(TarEntry(b"a", size_bytes=5)), tmp_path) as tree:
            assert os.major(tree.stat().st_dev) == LOOP_MAJOR
            assert (tree / "a").stat().st_size == 5
    # The release is delayed while udev or a new mount namespace still uses the device.
    losetup = ["losetup", "--associated", str(tmp_path / "index.erofs")]
    wait_until(
        lambda: not subprocess.run(losetup, capture_output=True, check=True).stdout, "the loop device is released"
    )


@pytest.mark.parametrize(
    ("place", "mode"), [("/var/tmp", "mounted from their files"), ("/dev/shm", "mounted through loop devices")]
)
def test_the_check_reports_the_mount_mode_and_leaves_no_files(place: str, mode: str) -> None:
    """The kernel does not mount files on tmpfs, which `/tmp` is on Debian 13."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        check = next(check for check in probe(Path(name), check_index) if check.name == CHECK_NAME)
        assert (check.ok, check.found) == (True, mode)
        assert not os.listdir(name)


def test_the_check_gives_advice_on_a_kernel_without_erofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> int:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(syscalls, "fsopen", absent)
    check = check_index(tmp_path)
    assert check.needed and not check.ok
    assert "CONFIG_EROFS_FS" in check.advice


def test_the_size_of_attributes_and_link_targets_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_EXTRA_BYTES", 1000)
    for many in (
        [TarEntry(b"%d" % number, xattrs={b"user.a": bytes(90)}) for number in range(20)],
        [TarEntry(b"%d" % number, type=SYMLINK, linkname=b"t" * 90) for number in range(20)],
        [
            TarEntry(b"0"),
            *(TarEntry(b"h", type=HARDLINK, linkname=b"0", xattrs={b"user.a": bytes(90)}) for _ in range(20)),
        ],
    ):
        with pytest.raises(ResourceExhausted, match="1000 bytes of extended attributes"):
            index_of(*many)


def test_a_tree_is_right_although_the_cache_of_directories_overflows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MAX_CACHED_DIRECTORIES", 3)
    index = index_of(*(TarEntry(b"%d/%d/file" % (number % 7, number % 5)) for number in range(35)))
    with mounted(index, tmp_path) as tree:
        assert len(list(tree.glob("*/*/file"))) == 35
