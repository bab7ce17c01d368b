"""SIGKILL at every step of Get and Put leaves at most one mount and keeps the files of the container."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.drivers import InProcess
from tests.conformance.layers import apply_layer, file
from tests.faults.crashes import Report, killed_at_every_step
from tests.support.lazynode import LazyNode, lazy_node

READ_WRITE = ("container", "container-init")  # the second one is mounted volatile


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test")


@pytest.fixture
def base(settings: Settings) -> str:
    return apply_layer(InProcess(settings), file("base", b"of the base"))


def layer_of(settings: Settings, kind: str, base: str) -> str:
    """Create an unmounted layer; a read-write layer has a file of its own."""
    if kind == "image":
        return base
    driver = InProcess(settings)
    if kind == "new":
        driver.create(kind, base)
        return kind
    driver.create_read_write(kind, base)
    (driver.get(kind) / "own").write_bytes(b"of the container")
    driver.put(kind)
    return kind


def mounts_at(merged: Path) -> int:
    fields = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sum(field[4] == str(merged) for field in fields)


def check_one_user(settings: Settings, id: str) -> None:
    """Check that a Get, as dockerd repeats it, mounts once and that a Put unmounts."""
    driver = InProcess(settings)
    merged = driver.get(id)
    assert mounts_at(merged) == 1
    assert (merged / "base").read_bytes() == b"of the base"
    if id in READ_WRITE:
        assert (merged / "own").read_bytes() == b"of the container"
    driver.put(id)
    assert mounts_at(merged) == 0


@pytest.mark.parametrize("kind", ["image", "new", *READ_WRITE])
def test_a_get_killed_at_any_step_leaves_no_second_mount(settings: Settings, base: str, kind: str) -> None:
    id = layer_of(settings, kind, base)

    def work(report: Report) -> None:
        GearDriver(settings).get(id)
        report(b"mounted")

    kills = 0
    for outcome in killed_at_every_step(work):
        kills += outcome.was_killed
        if outcome.was_killed:
            check_one_user(settings, id)
        if kind == "new":
            InProcess(settings).remove(id)
            InProcess(settings).create(id, base)
    assert kills >= 4
    InProcess(settings).remove(id)


@pytest.mark.parametrize("kind", ["image", *READ_WRITE])
def test_a_put_killed_at_any_step_can_be_repeated(settings: Settings, base: str, kind: str) -> None:
    id = layer_of(settings, kind, base)

    def work(report: Report) -> None:
        GearDriver(settings).put(id)
        report(b"unmounted")

    merged = InProcess(settings).get(id)
    for outcome in killed_at_every_step(work):
        InProcess(settings).put(id)
        assert mounts_at(merged) == 0
        check_one_user(settings, id)
        InProcess(settings).get(id)
        assert outcome.was_killed or outcome.reported
    InProcess(settings).put(id)


def killed_calls(settings: Settings, call: str, id: str) -> Iterator[bool]:
    """Kill a Get or Put at each of its steps; yield whether it had returned."""

    def work(report: Report) -> None:
        getattr(GearDriver(settings), call)(id)
        report(b"done")

    return (bool(outcome.reported) for outcome in killed_at_every_step(work))


@pytest.mark.parametrize("call", ["put", "remove"])
def test_a_put_or_remove_after_a_killed_get_unmounts(settings: Settings, base: str, call: str) -> None:
    mounted = 0
    for _ in killed_calls(settings, "get", layer_of(settings, "container", base)):
        driver = InProcess(settings)
        merged = Path(driver.get_metadata("container")["MergedDir"])
        mounted += mounts_at(merged)
        getattr(driver, call)("container")
        assert not mounts_at(merged)
        driver.remove("container")
        assert not merged.exists()
        layer_of(settings, "container", base)
    assert mounted > 1, "some calls were killed after the mount"


def test_a_new_dockerd_counts_no_user_for_a_killed_get(settings: Settings, base: str) -> None:
    id = layer_of(settings, "container", base)
    for answered in killed_calls(settings, "get", id):
        driver = InProcess(settings)
        driver.init()
        merged = driver.get(id)
        driver.put(id)
        assert mounts_at(merged) == answered, "an answered mount belongs to a container"
    driver.put(id)


def test_a_killed_call_of_one_user_does_not_affect_another_user(settings: Settings, base: str) -> None:
    id = layer_of(settings, "container", base)
    driver = InProcess(settings)
    merged = driver.get(id)
    for answered in killed_calls(settings, "get", id):
        check_one_mount(driver, id, merged)
        if answered:
            driver.put(id)
    driver.get(id)
    for answered in killed_calls(settings, "put", id):
        if not answered:
            driver.put(id)
        check_one_mount(driver, id, merged)
        driver.get(id)
    driver.put(id)
    assert mounts_at(merged) == 1
    driver.put(id)
    assert not mounts_at(merged)


def check_one_mount(driver: InProcess, id: str, merged: Path) -> None:
    """Check that a Get and a Put leave the mount of the other users."""
    driver.get(id)
    assert mounts_at(merged) == 1
    driver.put(id)
    assert mounts_at(merged) == 1


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LazyNode]:
    """Yield a node that records the starts of containers."""
    with lazy_node(tmp_path) as node:
        node.settings = replace(node.settings, remote=replace(node.settings.remote, url=str(tmp_path / "remote")))
        node.pull({"base": b"of the base"}, "base")
        yield node


def test_killed_gets_and_puts_of_lazy_layers_and_recorded_starts_leave_no_second_mount(node: LazyNode) -> None:
    driver = InProcess(node.settings)
    id = layer_of(node.settings, "container", "base")
    for answered in killed_calls(node.settings, "get", id):
        merged = driver.get(id)
        assert mounts_at(merged) == 1 and (merged / "base").read_bytes() == b"of the base"
        assert answered or "recording" in [thread.name for thread in threading.enumerate()]
        driver.put(id)
        if answered:
            driver.put(id)
        assert not mounts_at(merged)
    driver.get(id)
    for answered in killed_calls(node.settings, "put", id):
        if not answered:
            driver.put(id)
        assert not mounts_at(merged)
        driver.get(id)
        assert mounts_at(merged) == 1 and (merged / "own").read_bytes() == b"of the container"
