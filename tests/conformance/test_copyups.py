"""Changes that a container makes to files of its image, committed and read back."""

from __future__ import annotations

import array
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.drivers import Driver, new_layer_id
from tests.conformance.layers import (
    NET_RAW,
    apply_layer,
    committed,
    device,
    directory,
    file,
    hardlink,
    mounted,
    object_names,
    shown,
    symlink,
    with_xattrs,
)

BIG = bytes(range(256)) * 4096
FS_IOC_GETFLAGS = 0x80086601


def image(driver: Driver) -> str:
    """Create an image of two layers; return the id of the upper one."""
    base = apply_layer(
        driver,
        directory("d"),
        file("d/big", BIG, 0o644, 1, 1),
        file("d/small", b"small"),
        directory("d/sub"),
        file("d/sub/deep", b"deep"),
        symlink("d/link", "big"),
        file("gone", b"gone"),
        with_xattrs(file("noted", b"noted"), user__note=b"before"),
    )
    return apply_layer(driver, directory("d"), file("d/upper", b"of the second layer"), parent=base)


def chmod(root: Path) -> None:
    (root / "d/big").chmod(0o4711)


def chown_all(root: Path) -> None:
    for directory_name, _, names in os.walk(root / "d"):
        for path in [directory_name, *(os.path.join(directory_name, name) for name in names)]:
            os.chown(path, 1234, 4321, follow_symlinks=False)


def rename_directory(root: Path) -> None:
    (root / "d").rename(root / "renamed")


def rename_directory_and_put_another(root: Path) -> None:
    rename_directory(root)
    (root / "d").mkdir()
    (root / "d" / "small").write_text("another")


def rename_after_chmod(root: Path) -> None:
    (root / "d/big").chmod(0o600)
    (root / "d/big").rename(root / "moved")


def rename_without_touch(root: Path) -> None:
    (root / "d/big").rename(root / "d/moved")


def link_after_chown(root: Path) -> None:
    os.chown(root / "d/big", 9, 9)
    os.link(root / "d/big", root / "linked")


def link_without_touch(root: Path) -> None:
    os.link(root / "d/small", root / "linked")


def utime(root: Path) -> None:
    os.utime(root / "d/big", ns=(1, 1_234_567_890_987_654_321))


def xattrs(root: Path) -> None:
    os.setxattr(root / "noted", "user.note", b"after")
    os.setxattr(root / "d", "user.dir", b"x")


def write_and_truncate(root: Path) -> None:
    with (root / "d/big").open("r+b") as big:
        big.write(b"changed")
    os.truncate(root / "d/small", 2)


def remove_and_recreate(root: Path) -> None:
    (root / "gone").unlink()
    for path in (root / "d/sub").iterdir():
        path.unlink()
    (root / "d/sub").rmdir()
    (root / "d/sub").mkdir()
    (root / "d/sub/fresh").write_text("fresh")


def special(root: Path) -> None:
    os.mknod(root / "node", stat.S_IFBLK | 0o600, os.makedev(8, 1))
    os.mkfifo(root / "d/fifo", 0o640)
    os.symlink(b"\xff\xfe", root / "symlink")


METADATA_CHANGES = (
    chmod,
    chown_all,
    rename_directory,
    rename_after_chmod,
    rename_without_touch,
    link_after_chown,
    utime,
)
CHANGES = (
    *METADATA_CHANGES,
    rename_directory_and_put_another,
    link_without_touch,
    xattrs,
    write_and_truncate,
    remove_and_recreate,
    special,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_container_changes_are_committed_and_read_back(driver: Driver, change: Callable[[Path], None]) -> None:
    parent, id = image(driver), new_layer_id()
    driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        change(merged)
    seen = shown(driver, id)
    assert seen != shown(driver, parent)
    assert shown(driver, committed(driver, id, parent)) == seen


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_a_diff_is_the_same_while_mounted_and_unmounted(driver: Driver, change: Callable[[Path], None]) -> None:
    parent, id = image(driver), new_layer_id()
    driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        change(merged)
        while_mounted = driver.diff(id, parent), driver.changes(id, parent), driver.diff_size(id, parent)
    assert (driver.diff(id, parent), driver.changes(id, parent), driver.diff_size(id, parent)) == while_mounted


@pytest.mark.parametrize("change", METADATA_CHANGES, ids=lambda change: str(change.__name__))
def test_metadata_changes_and_renames_copy_no_data(driver: Driver, change: Callable[[Path], None]) -> None:
    parent, id = image(driver), new_layer_id()
    driver.create_read_write(id, parent)
    before = object_names(driver.settings)
    with mounted(driver, id) as merged:
        change(merged)
        upper = Path(driver.get_metadata(id)["UpperDir"])
        assert _allocated_bytes(upper) < len(BIG) // 4
    committed(driver, id, parent)
    assert object_names(driver.settings) - before == set(), "the commit stores no new object"


def test_hard_links_of_a_container_are_kept(driver: Driver) -> None:
    parent, id = image(driver), new_layer_id()
    driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        (merged / "one").write_text("one inode")
        os.link(merged / "one", merged / "d/two")
    assert driver.diff_size(id, parent) == len("one inode"), "each inode counts once"
    nodes = shown(driver, committed(driver, id, parent))
    assert nodes[b"one"].links == {b"one", b"d/two"}


def test_a_capability_of_a_file_with_two_names_is_committed(driver: Driver) -> None:
    parent, id = image(driver), new_layer_id()
    driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        (merged / "ping").write_text("elf")
        os.link(merged / "ping", merged / "ping4")
        os.setxattr(merged / "ping", "security.capability", NET_RAW)
    data = driver.diff(id, parent)
    assert data.count(b"SCHILY.xattr.security.capability") == 2, "other drivers lose it at a link that lacks it"
    assert shown(driver, committed(driver, id, parent))[b"ping4"].xattrs == (("security.capability", NET_RAW),)


def test_a_hard_link_of_the_image_breaks_when_one_name_is_written(driver: Driver) -> None:
    parent, id = apply_layer(driver, file("a", b"a"), hardlink("b", "a"), device("n", 1, 3)), new_layer_id()
    driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        (merged / "a").write_text("new")
        assert (merged / "b").read_text() == "a"
    nodes = shown(driver, committed(driver, id, parent))
    assert nodes[b"a"].content != nodes[b"b"].content


def test_a_commit_of_a_commit_of_a_rename_is_read_back(driver: Driver) -> None:
    parent = image(driver)
    for turn in range(3):
        id = new_layer_id()
        driver.create_read_write(id, parent)
        with mounted(driver, id) as merged:
            (merged / ("d" if not turn else f"d{turn - 1}")).rename(merged / f"d{turn}")
            (merged / f"d{turn}/big").chmod(0o600 + turn)
        seen = shown(driver, id)
        parent = committed(driver, id, parent)
        assert shown(driver, parent) == seen


def test_a_container_on_a_container_is_read_back(driver: Driver) -> None:
    parent, lower, upper = image(driver), new_layer_id(), new_layer_id()
    driver.create_read_write(lower, parent)
    with mounted(driver, lower) as merged:
        rename_directory(merged)
        (merged / "renamed/big").chmod(0o600)
    driver.create_read_write(upper, lower)
    with mounted(driver, upper) as merged:
        assert (merged / "renamed/big").read_bytes() == BIG
        (merged / "renamed/big").rename(merged / "again")
        (merged / "renamed/sub").rename(merged / "sub")
    seen = shown(driver, upper)
    middle = committed(driver, lower, parent)
    assert shown(driver, middle) == shown(driver, lower)
    top = new_layer_id()
    driver.create(top, middle)
    driver.apply_diff(top, middle, driver.diff(upper, lower))
    assert shown(driver, top) == seen


def _allocated_bytes(directory_path: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in directory_path.rglob("*") if path.is_file())


def test_an_acl_is_set_on_changed_and_new_files_and_committed(driver: Driver) -> None:
    """The kernel rejects ACLs on unchanged files: the overlay asks the lower file system, and EROFS is read-only."""
    acl = bytes.fromhex("0200000001000600ffffffff02000400d204000004000400ffffffff10000600ffffffff20000400ffffffff")
    name = "system.posix_acl_access"
    has_acl = with_xattrs(file("b"), system__posix_acl_access=acl)
    parent, id = apply_layer(driver, file("a", b"a"), directory("d"), has_acl), new_layer_id()
    driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        assert os.getxattr(merged / "b", name) == acl
        (merged / "new").touch()
        for path in (merged / "a", merged / "d"):
            with pytest.raises(OSError, match="not supported"):
                os.setxattr(path, name, acl)
            path.chmod(stat.S_IMODE(path.stat().st_mode))
        for path in (merged / "a", merged / "d", merged / "new"):
            os.setxattr(path, name, acl)
    nodes = shown(driver, committed(driver, id, parent))
    assert all(dict(nodes[path].xattrs)[name] == acl for path in (b"a", b"b", b"d", b"new"))


def test_flags_are_readable_only_on_changed_and_new_files(driver: Driver) -> None:
    """The overlay asks the lower file system, and EROFS has no flags; `lsattr` and `chattr` read them first."""
    parent, id = apply_layer(driver, file("a", b"a"), directory("d")), new_layer_id()
    driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        (merged / "new").touch()
        for path in (merged / "a", merged / "d"):
            with pytest.raises(OSError, match="Inappropriate ioctl"):  # ENOTTY
                _flags(path)
            path.chmod(stat.S_IMODE(path.stat().st_mode))
        for path in (merged / "a", merged / "d", merged / "new"):
            _flags(path)


def _flags(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        flags = array.array("l", [0])
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
        return flags[0]
    finally:
        os.close(fd)
