"""Overlay mounts on the real kernel, and the system calls under them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.errors import GearError, InvalidInput, NotFound
from gearworkers.mounts.mountinfo import is_data_layer, is_mount_point
from gearworkers.mounts.overlay import OverlaySpec, clear_volatile, detached, is_mounted, mount, unmount
from gearworkers.util import syscalls
from tests.support.overlays import make_index


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    for name in ("public", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    yield tmp_path
    while is_mounted(tmp_path / "merged"):
        unmount(tmp_path / "merged")


def layer(root: Path, number: int) -> Path:
    tree = root / f"{number:03d}-{'x' * 100}"
    tree.mkdir()
    (tree / f"file{number}").write_text(f"content {number}")
    make_index(tree, root / "public")
    return tree


def spec(root: Path, layers: int) -> OverlaySpec:
    lowers = tuple(layer(root, number) for number in range(layers))
    return OverlaySpec(lowers, (root / "public",), root / "upper", root / "work")


@pytest.mark.parametrize("layers", [1, 2, 498])
@pytest.mark.slow
def test_index_trees_show_the_contents_of_the_store(root: Path, layers: int) -> None:
    mount(spec(root, layers), root / "merged")
    shown = {path.name: path.read_text() for path in (root / "merged").iterdir()}
    assert shown == {f"file{number}": f"content {number}" for number in range(layers)}


def test_layers_are_added_by_their_path_in_proc_if_the_kernel_accepts_no_descriptors(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "as before Linux 6.13")

    monkeypatch.setattr(syscalls, "fsconfig_fd", refuse)
    mount(spec(root, 3), root / "merged")
    (root / "merged/new").write_text("new")
    assert (root / "merged/file2").read_text() == "content 2"
    assert (root / "upper/new").exists()


@pytest.mark.parametrize("accepts_descriptors", [True, False])
def test_a_data_layer_is_found_at_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accepts_descriptors: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "as before Linux 6.13")

    if not accepts_descriptors:
        monkeypatch.setattr(syscalls, "fsconfig_fd", refuse)
    odd = tmp_path / "a b,c:d\\e\tf"
    for name in ("lower", "public", "public2", "merged"):
        (odd / name).mkdir(parents=True)
    mount(OverlaySpec((odd / "lower",), (odd / "public2",)), odd / "merged")
    assert is_mount_point(odd / "merged") and not is_mount_point(odd)
    assert [is_data_layer(odd / name) for name in ("public2", "public", "lower")] == [True, False, False]
    unmount(odd / "merged")
    assert not is_data_layer(odd / "public2")
    (tmp_path / "link").symlink_to(odd.name)
    link = tmp_path / "link"
    mount(OverlaySpec((link / "lower",), (link / "public2",)), link / "merged")
    assert is_mount_point(link / "merged") and not is_mount_point(link / "lower")
    assert [is_data_layer(link / name) for name in ("public2", "public", "lower")] == [True, False, False]
    unmount(link / "merged")


def test_writes_go_to_the_upper(root: Path) -> None:
    mount(spec(root, 2), root / "merged")
    (root / "merged/new").write_text("new")
    assert (root / "upper/new").read_text() == "new"


def test_is_mounted_is_true_from_mount_to_unmount(root: Path) -> None:
    assert not is_mounted(root / "merged")
    mount(spec(root, 1), root / "merged")
    assert is_mounted(root / "merged")
    unmount(root / "merged")
    assert not is_mounted(root / "merged")


def test_unmounting_does_nothing_if_the_target_is_missing_or_not_mounted(root: Path) -> None:
    unmount(root / "merged")
    unmount(root / "nowhere")
    assert not is_mounted(root / "nowhere")


def test_unmounting_succeeds_with_a_file_open_and_the_file_stays_readable(root: Path) -> None:
    mount(spec(root, 1), root / "merged")
    with (root / "merged/file0").open() as file:
        unmount(root / "merged")
        assert not is_mounted(root / "merged")
        assert file.read() == "content 0"


def test_a_detached_mount_is_invisible_and_read_only(root: Path) -> None:
    with detached(spec(root, 2)) as fd:
        assert sorted(os.listdir(fd)) == ["file0", "file1"]
        with pytest.raises(OSError, match="Read-only") as caught:
            os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        assert caught.value.errno == errno.EROFS
        assert os.fsencode(root) not in Path("/proc/self/mountinfo").read_bytes()


def test_a_detached_mount_shows_the_upper_of_a_mounted_layer(root: Path) -> None:
    overlay = spec(root, 2)
    mount(overlay, root / "merged")
    (root / "merged/file0").unlink()
    (root / "merged/file1").rename(root / "merged/renamed")
    with detached(overlay) as fd:
        assert os.listdir(fd) == ["renamed"]
        with open(os.open("renamed", os.O_RDONLY, dir_fd=fd)) as file:
            assert file.read() == "content 1"


@pytest.mark.parametrize("with_data", [True, False])
def test_whiteouts_apply_in_a_mount_of_a_single_lower(root: Path, with_data: bool) -> None:
    tree = layer(root, 0)
    os.mknod(tree / "whiteout", 0o20000, 0)
    with detached(OverlaySpec((tree,), (root / "public",) if with_data else ())) as fd:
        assert os.listdir(fd) == ["file0"]


def test_a_failed_mount_leaves_nothing_and_reports_the_path(root: Path) -> None:
    overlay = spec(root, 1)
    refused = OverlaySpec(overlay.lowers, overlay.data, overlay.upper, overlay.upper)
    with pytest.raises(GearError, match="merged"):
        mount(refused, root / "merged")
    assert not is_mounted(root / "merged")
    with pytest.raises(NotFound, match="nowhere"):
        mount(OverlaySpec((root / "nowhere",)), root / "merged")
    with pytest.raises(NotFound, match="absent"):
        mount(overlay, root / "absent")
    assert os.fsencode(root) not in Path("/proc/self/mountinfo").read_bytes()


def test_an_upper_without_work_and_a_mount_without_lowers_are_rejected(root: Path) -> None:
    for invalid in (OverlaySpec(()), OverlaySpec((root / "public",), upper=root / "upper")):
        with pytest.raises(InvalidInput):
            mount(invalid, root / "merged")


def test_mounts_leave_no_descriptor_open(root: Path) -> None:
    overlay = spec(root, 3)
    before = os.listdir("/proc/self/fd")
    mount(overlay, root / "merged")
    with detached(overlay), pytest.raises(NotFound):
        mount(OverlaySpec((root / "nowhere",)), root / "merged")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_volatile_upper_is_mounted_again_only_after_its_mark_is_cleared(root: Path) -> None:
    overlay = spec(root, 1)
    volatile = OverlaySpec(overlay.lowers, overlay.data, overlay.upper, overlay.work, volatile=True)
    mount(volatile, root / "merged")
    (root / "merged/new").write_text("new")
    unmount(root / "merged")
    with pytest.raises(GearError):
        mount(overlay, root / "merged")
    clear_volatile(root / "work")
    clear_volatile(root / "work")
    mount(overlay, root / "merged")
    assert (root / "merged/new").read_text() == "new"


def test_a_selinux_label_reaches_the_kernel(root: Path) -> None:
    overlay = spec(root, 1)
    labelled = OverlaySpec(
        overlay.lowers,
        overlay.data,
        overlay.upper,
        overlay.work,
        context="system_u:object_r:container_file_t:s0:c1,c2",
    )
    if Path("/sys/fs/selinux/enforce").exists():
        mount(labelled, root / "merged")
        assert b"c1,c2" in Path("/proc/self/mountinfo").read_bytes()
    else:
        with pytest.raises(GearError, match="context=system_u:object_r:container_file_t:s0:c1,c2"):
            mount(labelled, root / "merged")


# -- system calls


def test_openat2_does_not_leave_its_directory(root: Path) -> None:
    (root / "jail").mkdir()
    (root / "outside").write_text("secret")
    (root / "jail/out").symlink_to("../outside")
    (root / "jail/absolute").symlink_to("/etc/passwd")
    fd = os.open(root / "jail", os.O_RDONLY)
    try:
        for name in (b"out", b"absolute", b"../outside"):
            with pytest.raises(OSError) as in_root:
                syscalls.openat2(fd, name, os.O_RDONLY, 0, syscalls.Resolve.IN_ROOT)
            assert in_root.value.errno == errno.ENOENT
            with pytest.raises(OSError) as beneath:
                syscalls.openat2(fd, name, os.O_RDONLY, 0, syscalls.Resolve.BENEATH)
            assert beneath.value.errno == errno.EXDEV
            assert beneath.value.filename == os.fsdecode(name)
        os.close(syscalls.openat2(fd, b"made", os.O_CREAT | os.O_WRONLY, 0o600))
        assert (root / "jail/made").stat().st_mode & 0o777 == 0o600
    finally:
        os.close(fd)


def test_renameat2_keeps_or_exchanges_an_existing_target(root: Path) -> None:
    (root / "a").write_text("a")
    (root / "b").write_text("b")
    fd = os.open(root, os.O_RDONLY)
    try:
        with pytest.raises(FileExistsError):
            syscalls.renameat2(fd, b"a", fd, b"b", syscalls.Rename.NOREPLACE)
        syscalls.renameat2(fd, b"a", fd, b"b", syscalls.Rename.EXCHANGE)
        syscalls.syncfs(fd)
    finally:
        os.close(fd)
    assert ((root / "a").read_text(), (root / "b").read_text()) == ("b", "a")


def test_entry_types_returns_the_type_of_each_entry(root: Path) -> None:
    (root / "file").touch()
    fd = os.open(root, os.O_RDONLY)
    try:
        types = syscalls.entry_types(fd)
    finally:
        os.close(fd)
    assert types[b"file"] == 8
    assert types[b"public"] == 4
