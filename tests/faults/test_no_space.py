"""A GEAR_ROOT without space or inodes left: a clear error, nothing visible, the store whole, and on it goes."""

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
from tests.conformance.drivers import InProcess, Refused
from tests.conformance.layers import applied, file, mounted, object_names, shown, tar
from tests.faults.crashes import Interrupted, Say, run_child
from tests.support.disk import mount_fresh

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 24 MiB with some 3,000 inodes."""
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


def refused_and_whole(driver: InProcess, data: bytes) -> None:
    """The import fails by its right name and leaves nothing but garbage."""
    base = applied(driver, file("base", b"base"))
    driver.create("full", base)
    with pytest.raises(Refused, match=r"[Nn]o space left|are free in"):
        driver.apply_diff("full", base, data)
    assert not list(driver.settings.gear_build_path.iterdir())
    with pytest.raises(Refused, match="remove"):
        driver.get("full")
    assert set(shown(driver, base)) == {b"base"}
    faults = list(Engine.of(driver.settings).faults(read_data=True, repair=False))
    assert not [fault for fault in faults if "did not finish" not in fault]
    driver.remove("full")
    Engine.of(driver.settings).collect_garbage()
    assert len(object_names(driver.settings)) == 1, "the failed import's objects are garbage"
    after = applied(driver, file("after", os.urandom(MIB)), parent=base)
    assert set(shown(driver, after)) == {b"base", b"after"}, "it works again"


def test_an_import_of_too_many_contents_fails_cleanly(driver: InProcess) -> None:
    refused_and_whole(driver, tar(*(file(f"f{number}", os.urandom(MIB // 2)) for number in range(64))))


def test_an_import_of_one_too_large_content_fails_cleanly(driver: InProcess) -> None:
    refused_and_whole(driver, tar(file("huge", os.urandom(32 * MIB))))


def test_an_import_fails_cleanly_when_an_earlier_content_used_the_space(driver: InProcess, disk: Path) -> None:
    free = os.statvfs(disk)
    room = free.f_bavail * free.f_frsize
    contents = [file("first", os.urandom(room // 2)), file("second", os.urandom(room * 2 // 3))]
    refused_and_whole(driver, tar(*contents))


def test_an_import_of_more_contents_than_inodes_fails_cleanly(driver: InProcess, disk: Path) -> None:
    count = os.statvfs(disk).f_favail + 100
    refused_and_whole(driver, tar(*(file(f"f{number}", b"content %d" % number) for number in range(count))))


def fill(disk: Path) -> Path:
    """Leave hardly a block free; the file that has them all."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file_, pytest.raises(OSError, match="No space"):
        while file_.write(bytes(4096)):
            pass
    return filler


def test_a_disk_that_fills_up_during_an_import_of_known_contents_does_not_kill_the_process(
    driver: InProcess, disk: Path
) -> None:
    """The list of claims is shared memory: a page of it without a block behind would be a SIGBUS."""
    applied(driver, file("known", b"known"))
    driver.create("layer")
    first, second = tar(file("a", b"known")), tar(*(file(f"b{number}", b"known") for number in range(5000)))

    def work(say: Say) -> None:
        data = Interrupted(first[:-1024], lambda: fill(disk), second)
        GearDriver(driver.settings).apply_diff("layer", "", data)

    outcome = run_child(work)
    (disk / "filler").unlink()
    assert outcome.failed, "an error and no signal"
    assert outcome.said[0].startswith(b"ResourceExhausted"), outcome.said
    InProcess(driver.settings).remove("layer")


def test_a_full_disk_rejects_a_new_layer_and_keeps_the_old_ones(driver: InProcess, disk: Path) -> None:
    base = applied(driver, file("base", b"base"))
    driver.create_read_write("container", base)
    with mounted(driver, "container") as merged:
        filler = fill(disk)
        with pytest.raises(Refused, match="No space"):
            for id in (f"another{number}" for number in range(20)):  # the file system may have kept some blocks
                driver.create(id, base)
        assert not driver.exists(id)
        assert (merged / "base").read_bytes() == b"base", "existing files can be read"
        with pytest.raises(OSError, match="No space"):
            (merged / "new").write_bytes(os.urandom(MIB))
    with mounted(driver, "container") as merged:
        assert (merged / "base").read_bytes() == b"base", "also by a container that starts now"
    filler.unlink()
    with mounted(driver, "container") as merged:
        (merged / "new").write_bytes(b"fits")
    driver.remove("container")


def test_an_import_fails_when_the_end_of_the_stream_file_does_not_fit(driver: InProcess) -> None:
    """The kernel takes a part of the last write and says no more than how much."""
    data = tar(file("a", b"a")) + os.urandom(2 * MIB)
    whole = driver.settings.gear_images_path / applied_raw(driver, "whole", data) / STREAM_FILE

    def work(say: Say) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size - 10, resource.RLIM_INFINITY))
        applied_raw(InProcess(driver.settings), "cut", data)

    outcome = run_child(work)
    assert outcome.failed, "no layer without the end of its stream"
    with pytest.raises(Refused, match="remove"):
        driver.get("cut")


def applied_raw(driver: InProcess, id: str, data: bytes) -> str:
    driver.create(id)
    driver.apply_diff(id, "", data)
    return id


def test_garbage_is_collected_when_no_directory_can_grow(driver: InProcess, disk: Path) -> None:
    id = applied(driver, *(file(f"f{number}", b"content %d" % number) for number in range(2600)))
    fill(disk)
    driver.remove(id)
    with (disk / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space"):
        while rest.write(bytes(1024)):
            pass
    assert Engine.of(driver.settings).collect_garbage().removed_objects == 2600
    assert not object_names(driver.settings)
