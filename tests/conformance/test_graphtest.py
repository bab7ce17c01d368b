"""The test cases of moby's daemon/graphdriver/graphtest, under the same names."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest

from tests.conformance.drivers import Driver, DriverError, new_layer_id
from tests.conformance.layers import mounted

MODIFY, ADD, DELETE = 0, 1, 2


def test_create_empty_shows_an_empty_directory_of_root(driver: Driver) -> None:
    id = new_layer_id()
    driver.create(id)
    assert driver.exists(id)
    with mounted(driver, id) as merged:
        check(merged, stat.S_IFDIR | 0o755, 0, 0)
        assert not list(merged.iterdir())


def test_create_base_keeps_written_files(driver: Driver) -> None:
    base = create_base(driver)
    with mounted(driver, base) as merged:
        check_base(merged)


def test_create_snap_shows_the_files_of_its_base(driver: Driver) -> None:
    base = create_base(driver)
    snap = new_layer_id()
    driver.create(snap, base)
    with mounted(driver, snap) as merged:
        check_base(merged)


def test_deep_layer_read_reads_through_128_layers(driver: Driver) -> None:
    top = new_layer_id()
    driver.create_read_write(top)
    with mounted(driver, top) as merged:
        (merged / "testfile.txt").write_text("test data")
    for number in range(1, 129):
        id = new_layer_id()
        driver.create(id, top)
        with mounted(driver, id) as merged:
            (merged / "top-id").write_text(id)
            (merged / f"layer-{number}").mkdir()
            (merged / f"layer-{number}" / "layer-id").write_text(id)
            (merged / f"layer-{number}" / "parent-id").write_text(top)
        top = id
    with mounted(driver, top) as merged:
        assert (merged / "testfile.txt").read_text() == "test data"
        assert (merged / "top-id").read_text() == top
        expected = top
        for number in range(128, 0, -1):
            assert (merged / f"layer-{number}" / "layer-id").read_text() == expected
            expected = (merged / f"layer-{number}" / "parent-id").read_text()


@pytest.mark.parametrize("file_count", [10, 1000])
def test_diff_apply_reproduces_the_layer(driver: Driver, file_count: int) -> None:
    base, upper, diff = new_layer_id(), new_layer_id(), new_layer_id()
    driver.create_read_write(base)
    with mounted(driver, base) as merged:
        add_many_files(merged, file_count, seed=3)
        (merged / "deleted").write_text("gone above")
    driver.create_read_write(upper, base)
    with mounted(driver, upper) as merged:
        add_many_files(merged, file_count, seed=6)
        (merged / "deleted").unlink()
    size_bytes = driver.diff_size(upper, base)

    driver.create(diff, base)
    with mounted(driver, diff) as merged:
        check_many_files(merged, file_count, seed=3)
        assert (merged / "deleted").exists()
    assert driver.apply_diff(diff, base, driver.diff(upper, base)) == size_bytes == driver.diff_size(diff, base)
    with mounted(driver, diff) as merged:
        check_many_files(merged, file_count, seed=6)
        assert not (merged / "deleted").exists()


def test_changes_lists_all_changes(driver: Driver) -> None:
    base, upper = new_layer_id(), new_layer_id()
    driver.create_read_write(base)
    with mounted(driver, base) as merged:
        add_many_files(merged, 20, seed=3)
    driver.create_read_write(upper, base)
    with mounted(driver, upper) as merged:
        expected = change_many_files(merged, 20, seed=6)
    assert driver.changes(upper, base) == sorted(expected)
    assert all(kind == ADD for _, kind in driver.changes(base)), "without a parent, all entries are additions"


def test_create_rejects_an_existing_id_and_a_missing_parent(driver: Driver) -> None:
    id = new_layer_id()
    driver.create(id)
    with pytest.raises(DriverError, match="exists already"):
        driver.create(id)
    with pytest.raises(DriverError, match="does not exist"):
        driver.create_read_write(new_layer_id(), parent=new_layer_id())


def create_base(driver: Driver) -> str:
    id = new_layer_id()
    driver.create_read_write(id)
    with mounted(driver, id) as merged:
        subdir = merged / "a subdir"
        subdir.mkdir()
        subdir.chmod(0o1705)
        os.chown(subdir, 1, 2)
        file = merged / "a file"
        file.write_text("Some data")
        file.chmod(0o4222)
    return id


def check_base(merged: Path) -> None:
    check(merged, stat.S_IFDIR | 0o755, 0, 0)
    check(merged / "a subdir", stat.S_IFDIR | 0o1705, 1, 2)
    check(merged / "a file", stat.S_IFREG | 0o4222, 0, 0)
    assert (merged / "a file").read_text() == "Some data"
    assert {path.name for path in merged.iterdir()} == {"a subdir", "a file"}


def check(path: Path, mode: int, uid: int, gid: int) -> None:
    status = path.lstat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (mode, uid, gid)


def add_many_files(merged: Path, count: int, seed: int) -> None:
    for number in range(count):
        directory = merged / f"directory-{number // 100}"
        directory.mkdir(exist_ok=True)
        (directory / f"file-{number}").write_bytes(random.Random(seed + number).randbytes(64))


def check_many_files(merged: Path, count: int, seed: int) -> None:
    for number in range(count):
        path = merged / f"directory-{number // 100}" / f"file-{number}"
        assert path.read_bytes() == random.Random(seed + number).randbytes(64)


def change_many_files(merged: Path, count: int, seed: int) -> list[tuple[str, int]]:
    """Add, change and remove files in turn, as graphtest does; return the expected changes."""
    changes = [("/directory-0", MODIFY)]
    for number in range(count):
        path = merged / "directory-0" / f"file-{number}"
        match number % 3:
            case 0:
                new = path.with_name(f"new-{number}")
                new.write_bytes(random.Random(seed).randbytes(64))
                changes.append((f"/directory-0/{new.name}", ADD))
            case 1:
                path.write_bytes(random.Random(seed).randbytes(64))
                changes.append((f"/directory-0/{path.name}", MODIFY))
            case 2:
                path.unlink()
                changes.append((f"/directory-0/{path.name}", DELETE))
    return changes
