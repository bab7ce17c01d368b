"""SIGKILL at every step of Get and Put: one mount or none, never two, and a container's files stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from gearworkers.driver import GearDriver
from gearworkers.settings import Settings
from tests.conformance.drivers import InProcess
from tests.conformance.layers import applied, file
from tests.faults.crashes import Say, killed_at_every_step

READ_WRITE = ("container", "container-init")  # the latter is mounted without sync


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test")


@pytest.fixture
def base(settings: Settings) -> str:
    return applied(InProcess(settings), file("base", b"of the base"))


def layer_of(settings: Settings, kind: str, base: str) -> str:
    """A layer that is not mounted; a read-write one holds a file of its own."""
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
    """Get, as dockerd repeats it, and one Put: mounted once, then not at all."""
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

    def work(say: Say) -> None:
        GearDriver(settings).get(id)
        say(b"mounted")

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
def test_a_put_killed_at_any_step_is_repeated_or_followed_by_a_get(settings: Settings, base: str, kind: str) -> None:
    id = layer_of(settings, kind, base)

    def work(say: Say) -> None:
        GearDriver(settings).put(id)
        say(b"unmounted")

    merged = InProcess(settings).get(id)
    for outcome in killed_at_every_step(work):
        InProcess(settings).put(id)
        assert mounts_at(merged) == 0
        check_one_user(settings, id)
        InProcess(settings).get(id)
        assert outcome.was_killed or outcome.said
    InProcess(settings).put(id)
