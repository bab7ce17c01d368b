"""SIGKILL at every step of imports, removals and garbage collections; the next start repairs all leftovers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from gearworkers.cas.collector import HIDDEN
from gearworkers.engine.engine import Engine
from gearworkers.layers.record import RECORD_FILE
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.drivers import DriverError, InProcess
from tests.conformance.layers import (
    File,
    apply_layer,
    directory,
    file,
    hardlink,
    mounted,
    object_names,
    object_path,
    shown,
    tar,
)
from tests.faults.crashes import Interrupted, Outcome, Report, killed_at_every_step
from tests.support.overlays import Node

LAYER = "layer"
SHARED = b"shared by both layers"
FILES: tuple[File, ...] = (
    directory("d"),
    file("d/new", b"only in this layer", 0o4755, 5, 5),
    file("d/shared", SHARED),
    hardlink("link", "d/new", 0o4755, 5, 5),
    file("large", b"large " * 900_000),
)
PRIVATE = tar(file(".gear-private"), file("a", b"secret"), file("b", b"another"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test")


@pytest.fixture
def base(settings: Settings) -> str:
    return apply_layer(InProcess(settings), file("base", b"only in the base"), file("shared", SHARED))


@pytest.fixture
def complete_tree(settings: Settings, base: str) -> dict[bytes, Node]:
    """Return the tree of the complete layer."""
    driver = InProcess(settings)
    id = apply_layer(driver, *FILES, parent=base)
    nodes = shown(driver, id)
    driver.remove(id)
    return nodes


def restarted_driver(settings: Settings) -> InProcess:
    """Start a driver after a crash; check that there are no leftovers and no damage."""
    driver = InProcess(settings)
    assert not list(settings.gear_build_path.iterdir())
    assert not list((settings.gear_root / HIDDEN).iterdir())
    faults = list(Engine.of(settings).faults(read_data=True, repair=False))
    assert not [fault for fault in faults if "did not finish" not in fault]
    return driver


def test_an_import_killed_at_any_step_leaves_a_complete_layer_or_none(
    settings: Settings, base: str, complete_tree: dict[bytes, Node]
) -> None:
    data = tar(*FILES)

    def work(report: Report) -> None:
        driver = GearDriver(settings)
        driver.create(LAYER, base)
        report(b"created")
        driver.apply_diff(LAYER, base, io.BytesIO(data))
        report(b"applied")

    states = []
    for outcome in killed_at_every_step(work):
        driver = restarted_driver(settings)
        states.append(state(driver, complete_tree))
        check_state(outcome, states[-1])
        if states[-1] == "complete":
            assert driver.diff(LAYER, base) == data
        driver.remove(LAYER)
        check_only_base(settings, driver, base)
    assert {"absent", "empty", "unfinished", "complete"} <= set(states), "the kills produced every state"


def test_a_private_import_killed_at_any_step_leaves_a_complete_layer_or_none(settings: Settings, base: str) -> None:
    def work(report: Report) -> None:
        driver = GearDriver(settings)
        driver.create(LAYER, base)
        driver.apply_diff(LAYER, base, io.BytesIO(PRIVATE))
        report(b"applied")

    states = []
    for outcome in killed_at_every_step(work):
        driver = restarted_driver(settings)
        own = list(settings.gear_private_cache_path.glob("*/*/*"))
        states.append(len(own))
        if own:
            assert driver.diff(LAYER, base) == PRIVATE
        assert len(own) == 2 if outcome.reported else len(own) in (0, 2)
        driver.remove(LAYER)
        assert not list(settings.gear_private_cache_path.iterdir())
        check_only_base(settings, driver, base)
    assert set(states) == {0, 2}


def state(driver: InProcess, complete_tree: dict[bytes, Node]) -> str:
    if not driver.exists(LAYER):
        return "absent"
    try:
        driver.get_metadata(LAYER)
    except DriverError as exc:
        assert "pull or build again" in str(exc)
        return "unfinished"
    nodes = shown(driver, LAYER)
    if nodes == complete_tree:
        return "complete"
    assert set(nodes) == {b"base", b"shared"}
    return "empty"


def check_state(outcome: Outcome, end: str) -> None:
    match outcome.reported:
        case []:
            assert end in ("absent", "empty")
        case [b"created"]:
            assert end in ("empty", "unfinished", "complete")
        case _:
            assert end == "complete", "ApplyDiff had returned"


def check_only_base(settings: Settings, driver: InProcess, base: str) -> None:
    """Check that the collector removes all leftovers of the crash and keeps the base."""
    Engine.of(settings).collect_garbage()
    assert set(shown(driver, base)) == {b"base", b"shared"}
    assert object_names(settings) == {object_path(settings, content) for content in (b"only in the base", SHARED)}


def test_a_removal_killed_at_any_step_leaves_the_layer_or_nothing(
    settings: Settings, base: str, complete_tree: dict[bytes, Node]
) -> None:
    def work(report: Report) -> None:
        GearDriver(settings).remove(LAYER)
        report(b"removed")

    data = tar(*FILES)
    GearDriver(settings).create(LAYER, base)
    GearDriver(settings).apply_diff(LAYER, base, io.BytesIO(data))
    for outcome in killed_at_every_step(work):
        driver = restarted_driver(settings)
        end = state(driver, complete_tree)
        assert end == "absent" if outcome.reported else end in ("absent", "complete")
        if end == "absent":
            driver.create(LAYER, base)
            driver.apply_diff(LAYER, base, data)


def test_a_private_removal_killed_at_any_step_leaves_the_layer_or_nothing(settings: Settings, base: str) -> None:
    def work(report: Report) -> None:
        GearDriver(settings).remove(LAYER)
        report(b"removed")

    def own() -> int:
        return len(list(settings.gear_private_cache_path.glob("*/*/*")))

    states = []
    driver = InProcess(settings)
    driver.create(LAYER, base)
    driver.apply_diff(LAYER, base, PRIVATE)
    for outcome in killed_at_every_step(work):
        driver = restarted_driver(settings)
        states.append(own())
        if states[-1]:
            assert driver.diff(LAYER, base) == PRIVATE and not outcome.reported
        else:
            assert not driver.exists(LAYER)
            driver.create(LAYER, base)
            driver.apply_diff(LAYER, base, PRIVATE)
    assert set(states) == {0, 2}


def test_a_killed_private_import_is_removed_completely_without_a_restart(settings: Settings, base: str) -> None:
    """The worker is killed and the gateway keeps running."""

    def work(report: Report) -> None:
        driver = GearDriver(settings)
        driver.create(LAYER, base)
        driver.apply_diff(LAYER, base, io.BytesIO(PRIVATE))

    gateway = GearDriver(settings)
    for _ in killed_at_every_step(work, stride=3):
        gateway.remove(LAYER)
        assert not list(settings.gear_private_cache_path.iterdir())
        assert not list(settings.gear_build_path.glob(f"{LAYER}.*"))


def test_a_collection_killed_at_any_step_loses_no_referenced_object(settings: Settings, base: str) -> None:
    def work(report: Report) -> None:
        Engine.of(settings).collect_garbage()
        report(b"collected")

    for outcome in killed_at_every_step(work):
        driver = restarted_driver(settings)
        assert set(shown(driver, base)) == {b"base", b"shared"}
        if not outcome.was_killed:
            assert len(object_names(settings)) == 2
        make_garbage(settings)


def make_garbage(settings: Settings) -> None:
    driver = InProcess(settings)
    driver.remove(apply_layer(driver, *FILES, *(file(f"g{number}", b"garbage %d" % number) for number in range(3))))


def test_an_import_survives_a_collector_killed_at_any_step(settings: Settings, base: str) -> None:
    """The collector hides an object that the import has found, and is killed; the layer is still complete."""
    make_garbage(settings)
    first, second = tar(*FILES)[:-1024], tar(file("end", b"the end"))

    def work(report: Report) -> None:
        Engine.of(settings).collect_garbage()

    collector = killed_at_every_step(work)
    driver = InProcess(settings)
    for number in range(1000):
        id = f"layer-{number}"
        driver.create(id, base)
        paused = Interrupted(first, lambda: next(collector, None), second)
        driver.apply_diff(id, base, paused)
        assert driver.diff(id, base) == first + second, "every object is present"
        assert not list(Engine.of(settings).faults(read_data=True, repair=False))
        driver.remove(id)
        if paused.outcome is None:
            break
    assert number > 5, "the collector was killed at several steps"


def test_the_driver_starts_when_a_power_cut_emptied_the_record_of_an_unfinished_layer(settings: Settings) -> None:
    """The record of an empty layer is not synced. Its name may survive beside the container that replaced the layer."""
    driver = InProcess(settings)
    driver.create(LAYER, "")
    with mounted(driver, LAYER) as merged:
        (merged / "file").write_bytes(b"written")
    unfinished = settings.gear_images_path / LAYER
    unfinished.mkdir()
    (unfinished / RECORD_FILE).touch()
    driver = InProcess(settings)
    with pytest.raises(DriverError, match="damaged"):
        driver.get(LAYER)
    driver.remove(LAYER)
    assert not driver.exists(LAYER)
