"""Calls of containerd for one snapshot at the same time leave no mount and no layer that belongs to nothing."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest

from gearworkers.engine.engine import Engine
from gearworkers.errors import GearError
from gearworkers.layers.idmap import NO_MAPS
from gearworkers.layers.record import LayerKind
from gearworkers.mounts.overlay import is_mounted
from gearworkers.settings import Settings
from plugin_gateway.containerd.snapshots import Snapshots
from tests.faults.test_snapshot_crashes import check_agreement
from tests.support.tiny import tar_of

BASE, KEY = "test/1/base", "test/2/key"
ROUNDS = 120


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test")


@pytest.fixture
def snapshots(settings: Settings) -> Iterator[Snapshots]:
    """Yield snapshots with a committed base, while threads switch as often as possible."""
    interval_s = sys.getswitchinterval()
    engine = Engine.of(settings)
    engine.prepare()
    with closing(Snapshots(engine)) as snapshots:
        snapshots.open()
        snapshots.prepare(KEY, "", {})
        snapshots.commit(KEY, BASE, {})
        sys.setswitchinterval(1e-6)
        yield snapshots
        sys.setswitchinterval(interval_s)


def repeat(call: Callable[[], object], ended: Event) -> int:
    """Call until *ended*; return the number of calls that succeeded."""
    successes = 0
    while not ended.is_set():
        try:
            call()
            successes += 1
        except GearError:
            continue
    return successes


def beside(call: Callable[[], object], rounds: Callable[[], None]) -> int:
    """Repeat *call* in two threads beside *rounds*; return the number of calls that succeeded."""
    ended = Event()
    with ThreadPoolExecutor(2) as pool:
        repeated = [pool.submit(repeat, call, ended) for _ in range(2)]
        try:
            rounds()
        finally:
            ended.set()
        return sum(future.result(60) for future in repeated)


@pytest.mark.parametrize("call", ["prepare", "view"])
def test_a_removal_leaves_no_mount_beside_mounts(settings: Settings, snapshots: Snapshots, call: str) -> None:
    def rounds() -> None:
        for _ in range(ROUNDS):
            getattr(snapshots, call)(KEY, BASE, {})
            snapshots.remove(KEY)

    assert beside(lambda: snapshots.mounts(KEY), rounds)
    check_agreement(settings, snapshots)


def test_a_commit_leaves_no_mount_beside_mounts(settings: Settings, snapshots: Snapshots) -> None:
    sources = []

    def rounds() -> None:
        for number in range(ROUNDS):
            (mount,) = snapshots.prepare(KEY, BASE, {})
            snapshots.commit(KEY, f"test/{number}/name", {})
            sources.append(Path(mount.source))

    assert beside(lambda: snapshots.mounts(KEY), rounds)
    assert not list(filter(is_mounted, sources)), "nobody writes into a committed snapshot"
    check_agreement(settings, snapshots)


def test_no_view_lacks_files_when_indexes_are_unmounted_beside_it(settings: Settings, snapshots: Snapshots) -> None:
    engine = Engine.of(settings)
    engine.create("snapshot-1000", "", LayerKind.NEW)
    engine.apply_diff("snapshot-1000", "", io.BytesIO(tar_of({"file": b"content"})))
    target = settings.gear_root / "view"
    target.mkdir()

    def rounds() -> None:
        for _ in range(ROUNDS):
            engine.mounts.mount_read_only("snapshot-1000", target, NO_MAPS)
            assert (target / "file").read_bytes() == b"content"
            engine.mounts.unmount_view(target)

    assert beside(engine.mounts.unmount_indexes, rounds)


def succeeds(call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except GearError:
        return False
    return True


def test_a_key_belongs_to_one_of_many_callers(settings: Settings, snapshots: Snapshots) -> None:
    calls = [snapshots.view, snapshots.prepare] * 4
    with ThreadPoolExecutor(len(calls)) as pool:
        for _ in range(ROUNDS // 4):
            assert sum(pool.map(lambda call: succeeds(call, KEY, BASE, {}), calls)) == 1
            snapshots.remove(KEY)
    check_agreement(settings, snapshots)


def test_a_parent_is_removed_or_has_a_child(settings: Settings, snapshots: Snapshots) -> None:
    with ThreadPoolExecutor(2) as pool:
        for number in range(ROUNDS):
            parent = f"test/{number}/parent"
            snapshots.prepare(KEY, BASE, {})
            snapshots.commit(KEY, parent, {})
            child = pool.submit(succeeds, snapshots.prepare, KEY, parent, {})
            removed = pool.submit(succeeds, snapshots.remove, parent)
            assert child.result(60) != removed.result(60)
            for name in (KEY, parent):
                succeeds(snapshots.remove, name)
    check_agreement(settings, snapshots)
