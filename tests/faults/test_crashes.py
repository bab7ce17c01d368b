"""SIGKILL at every step of an import, a removal and a garbage collection: leftovers are never wrong and are mended."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from gearworkers.cas.collector import HIDDEN
from gearworkers.engine.engine import Engine
from gearworkers.layers.record import RECORD_FILE
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.drivers import InProcess, Refused
from tests.conformance.layers import (
    File,
    applied,
    directory,
    file,
    hardlink,
    mounted,
    object_names,
    object_path,
    shown,
    tar,
)
from tests.faults.crashes import Interrupted, Outcome, Say, killed_at_every_step
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
    return applied(InProcess(settings), file("base", b"only in the base"), file("shared", SHARED))


@pytest.fixture
def whole(settings: Settings, base: str) -> dict[bytes, Node]:
    """The tree of the whole layer."""
    driver = InProcess(settings)
    id = applied(driver, *FILES, parent=base)
    nodes = shown(driver, id)
    driver.remove(id)
    return nodes


def recovered(settings: Settings) -> InProcess:
    """A driver that starts after a crash; nothing is left over and nothing damaged."""
    driver = InProcess(settings)
    assert not list(settings.gear_build_path.iterdir())
    assert not list((settings.gear_root / HIDDEN).iterdir())
    faults = list(Engine.of(settings).faults(read_data=True, repair=False))
    assert not [fault for fault in faults if "did not finish" not in fault]
    return driver


def test_an_import_killed_at_any_step_leaves_a_complete_layer_or_none(
    settings: Settings, base: str, whole: dict[bytes, Node]
) -> None:
    data = tar(*FILES)

    def work(say: Say) -> None:
        driver = GearDriver(settings)
        driver.create(LAYER, base)
        say(b"created")
        driver.apply_diff(LAYER, base, io.BytesIO(data))
        say(b"applied")

    ends = []
    for outcome in killed_at_every_step(work):
        driver = recovered(settings)
        ends.append(state(driver, whole))
        check_state(outcome, ends[-1])
        if ends[-1] == "whole":
            assert driver.diff(LAYER, base) == data
        driver.remove(LAYER)
        check_only_base(settings, driver, base)
    assert {"absent", "empty", "unfinished", "whole"} <= set(ends), "the sweep met every state"


def test_a_private_import_killed_at_any_step_leaves_a_complete_layer_or_none(settings: Settings, base: str) -> None:
    def work(say: Say) -> None:
        driver = GearDriver(settings)
        driver.create(LAYER, base)
        driver.apply_diff(LAYER, base, io.BytesIO(PRIVATE))
        say(b"applied")

    ends = []
    for outcome in killed_at_every_step(work):
        driver = recovered(settings)
        own = list(settings.gear_private_cache_path.glob("*/*/*"))
        ends.append(len(own))
        if own:
            assert driver.diff(LAYER, base) == PRIVATE
        assert len(own) == 2 if outcome.said else len(own) in (0, 2)
        driver.remove(LAYER)
        assert not list(settings.gear_private_cache_path.iterdir())
        check_only_base(settings, driver, base)
    assert set(ends) == {0, 2}


def state(driver: InProcess, whole: dict[bytes, Node]) -> str:
    if not driver.exists(LAYER):
        return "absent"
    try:
        driver.get_metadata(LAYER)
    except Refused as exc:
        assert "remove it" in str(exc)
        return "unfinished"
    nodes = shown(driver, LAYER)
    if nodes == whole:
        return "whole"
    assert set(nodes) == {b"base", b"shared"}
    return "empty"


def check_state(outcome: Outcome, end: str) -> None:
    match outcome.said:
        case []:
            assert end in ("absent", "empty")
        case [b"created"]:
            assert end in ("empty", "unfinished", "whole")
        case _:
            assert end == "whole", "ApplyDiff had answered"


def check_only_base(settings: Settings, driver: InProcess, base: str) -> None:
    """The collector finds all that the crash has left, and no more."""
    Engine.of(settings).collect_garbage()
    assert set(shown(driver, base)) == {b"base", b"shared"}
    assert object_names(settings) == {object_path(settings, content) for content in (b"only in the base", SHARED)}


def test_a_removal_killed_at_any_step_leaves_the_layer_or_nothing(
    settings: Settings, base: str, whole: dict[bytes, Node]
) -> None:
    def work(say: Say) -> None:
        GearDriver(settings).remove(LAYER)
        say(b"removed")

    data = tar(*FILES)
    GearDriver(settings).create(LAYER, base)
    GearDriver(settings).apply_diff(LAYER, base, io.BytesIO(data))
    for outcome in killed_at_every_step(work):
        driver = recovered(settings)
        end = state(driver, whole)
        assert end == "absent" if outcome.said else end in ("absent", "whole")
        if end == "absent":
            driver.create(LAYER, base)
            driver.apply_diff(LAYER, base, data)


def test_a_private_removal_killed_at_any_step_leaves_the_layer_or_nothing(settings: Settings, base: str) -> None:
    def work(say: Say) -> None:
        GearDriver(settings).remove(LAYER)
        say(b"removed")

    def own() -> int:
        return len(list(settings.gear_private_cache_path.glob("*/*/*")))

    ends = []
    driver = InProcess(settings)
    driver.create(LAYER, base)
    driver.apply_diff(LAYER, base, PRIVATE)
    for outcome in killed_at_every_step(work):
        driver = recovered(settings)
        ends.append(own())
        if ends[-1]:
            assert driver.diff(LAYER, base) == PRIVATE and not outcome.said
        else:
            assert not driver.exists(LAYER)
            driver.create(LAYER, base)
            driver.apply_diff(LAYER, base, PRIVATE)
    assert set(ends) == {0, 2}


def test_a_killed_private_import_is_removed_completely_without_a_restart(settings: Settings, base: str) -> None:
    """A worker was killed, and the gateway goes on."""

    def work(say: Say) -> None:
        driver = GearDriver(settings)
        driver.create(LAYER, base)
        driver.apply_diff(LAYER, base, io.BytesIO(PRIVATE))

    gateway = GearDriver(settings)
    for _ in killed_at_every_step(work, stride=3):
        gateway.remove(LAYER)
        assert not list(settings.gear_private_cache_path.iterdir())
        assert not list(settings.gear_build_path.glob(f"{LAYER}.*"))


def test_a_collection_killed_at_any_step_loses_no_referenced_object(settings: Settings, base: str) -> None:
    def work(say: Say) -> None:
        Engine.of(settings).collect_garbage()
        say(b"collected")

    for outcome in killed_at_every_step(work):
        driver = recovered(settings)
        assert set(shown(driver, base)) == {b"base", b"shared"}
        if not outcome.was_killed:
            assert len(object_names(settings)) == 2
        make_garbage(settings)


def make_garbage(settings: Settings) -> None:
    driver = InProcess(settings)
    driver.remove(applied(driver, *FILES, *(file(f"g{number}", b"garbage %d" % number) for number in range(3))))


def test_an_import_survives_a_collector_killed_at_any_step(settings: Settings, base: str) -> None:
    """The import finds an object, the collector takes it for garbage, hides it and dies; the layer is whole."""
    make_garbage(settings)
    first, second = tar(*FILES)[:-1024], tar(file("end", b"the end"))

    def work(say: Say) -> None:
        Engine.of(settings).collect_garbage()

    collector = killed_at_every_step(work)
    driver = InProcess(settings)
    for number in range(1000):
        id = f"layer-{number}"
        driver.create(id, base)
        paused = Interrupted(first, lambda: next(collector, None), second)
        driver.apply_diff(id, base, paused)
        assert driver.diff(id, base) == first + second, "every object is there"
        assert not list(Engine.of(settings).faults(read_data=True, repair=False))
        driver.remove(id)
        if paused.outcome is None:
            break
    assert number > 5, "the sweep had steps"


def test_the_driver_starts_when_a_power_cut_emptied_the_record_of_an_unfinished_layer(settings: Settings) -> None:
    """The record of an empty layer is not synced; its name may have survived beside the container it became."""
    driver = InProcess(settings)
    driver.create(LAYER, "")
    with mounted(driver, LAYER) as merged:
        (merged / "file").write_bytes(b"written")
    unfinished = settings.gear_images_path / LAYER
    unfinished.mkdir()
    (unfinished / RECORD_FILE).touch()
    driver = InProcess(settings)
    with pytest.raises(Refused, match="damaged"):
        driver.get(LAYER)
    driver.remove(LAYER)
    assert not driver.exists(LAYER)
