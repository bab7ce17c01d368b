"""Deduplication of a layer that BuildKit wrote: its tar and its files stay the same."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import stat
from pathlib import Path

import pytest

from gearworkers.cas.refs import OBJECTS_FILE
from gearworkers.errors import ResourceExhausted, Unavailable
from gearworkers.layers import dedupe as dedupe_module
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver


@pytest.fixture
def driver(tmp_path: Path) -> GearDriver:
    driver = GearDriver(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run"))
    driver.init("", [], [], [])
    return driver


def built_layer(driver: GearDriver) -> None:
    driver.create("step", "")
    merged = Path(driver.get("step"))
    (merged / "dir").mkdir()
    (merged / "dir" / "one").write_bytes(b"same content")
    (merged / "two").write_bytes(b"same content")
    (merged / "empty").touch()
    os.link(merged / "two", merged / "dir" / "two-again")
    os.chmod(merged / "two", 0o4755)
    os.setxattr(merged / "two", "user.note", b"kept")
    os.chown(merged / "dir" / "one", 7, 8)
    os.utime(merged / "dir", ns=(1, 1_000_000_001))
    driver.put("step")


def tar_of(driver: GearDriver, id: str) -> bytes:
    sink = io.BytesIO()
    driver.diff(id, "", sink)
    return sink.getvalue()


def objects_of(driver: GearDriver) -> list[Path]:
    return [path for path in driver.settings.gear_public_cache_path.rglob("*") if path.is_file()]


def test_the_tar_is_the_same_before_and_after_deduplication(driver: GearDriver) -> None:
    built_layer(driver)
    before = tar_of(driver, "step")
    assert driver.engine.dedupe("step") == 3
    assert tar_of(driver, "step") == before
    assert len(objects_of(driver)) == 1


def test_the_mounted_layer_shows_the_same_bytes(driver: GearDriver) -> None:
    built_layer(driver)
    driver.engine.dedupe("step")
    driver.create_read_write("above", "step")
    merged = Path(driver.get("above"))
    try:
        assert (merged / "two").read_bytes() == b"same content"
        assert (merged / "two").stat().st_ino == (merged / "dir" / "two-again").stat().st_ino
        assert (merged / "two").stat().st_mode & 0o7777 == 0o4755
    finally:
        driver.put("above")


def test_garbage_collection_keeps_the_objects_of_a_deduplicated_layer(driver: GearDriver) -> None:
    built_layer(driver)
    driver.engine.dedupe("step")
    assert driver.engine.collect_garbage().removed_objects == 0
    driver.remove("step")
    assert driver.engine.collect_garbage().removed_objects == 1


def test_a_mounted_layer_is_not_deduplicated(driver: GearDriver) -> None:
    built_layer(driver)
    driver.get("step")
    try:
        assert driver.engine.dedupe("step") == 0
    finally:
        driver.put("step")


def test_a_container_is_never_deduplicated(driver: GearDriver) -> None:
    driver.create_read_write("container", "")
    assert not driver.engine.can_dedupe("container")


def test_the_tar_is_the_same_after_a_crash_before_times_are_restored(
    driver: GearDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_layer(driver)
    before = tar_of(driver, "step")
    utime = os.utime

    def crash_at_a_directory(fd: int, ns: tuple[int, int]) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise KeyboardInterrupt
        utime(fd, ns=ns)

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", crash_at_a_directory)
        with pytest.raises(KeyboardInterrupt):
            driver.engine.dedupe("step")
    shutil.rmtree(driver.settings.gear_build_path)
    GearDriver(driver.settings).prepare()
    assert tar_of(driver, "step") == before


def crash_during_dedupe(driver: GearDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the deduplication of the layer between two names, and restart the gateway."""
    rename = os.rename
    replaced = []

    def crash_at_the_second_name(source: Path | bytes, target: Path | bytes, **fds: int) -> None:
        if source == b"link":
            replaced.append(target)
            if len(replaced) == 2:
                raise KeyboardInterrupt
        rename(source, target, **fds)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash_at_the_second_name)
        with pytest.raises(KeyboardInterrupt):
            driver.engine.dedupe("step")
    shutil.rmtree(driver.settings.gear_build_path)
    GearDriver(driver.settings).prepare()


def three_files(driver: GearDriver) -> None:
    driver.create("step", "")
    merged = Path(driver.get("step"))
    (merged / "dir").mkdir()
    for number in range(3):
        (merged / "dir" / str(number)).write_bytes(b"content %d" % number)
    os.utime(merged / "dir", ns=(1, 1_000_000_001))
    driver.put("step")


@pytest.mark.parametrize("diff_first", [False, True])
def test_the_next_task_continues_after_a_crash(
    diff_first: bool, driver: GearDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_files(driver)
    before = tar_of(driver, "step")
    crash_during_dedupe(driver, monkeypatch)
    if diff_first:
        assert tar_of(driver, "step") == before
    assert driver.engine.dedupe("step") == 2
    assert driver.engine.dedupe("step") == 0
    assert tar_of(driver, "step") == before
    assert driver.engine.collect_garbage().removed_objects == 0
    assert not list(driver.engine.faults(read_data=True, repair=False))


@pytest.mark.parametrize("left", [b"", b"\x91\x93"])
def test_a_half_written_file_of_directory_times_is_ignored(left: bytes, driver: GearDriver) -> None:
    """A power cut before the first name was replaced leaves it."""
    three_files(driver)
    before = tar_of(driver, "step")
    (driver.settings.gear_containers_path / "step" / dedupe_module.TIMES_FILE).write_bytes(left)
    assert tar_of(driver, "step") == before
    assert driver.engine.dedupe("step") == 3
    assert tar_of(driver, "step") == before


def test_a_full_disk_leaves_the_layer_to_the_next_task(driver: GearDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    three_files(driver)
    before = tar_of(driver, "step")
    write_bytes = Path.write_bytes

    def fill_the_disk(path: Path, data: bytes) -> int:
        if path.name.startswith(dedupe_module.TIMES_FILE):
            write_bytes(path, data[:2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_the_disk)
        with pytest.raises(ResourceExhausted):
            driver.engine.dedupe("step")
    assert tar_of(driver, "step") == before
    assert driver.engine.dedupe("step") == 3


def test_the_object_list_is_renamed_under_the_garbage_lock(driver: GearDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the collector may miss the list while it moves."""
    built_layer(driver)
    renamed = []

    def rename(source: Path, target: Path, **_: int) -> None:
        if Path(os.fsdecode(target)).name == OBJECTS_FILE and Path(os.fsdecode(target)).parent.name == "step":
            with open(driver.settings.gear_root / "gc.lock") as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            renamed.append(target)
        real_rename(source, target, **_)

    real_rename = os.rename
    monkeypatch.setattr(os, "rename", rename)
    assert driver.engine.dedupe("step") == 3
    assert len(renamed) == 1


def test_deduplication_fails_at_once_while_a_diff_reads_the_layer(driver: GearDriver) -> None:
    """The task is retried later."""
    built_layer(driver)
    layer = driver.settings.gear_containers_path / "step"
    with dedupe_module.locked_for_diff(layer, layer / "upper"), pytest.raises(Unavailable, match="Diff"):
        driver.engine.dedupe("step")
    assert driver.engine.dedupe("step") == 3


@pytest.mark.slow
def test_a_tree_deeper_than_the_interpreter_stack_is_deduplicated(driver: GearDriver) -> None:
    driver.create("step", "")
    deepest = driver.get("step")
    for _ in range(1100):
        deepest += "/d"
        os.mkdir(deepest)
    Path(deepest, "file").write_bytes(b"deep")
    driver.put("step")
    before = tar_of(driver, "step")
    assert driver.engine.dedupe("step") == 1
    assert tar_of(driver, "step") == before
    driver.remove("step")
