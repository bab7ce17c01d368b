"""SIGKILL at every step of containerd's snapshot calls; the next start makes the table and the layers agree."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from gearworkers.engine.engine import Engine
from gearworkers.mounts.overlay import unmount
from gearworkers.settings import Settings
from plugin_gateway.containerd.snapshot_table import AppliedBlob, Snapshot, SnapshotKind
from plugin_gateway.containerd.snapshots import Mount, Snapshots
from tests.conformance.layers import file, tar
from tests.faults.crashes import Report, killed_at_every_step

BASE, KEY, NAME = "test/1/base", "test/2/key", "test/3/name"
UNPACK_KEY = "test/2/extract-1 sha256:0"
DIGEST = "sha256:" + "0" * 64
OWN = b"of the snapshot itself"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test")
    with opened(settings) as snapshots:
        write(snapshots.prepare(KEY, "", {}), "base")
        snapshots.commit(KEY, BASE, {})
    return settings


@contextmanager
def opened(settings: Settings) -> Iterator[Snapshots]:
    """Start as a gateway does, which repairs the leftovers of a crash; check the result."""
    engine = Engine.of(settings)
    engine.prepare()
    with closing(Snapshots(engine)) as snapshots:
        snapshots.open()
        check_agreement(settings, snapshots)
        yield snapshots


def check_agreement(settings: Settings, snapshots: Snapshots) -> None:
    """Check that each layer, view directory and mount belongs to a row, and each row has its layer."""
    rows = list(snapshots.list(()))
    layers = {row.layer for row in rows if row.kind is not SnapshotKind.VIEW}
    views = {str(row.number) for row in rows if row.kind is SnapshotKind.VIEW}
    assert set(Engine.of(settings).layers.ids()) == layers
    assert {path.name for path in (settings.gear_root / "views").iterdir()} <= views
    assert not list(settings.gear_build_path.iterdir())
    for directory, id in mounts_below(settings.gear_root):
        assert id in (views if directory == "views" else layers), f"{directory}/{id} is mounted"


def mounts_below(root: Path) -> list[tuple[str, str]]:
    """Return the first two names of each mount point below *root*."""
    points = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [
        (point.relative_to(root).parts[0], point.relative_to(root).parts[1])
        for point in points
        if root in point.parents
    ]


def write(mounts: Sequence[Mount], name: str) -> None:
    (Path(mounts[0].source) / name).write_bytes(OWN)


def files(mounts: Sequence[Mount]) -> set[str]:
    paths = list(Path(mounts[0].source).iterdir())
    assert all(path.read_bytes() == OWN for path in paths)
    return {path.name for path in paths}


def files_of_view(snapshots: Snapshots, name: str) -> set[str]:
    """Return the names of the files that a view of a committed snapshot shows."""
    shown = files(snapshots.view("test/9/view", name, {}))
    snapshots.remove("test/9/view")
    return shown


def rows_of(snapshots: Snapshots) -> dict[str, Snapshot]:
    """Return all snapshots by name except the base."""
    return {row.name: row for row in snapshots.list(()) if row.name != BASE}


def calling(settings: Settings, call: Callable[[Snapshots], object]) -> Callable[[Report], None]:
    """Return the work of a child that starts a gateway, calls and reports."""

    def work(report: Report) -> None:
        engine = Engine.of(settings)
        engine.prepare()
        snapshots = Snapshots(engine)
        snapshots.open()
        call(snapshots)
        report(b"done")

    return work


@pytest.mark.parametrize("key", [KEY, UNPACK_KEY], ids=["mounted", "to be unpacked"])
def test_a_killed_prepare_leaves_a_whole_snapshot_or_none(settings: Settings, key: str) -> None:
    states = []
    for outcome in killed_at_every_step(calling(settings, lambda snapshots: snapshots.prepare(key, BASE, {"a": "1"}))):
        with opened(settings) as snapshots:
            found = rows_of(snapshots)
            states.append(key in found)
            assert states[-1] or not outcome.reported
            if not states[-1]:
                assert not found
                snapshots.prepare(key, BASE, {"a": "1"})
            check_active(snapshots, key)
            snapshots.remove(key)
            check_agreement(settings, snapshots)
    assert set(states) == {False, True}


def check_active(snapshots: Snapshots, key: str) -> None:
    """Check that an active snapshot on the base is usable."""
    row = snapshots.stat(key)
    assert (row.kind, row.parent, row.labels) == (SnapshotKind.ACTIVE, BASE, {"a": "1"})
    if key == KEY:
        write(snapshots.mounts(key), "own")
        assert files(snapshots.mounts(key)) == {"base", "own"}
    else:
        assert snapshots.mounts(key)[0].type == "gear-layer"
    snapshots.commit(key, NAME, {})
    assert files_of_view(snapshots, NAME) == ({"base", "own"} if key == KEY else {"base"})
    snapshots.remove(NAME)
    snapshots.prepare(key, BASE, {})


@pytest.mark.parametrize("parent", [BASE, ""], ids=["on a parent", "without a parent"])
def test_a_killed_view_leaves_a_whole_view_or_none(settings: Settings, parent: str) -> None:
    states = []
    for outcome in killed_at_every_step(calling(settings, lambda snapshots: snapshots.view(KEY, parent, {}))):
        with opened(settings) as snapshots:
            states.append(KEY in rows_of(snapshots))
            assert states[-1] or not outcome.reported
            if not states[-1]:
                snapshots.view(KEY, parent, {})
            assert files(snapshots.mounts(KEY)) == ({"base"} if parent else set())
            assert len(mounts_of_views(settings)) == bool(parent)
            snapshots.remove(KEY)
            check_agreement(settings, snapshots)
    assert set(states) == {False, True}


def mounts_of_views(settings: Settings) -> list[str]:
    return [id for directory, id in mounts_below(settings.gear_root) if directory == "views"]


@pytest.mark.parametrize("named", ["at prepare", "at commit"])
def test_a_killed_commit_leaves_the_active_snapshot_or_the_committed_one(settings: Settings, named: str) -> None:
    at_prepare, at_commit = (BASE, "") if named == "at prepare" else ("", BASE)

    def prepare(snapshots: Snapshots) -> None:
        write(snapshots.prepare(KEY, at_prepare, {}), "own")

    with opened(settings) as snapshots:
        prepare(snapshots)
    states = []
    work = calling(settings, lambda snapshots: snapshots.commit(KEY, NAME, {"a": "1"}, at_commit))
    for outcome in killed_at_every_step(work):
        with opened(settings) as snapshots:
            (state,) = rows_of(snapshots)
            states.append(state)
            if state == KEY:
                assert not outcome.reported
                snapshots.commit(KEY, NAME, {"a": "1"}, at_commit)
            check_committed(snapshots)
            snapshots.remove(NAME)
            prepare(snapshots)
    assert set(states) == {KEY, NAME}


def check_committed(snapshots: Snapshots) -> None:
    row = snapshots.stat(NAME)
    assert (row.kind, row.parent, row.labels) == (SnapshotKind.COMMITTED, BASE, {"a": "1"})
    assert row.size_bytes > 0
    assert files_of_view(snapshots, NAME) == {"base", "own"}


@pytest.mark.parametrize("kind", list(SnapshotKind), ids=lambda kind: kind.name.lower())
def test_a_killed_removal_leaves_the_snapshot_or_nothing(settings: Settings, kind: SnapshotKind) -> None:
    with opened(settings) as snapshots:
        make(snapshots, kind)
    states = []
    for outcome in killed_at_every_step(calling(settings, lambda snapshots: snapshots.remove(NAME))):
        with opened(settings) as snapshots:
            states.append(NAME in rows_of(snapshots))
            assert not (states[-1] and outcome.reported)
            if not states[-1]:
                make(snapshots, kind)
            elif kind is SnapshotKind.COMMITTED:
                assert files_of_view(snapshots, NAME) == {"base", "own"}
            else:
                assert files(snapshots.mounts(NAME)) >= {"base"}
    assert set(states) == {False, True}


def make(snapshots: Snapshots, kind: SnapshotKind) -> None:
    """Make the snapshot on the base, mounted unless it is committed."""
    match kind:
        case SnapshotKind.VIEW:
            snapshots.view(NAME, BASE, {})
        case SnapshotKind.ACTIVE:
            write(snapshots.prepare(NAME, BASE, {}), "own")
        case SnapshotKind.COMMITTED:
            write(snapshots.prepare(KEY, BASE, {}), "own")
            snapshots.commit(KEY, NAME, {})


def test_a_killed_copy_leaves_an_empty_or_a_filled_snapshot(settings: Settings) -> None:
    def copy(snapshots: Snapshots) -> None:
        layer = snapshots.layer_of(snapshots.mounts(UNPACK_KEY))
        assert layer
        snapshots.prepare_apply(layer)
        copied = snapshots.copy_applied(layer, DIGEST)
        assert copied
        snapshots.note_applied(copied)

    with opened(settings) as snapshots:
        layer = snapshots.layer_of(snapshots.prepare("test/2/extract-first", "", {}))
        assert layer
        Engine.of(settings).apply_diff(layer, "", io.BytesIO(tar(file("own", OWN))))
        snapshots.note_applied(AppliedBlob(DIGEST, layer, DIGEST, 10))
        snapshots.prepare(UNPACK_KEY, BASE, {})
    states = []
    for outcome in killed_at_every_step(calling(settings, copy)):
        with opened(settings) as snapshots:
            states.append(snapshots.mounts(UNPACK_KEY)[0].type == "bind")
            assert states[-1] or not outcome.reported
            if not states[-1]:
                copy(snapshots)
            assert files(snapshots.mounts(UNPACK_KEY)) == {"base", "own"}
            assert not list(Engine.of(settings).faults(read_data=True, repair=False))
            snapshots.remove(UNPACK_KEY)
            snapshots.prepare(UNPACK_KEY, BASE, {})
    assert set(states) == {False, True}


def test_a_start_removes_snapshots_that_lost_their_layers(settings: Settings) -> None:
    """A power cut may undo the removal of rows, which is not synced. A parent may be younger than its child."""
    with opened(settings) as snapshots:
        snapshots.prepare(KEY, "", {})
        snapshots.prepare("test/4/parent", BASE, {})
        snapshots.commit("test/4/parent", "test/5/parent", {})
        snapshots.commit(KEY, NAME, {}, "test/5/parent")
        snapshots.view("test/6/view", NAME, {})
        lost = [snapshots.stat(name).layer for name in (NAME, "test/5/parent")]
    for layer in lost:
        Engine.of(settings).remove(layer)
    with opened(settings) as snapshots:
        assert not rows_of(snapshots)
        assert files_of_view(snapshots, BASE) == {"base"}


def test_a_start_keeps_the_row_of_a_lost_layer_that_has_children(settings: Settings) -> None:
    with opened(settings) as snapshots:
        snapshots.prepare(UNPACK_KEY, BASE, {})
        Engine.of(settings).remove(snapshots.stat(BASE).layer)
    engine = Engine.of(settings)
    engine.prepare()
    with closing(Snapshots(engine)) as snapshots:
        snapshots.open()
        assert {row.name for row in snapshots.list(())} == {UNPACK_KEY, BASE}
        for name in (UNPACK_KEY, BASE):
            snapshots.remove(name)
        check_agreement(settings, snapshots)


def test_a_view_is_mounted_again_after_a_reboot(settings: Settings) -> None:
    with opened(settings) as snapshots:
        assert files(snapshots.view(KEY, BASE, {})) == {"base"}
        (view,) = mounts_of_views(settings)
    unmount(settings.gear_root / "views" / view)
    with opened(settings) as snapshots:
        assert files(snapshots.mounts(KEY)) == {"base"}
