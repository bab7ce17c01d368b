"""A layer that BuildKit made keeps its tar when its contents move to the object store."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
from pathlib import Path

import pytest

from gearworkers.cas.refs import OBJECTS_FILE
from gearworkers.errors import Unavailable
from gearworkers.layers import dedupe as absorb_module
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


def test_the_tar_is_the_same_before_and_after(driver: GearDriver) -> None:
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


def test_garbage_collection_keeps_what_an_absorbed_layer_refers_to(driver: GearDriver) -> None:
    built_layer(driver)
    driver.engine.dedupe("step")
    assert driver.engine.collect_garbage().removed_objects == 0
    driver.remove("step")
    assert driver.engine.collect_garbage().removed_objects == 1


def test_a_layer_that_is_mounted_is_left_alone(driver: GearDriver) -> None:
    built_layer(driver)
    driver.get("step")
    try:
        assert driver.engine.dedupe("step") == 0
    finally:
        driver.put("step")


def test_a_container_is_never_absorbed(driver: GearDriver) -> None:
    driver.create_read_write("container", "")
    assert not driver.engine.can_dedupe("container")


def test_after_a_crash_between_the_names_the_tar_is_still_the_same(
    driver: GearDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_layer(driver)
    before = tar_of(driver, "step")
    with monkeypatch.context() as patch:
        patch.setattr(absorb_module, "_restore_times", _crash)
        with pytest.raises(KeyboardInterrupt):
            driver.engine.dedupe("step")
    shutil.rmtree(driver.settings.gear_build_path)
    GearDriver(driver.settings).prepare()
    assert tar_of(driver, "step") == before


def test_the_list_of_objects_changes_its_place_while_no_collector_reads_the_lists(
    driver: GearDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would find the list neither where it was nor where it is."""
    built_layer(driver)
    held = []

    def rename(source: Path, target: Path, **_: int) -> None:
        if Path(os.fsdecode(target)).name == OBJECTS_FILE and Path(os.fsdecode(target)).parent.name == "step":
            with open(driver.settings.gear_root / "gc.lock") as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(target)
        real_rename(source, target, **_)

    real_rename = os.rename
    monkeypatch.setattr(os, "rename", rename)
    assert driver.engine.dedupe("step") == 3
    assert len(held) == 1


def test_a_diff_whose_caller_stops_reading_does_not_stop_the_absorption_of_other_layers(driver: GearDriver) -> None:
    """Absorption gives way and is tried again."""
    built_layer(driver)
    layer = driver.settings.gear_containers_path / "step"
    with absorb_module.locked_for_diff(layer, layer / "upper"), pytest.raises(Unavailable, match="Diff"):
        driver.engine.dedupe("step")
    assert driver.engine.dedupe("step") == 3


def test_a_tree_deeper_than_the_interpreters_stack_is_absorbed(driver: GearDriver) -> None:
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


def _crash(*_: object) -> None:
    raise KeyboardInterrupt
