"""Checks of the kernel and the file system."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.digest import object_path
from gearworkers.errors import FailedPrecondition
from gearworkers.mounts import probe as probe_module
from gearworkers.mounts.overlay import OverlaySpec, mount, unmount
from gearworkers.mounts.probe import backing_fs_name, kernel_version, probe, require
from gearworkers.util.check import Check


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine_passes_the_checks_and_they_leave_no_files(tmp_path: Path) -> None:
    checks = probe(tmp_path)
    require(checks)
    assert all(check.ok for check in checks if check.needed), checks
    assert all(bool(check.advice) != check.ok for check in checks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.18.44-fc-v669", (6, 18)),
        ("5.10.0-28-amd64", (5, 10)),
        ("6.1-rc3", (6, 1)),
        ("strange", (0, 0)),
        ("6.x", (0, 0)),
    ],
)
def test_the_kernel_version_is_parsed_from_the_release(release: str, expected: tuple[int, int]) -> None:
    assert kernel_version(release) == expected


def test_the_redirect_in_the_check_has_the_length_of_an_object_path() -> None:
    assert len(probe_module._REDIRECT) == len(object_path(bytes(32)))


@pytest.fixture
def small_inodes(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-I", "128", image], check=True, stderr=subprocess.DEVNULL)
    target = tmp_path / "mnt"
    target.mkdir()
    subprocess.run(["mount", "-o", "loop", image, target], check=True)
    yield target
    subprocess.run(["umount", target], check=True)


def test_inodes_too_small_for_the_xattrs_are_reported_but_accepted(small_inodes: Path) -> None:
    checks = probe(small_inodes)
    check = by_name(checks)["inode size"]
    assert not check.ok
    assert "-I 256" in check.advice
    require(checks)


def test_gear_root_on_an_overlay_is_rejected(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    mount(OverlaySpec((tmp_path / "lower",), (), tmp_path / "upper", tmp_path / "work"), tmp_path / "merged")
    try:
        assert backing_fs_name(tmp_path / "merged") == "overlayfs"
        with pytest.raises(FailedPrecondition, match="GEAR_ROOT on a disk"):
            require(probe(tmp_path / "merged"))
    finally:
        unmount(tmp_path / "merged")


def test_a_file_system_without_xattrs_fails_the_checks(tmp_path: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", target], check=True)
    try:
        checks = by_name(probe(target))
        assert not checks["trusted and user xattrs"].ok
        assert not checks["overlay with data-only layers"].ok
        assert os.listdir(target) == []
    finally:
        subprocess.run(["umount", target], check=True)
