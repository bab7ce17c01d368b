"""Counts of the users of each layer's mount."""

import subprocess
from pathlib import Path

import pytest

from gearworkers.mounts.overlay import OverlaySpec, is_mounted, mount, unmount
from plugin_gateway.graphdriver.mount_counts import MountCounts


def mounted(spec: OverlaySpec, target: Path) -> Path:
    mount(spec, target)
    return target


def test_existing_counts_change_on_a_full_disk_and_new_ones_fail(tmp_path: Path) -> None:
    for name in ("counts", "lower", "public", "merged", "other"):
        (tmp_path / name).mkdir()
    directory, target, other = tmp_path / "counts", tmp_path / "merged", tmp_path / "other"
    spec = OverlaySpec((tmp_path / "lower",), (tmp_path / "public",))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory], check=True)
    counts = MountCounts(directory)
    try:
        assert counts.acquire("one", target, lambda: mounted(spec, target), lambda: None) == target
        with pytest.raises(OSError, match="No space left"):
            (directory / "filler").write_bytes(bytes(1 << 20))
        counts.acquire("one", target, lambda: pytest.fail("it is mounted"), lambda: pytest.fail("it has a user"))
        counts.release("one", target, lambda: pytest.fail("it has a user"))
        with pytest.raises(OSError, match="No space left"):
            counts.acquire("two", other, lambda: mounted(spec, other), lambda: None)
        assert not is_mounted(other)
        counts.release("one", target, lambda: unmount(target))
        assert not is_mounted(target)
    finally:
        subprocess.run(["umount", directory], check=True)
