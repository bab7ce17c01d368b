"""Concurrent imports, removals and garbage collections in separate processes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest

from gearworkers.engine import mounts
from gearworkers.engine.engine import Engine
from gearworkers.layers.apply import STREAM_FILE
from gearworkers.settings import Settings
from gearworkers.tar.tar_split import RawBytes, TarSplitReader
from gearworkers.util.fs import opened_directory
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.drivers import InProcess
from tests.conformance.layers import file, object_names, tar
from tests.faults.crashes import Report, finish_child, has_output, start_child

ROUNDS = 40
CONTENTS = [b"content %d" % number for number in range(120)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test")
    InProcess(settings)
    return settings


def contents_tar(salt: int = 0) -> bytes:
    return tar(*(file(f"{salt}-{number}", content) for number, content in enumerate(CONTENTS)))


def import_and_remove(settings: Settings, name: str, report: Report) -> None:
    """Import the same contents repeatedly; check that each layer is complete while the collector runs."""
    for round in range(ROUNDS):
        id, data = f"{name}-{round}", contents_tar(round)
        driver = GearDriver(settings)
        driver.create(id, "")
        driver.apply_diff(id, "", io.BytesIO(data))
        out = io.BytesIO()
        driver.diff(id, "", out)
        assert out.getvalue() == data
        driver.remove(id)
        report(b"round")


def test_a_published_layer_never_lacks_an_object(settings: Settings) -> None:
    importers = [start_child(partial(import_and_remove, settings, name)) for name in ("a", "b")]
    collections = removed = 0
    running = dict(importers)
    while running:
        report = Engine.of(settings).collect_garbage()
        collections, removed = collections + 1, removed + report.removed_objects
        for pid, reader in list(running.items()):
            if has_output(reader) and not _is_alive(pid):
                outcome = finish_child(pid, reader)
                assert outcome.reported == [b"round"] * ROUNDS
                del running[pid]
    assert collections > 3
    assert removed > len(CONTENTS), "the collector had objects to remove"
    Engine.of(settings).collect_garbage()
    assert object_names(settings) == set()
    assert not list((settings.gear_root / "hidden").iterdir())


def _is_alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def test_contents_imported_concurrently_are_stored_once(settings: Settings) -> None:
    def work(id: str, report: Report) -> None:
        driver = GearDriver(settings)
        driver.create(id, "")
        driver.apply_diff(id, "", io.BytesIO(contents_tar()))

    ids = [f"layer-{number}" for number in range(4)]
    for pid, reader in [start_child(partial(work, id)) for id in ids]:
        outcome = finish_child(pid, reader)
        assert not outcome.failed, outcome.reported
    assert len(object_names(settings)) == len(CONTENTS)
    records = [msgspec.json.decode((settings.gear_images_path / id / "layer.json").read_bytes()) for id in ids]
    assert all(record["objects"] == len(CONTENTS) for record in records)
    # Two imports that write the same content at the same moment may both count it as new. It is stored once.
    assert sum(record.get("new_objects", 0) for record in records) >= len(CONTENTS)
    for id in ids:
        with open(settings.gear_images_path / id / STREAM_FILE, "rb") as stream:
            contents = {piece.digest for piece in TarSplitReader(stream) if not isinstance(piece, RawBytes)}
        assert len(contents) == len(CONTENTS)
    assert not list(Engine.of(settings).faults(read_data=True, repair=False))


def test_an_import_does_not_wait_for_a_stalled_import_of_the_same_contents(settings: Settings) -> None:
    data = contents_tar()
    cut = len(data) // 2
    GearDriver(settings).create("stalled", "")
    pid, reader = start_child(partial(_apply_slowly, settings, "stalled", data[:cut], data[cut:]))
    assert os.read(reader, 64) == b" begun"
    driver = GearDriver(settings)
    driver.create("other", "")
    driver.apply_diff("other", "", io.BytesIO(data))
    (settings.gear_root / "go").touch()
    outcome = finish_child(pid, reader)
    assert not outcome.failed, outcome.reported
    assert len(object_names(settings)) == len(CONTENTS)
    assert not list(driver.engine.faults(read_data=True, repair=False))


def test_one_layer_is_applied_by_one_process_only(settings: Settings) -> None:
    GearDriver(settings).create("layer", "")

    def work(report: Report) -> None:
        GearDriver(settings).apply_diff("layer", "", io.BytesIO(contents_tar()))

    outcomes = [finish_child(pid, reader) for pid, reader in [start_child(work) for _ in range(4)]]
    assert [outcome.failed for outcome in outcomes].count(False) == 1
    for outcome in outcomes:
        if outcome.failed:
            assert outcome.reported[0].startswith((b"FailedPrecondition", b"AlreadyExists")), outcome.reported
    assert not list(Engine.of(settings).faults(read_data=True, repair=False))


def test_a_layer_removed_during_its_import_stays_removed(settings: Settings) -> None:
    driver = GearDriver(settings)
    driver.create("layer", "")
    first, second = tar(file("a", b"a"))[:-1024], tar(file("b", b"b"))
    pid, reader = start_child(partial(_apply_slowly, settings, "layer", first, second))
    assert os.read(reader, 64) == b" begun"
    driver.remove("layer")
    (settings.gear_root / "go").touch()
    outcome = finish_child(pid, reader)
    assert outcome.failed
    assert outcome.reported[0].startswith(b"NotFound")
    assert not driver.exists("layer")
    assert not list(settings.gear_build_path.iterdir())


def _apply_slowly(settings: Settings, id: str, first: bytes, second: bytes, report: Report) -> None:
    class Slow:
        def __init__(self) -> None:
            self.parts = [second, first]

        def readinto(self, buffer: memoryview, /) -> int:
            if len(self.parts) == 1:
                report(b"begun")
                while not (settings.gear_root / "go").exists():
                    os.sched_yield()
            part = self.parts.pop() if self.parts else b""
            buffer[: len(part)] = part
            return len(part)

    GearDriver(settings).apply_diff(id, "", Slow())


def test_a_diff_is_complete_if_the_container_is_unmounted_just_before_it_is_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount point is then an empty directory, but the diff is not empty."""
    driver = GearDriver(settings)
    driver.create_read_write("container", "")
    Path(driver.get("container"), "file").write_bytes(b"written")

    @contextmanager
    def opened_late(path: Path) -> Iterator[int]:
        driver.put("container")
        with opened_directory(path) as fd:
            yield fd

    with monkeypatch.context() as patch:
        patch.setattr(mounts, "opened_directory", opened_late)
        out = io.BytesIO()
        driver.diff("container", "", out)
    assert b"written" in out.getvalue()
