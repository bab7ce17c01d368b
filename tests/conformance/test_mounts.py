"""Mount counts of Get and Put, which survive a restart of the driver."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.mounts.overlay import is_mounted
from gearworkers.settings import Settings
from tests.conformance.drivers import Driver, InProcess, new_layer_id
from tests.conformance.layers import apply_layer, committed, container, directory, file, hardlink, mounted, shown, tar


@pytest.fixture
def id(driver: Driver) -> str:
    """Return a read-write layer on an image."""
    id = new_layer_id()
    driver.create_read_write(id, apply_layer(driver, file("lower", b"lower")))
    return id


def test_the_last_put_unmounts(driver: Driver, id: str) -> None:
    merged = driver.get(id)
    assert driver.get(id) == merged
    driver.put(id)
    assert is_mounted(merged)
    driver.put(id)
    assert not is_mounted(merged)


def test_an_extra_put_is_harmless(driver: Driver, id: str) -> None:
    merged = driver.get(id)
    driver.put(id)
    driver.put(id)
    assert driver.get(id) == merged
    assert is_mounted(merged), "the count did not go below zero"
    driver.put(id)
    assert not is_mounted(merged)


def test_written_files_are_present_at_the_next_mount(driver: Driver, id: str) -> None:
    with mounted(driver, id) as merged:
        (merged / "written").write_text("by the first")
    with mounted(driver, id) as merged:
        assert (merged / "written").read_text() == "by the first"


def test_a_restarted_driver_keeps_the_mount_counts(driver: Driver, id: str) -> None:
    merged = driver.get(id)
    driver.get(id)
    (merged / "written").touch()
    driver.restart()
    assert is_mounted(merged), "the mount of a container survives"
    assert (merged / "lower").read_bytes() == b"lower"
    driver.put(id)
    assert is_mounted(merged)
    driver.get(id)
    driver.put(id)
    driver.put(id)
    assert not is_mounted(merged)


def test_init_sets_the_count_of_each_mount_to_one(driver: Driver, id: str) -> None:
    merged = driver.get(id)
    driver.get(id)
    driver.init()
    driver.put(id)
    assert not is_mounted(merged), "a new dockerd assumes one Get"


def test_a_restarted_driver_knows_all_layers(driver: Driver, id: str) -> None:
    base = apply_layer(driver, file("a", b"a"))
    data = driver.diff(base)
    driver.restart()
    assert set(shown(driver, base)) == {b"a"}
    assert driver.diff(base) == data
    with container(driver, base) as merged:
        assert (merged / "a").read_bytes() == b"a"


def test_remove_unmounts_and_deletes_a_mounted_layer(driver: Driver, id: str) -> None:
    merged = driver.get(id)
    with (merged / "lower").open("rb") as held:
        driver.remove(id)
        assert not merged.exists()
        assert not driver.exists(id)
        assert held.read() == b"lower", "open files stay open, as with overlay2"


def test_cleanup_unmounts_everything(driver: Driver, id: str) -> None:
    merged = driver.get(id)
    driver.get(id)
    driver.cleanup()
    assert not is_mounted(merged)
    with mounted(driver, id) as again:
        assert (again / "lower").exists()


def test_concurrent_gets_share_one_mount(driver: Driver, id: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        merged = set(pool.map(lambda _: driver.get(id), range(24)))
        assert len(merged) == 1
        for _ in pool.map(lambda _: driver.put(id), range(23)):
            pass
    (path,) = merged
    assert is_mounted(path)
    driver.put(id)
    assert not is_mounted(path)


def test_layers_on_one_parent_are_created_and_removed_concurrently(driver: Driver) -> None:
    base = apply_layer(driver, file("a", b"a"))

    def run_container(number: int) -> bytes:
        id = new_layer_id()
        driver.create_read_write(id, base)
        with mounted(driver, id) as merged:
            (merged / "own").write_text(str(number))
            content = (merged / "own").read_bytes() + (merged / "a").read_bytes()
        driver.remove(id)
        return content

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run_container, range(24))) == [b"%da" % number for number in range(24)]


def test_an_empty_parent_id_means_no_parent(driver: Driver) -> None:
    with container(driver, "") as merged:
        assert not list(merged.iterdir())
        (merged / "a").touch()


def test_a_layer_mounted_before_its_diff_accepts_the_diff(driver: Driver) -> None:
    base, id = apply_layer(driver, file("a", b"a")), new_layer_id()
    driver.create(id, base)
    with mounted(driver, id) as merged:
        assert (merged / "a").exists()
    driver.apply_diff(id, base, tar(file("b", b"b")))
    assert set(shown(driver, id)) == {b"a", b"b"}
    driver.restart()
    assert set(shown(driver, id)) == {b"a", b"b"}


def test_a_second_init_keeps_the_layers(driver: Driver, id: str) -> None:
    driver.init()
    assert driver.exists(id)
    with mounted(driver, id) as merged:
        assert Path(merged / "lower").read_bytes() == b"lower"


@pytest.mark.parametrize("xino", [False, True], ids=["off", "on"])
def test_all_files_have_one_device_and_numbers_beyond_53_bits_with_xino(settings: Settings, xino: bool) -> None:
    driver = InProcess(replace(settings, xino=xino))
    base = apply_layer(driver, directory("d"), file("d/a1", b"first"), hardlink("d/a2", "d/a1"))
    parent = apply_layer(driver, directory("d"), file("d/b1", b"second"), hardlink("d/b2", "d/b1"), parent=base)
    id = new_layer_id()
    driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        (merged / "d/c1").write_text("third")
        (merged / "d/c2").hardlink_to(merged / "d/c1")
        status = {path.name: path.stat() for path in (merged / "d").iterdir()}
        assert all(found.st_dev == (merged / "d").stat().st_dev for found in status.values()) == xino
        assert all(found.st_ino > 1 << 53 for name, found in status.items() if name[0] in "ab") == xino
    numbers = {name: found.st_ino for name, found in status.items()}
    assert len({numbers["a1"], numbers["b1"], numbers["c1"]}) == 3
    assert all(numbers[f"{letter}1"] == numbers[f"{letter}2"] for letter in "abc")
    assert shown(driver, committed(driver, id, parent)) == shown(driver, id)
    driver.cleanup()
