"""Imports into a GEAR_ROOT without free space or inodes fail with a clear error and leave a consistent store."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.engine.engine import Engine
from gearworkers.layers.apply import STREAM_FILE
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.drivers import DriverError, InProcess
from tests.conformance.layers import apply_layer, file, mounted, object_names, shown, tar
from tests.faults.crashes import Interrupted, Report, run_child
from tests.support.disk import mount_fresh

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a mounted ext4 of 24 MiB with about 3,000 inodes."""
    target = tmp_path / "disk"
    mount_fresh(tmp_path / "image", target, 24 * MIB)
    yield target
    subprocess.run(["umount", "--recursive", str(target)], check=True)


@pytest.fixture
def driver(disk: Path, tmp_path: Path) -> Iterator[InProcess]:
    driver = InProcess(Settings(gear_root=disk / "gear", run_dir=tmp_path / "run", node="test"))
    driver.init()
    yield driver
    driver.cleanup()


def check_import_fails_cleanly(driver: InProcess, data: bytes) -> None:
    """Check that the import fails with the right error and leaves only garbage."""
    base = apply_layer(driver, file("base", b"base"))
    driver.create("full", base)
    with pytest.raises(DriverError, match=r"[Nn]o space left|are free in"):
        driver.apply_diff("full", base, data)
    assert not list(driver.settings.gear_build_path.iterdir())
    with pytest.raises(DriverError, match="pull or build again"):
        driver.get("full")
    assert set(shown(driver, base)) == {b"base"}
    faults = list(Engine.of(driver.settings).faults(read_data=True, repair=False))
    assert not [fault for fault in faults if "did not finish" not in fault]
    driver.remove("full")
    Engine.of(driver.settings).collect_garbage()
    assert len(object_names(driver.settings)) == 1, "the failed import's objects are garbage"
    after = apply_layer(driver, file("after", os.urandom(MIB)), parent=base)
    assert set(shown(driver, after)) == {b"base", b"after"}, "the next import works"


def test_an_import_of_too_many_contents_fails_cleanly(driver: InProcess) -> None:
    check_import_fails_cleanly(driver, tar(*(file(f"f{number}", os.urandom(MIB // 2)) for number in range(64))))


def test_an_import_of_one_too_large_content_fails_cleanly(driver: InProcess) -> None:
    check_import_fails_cleanly(driver, tar(file("huge", os.urandom(32 * MIB))))


def test_an_import_fails_cleanly_when_an_earlier_content_used_the_space(driver: InProcess, disk: Path) -> None:
    free = os.statvfs(disk)
    free_bytes = free.f_bavail * free.f_frsize
    contents = [file("first", os.urandom(free_bytes // 2)), file("second", os.urandom(free_bytes * 2 // 3))]
    check_import_fails_cleanly(driver, tar(*contents))


def test_an_import_of_more_contents_than_inodes_fails_cleanly(driver: InProcess, disk: Path) -> None:
    count = os.statvfs(disk).f_favail + 100
    check_import_fails_cleanly(driver, tar(*(file(f"f{number}", b"content %d" % number) for number in range(count))))


def fill(disk: Path) -> Path:
    """Fill the disk with a file; return its path."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file_, pytest.raises(OSError, match="No space"):
        while file_.write(bytes(4096)):
            pass
    return filler


def test_a_disk_that_fills_up_during_an_import_of_known_contents_does_not_kill_the_process(
    driver: InProcess, disk: Path
) -> None:
    """The list of claims is shared memory. A write to a page without a disk block would raise SIGBUS."""
    apply_layer(driver, file("known", b"known"))
    driver.create("layer")
    first, second = tar(file("a", b"known")), tar(*(file(f"b{number}", b"known") for number in range(5000)))

    def work(report: Report) -> None:
        data = Interrupted(first[:-1024], lambda: fill(disk), second)
        GearDriver(driver.settings).apply_diff("layer", "", data)

    outcome = run_child(work)
    (disk / "filler").unlink()
    assert outcome.failed, "the process ends with an error, not by a signal"
    assert outcome.reported[0].startswith(b"ResourceExhausted"), outcome.reported
    InProcess(driver.settings).remove("layer")


def test_a_full_disk_rejects_a_new_layer_and_keeps_the_old_ones(driver: InProcess, disk: Path) -> None:
    base = apply_layer(driver, file("base", b"base"))
    driver.create_read_write("container", base)
    with mounted(driver, "container") as merged:
        filler = fill(disk)
        with pytest.raises(DriverError, match="No space"):
            for id in (f"another{number}" for number in range(20)):  # the file system may have a few free blocks
                driver.create(id, base)
        assert not driver.exists(id)
        assert (merged / "base").read_bytes() == b"base", "existing files can be read"
        with pytest.raises(OSError, match="No space"):
            (merged / "new").write_bytes(os.urandom(MIB))
    with mounted(driver, "container") as merged:
        assert (merged / "base").read_bytes() == b"base", "a new mount can read them too"
    filler.unlink()
    with mounted(driver, "container") as merged:
        (merged / "new").write_bytes(b"fits")
    driver.remove("container")


def test_an_import_fails_when_the_end_of_the_stream_file_does_not_fit(driver: InProcess) -> None:
    """The kernel accepts only a part of the last write and reports the length, without an error."""
    data = tar(file("a", b"a")) + os.urandom(2 * MIB)
    stream = driver.settings.gear_images_path / apply_tar(driver, "whole", data) / STREAM_FILE

    def work(report: Report) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (stream.stat().st_size - 10, resource.RLIM_INFINITY))
        apply_tar(InProcess(driver.settings), "cut", data)

    outcome = run_child(work)
    assert outcome.failed, "the import fails without the end of the stream"
    with pytest.raises(DriverError, match="pull or build again"):
        driver.get("cut")


def apply_tar(driver: InProcess, id: str, data: bytes) -> str:
    driver.create(id)
    driver.apply_diff(id, "", data)
    return id


def test_garbage_is_collected_when_no_directory_can_grow(driver: InProcess, disk: Path) -> None:
    id = apply_layer(driver, *(file(f"f{number}", b"content %d" % number) for number in range(2600)))
    fill(disk)
    driver.remove(id)
    with (disk / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space"):
        while rest.write(bytes(1024)):
            pass
    assert Engine.of(driver.settings).collect_garbage().removed_objects == 2600
    assert not object_names(driver.settings)
