"""The engine's mounts, without a front door: any number of mount calls create one mount."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gearworkers.engine.engine import Engine
from gearworkers.errors import InvalidInput, NotFound
from gearworkers.layers.record import LayerKind
from gearworkers.mounts.overlay import is_mounted
from gearworkers.settings import Settings
from tests.support.tiny import tar_of


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with an image layer and a container on it."""
    engine = Engine.of(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run"))
    engine.prepare()
    engine.create("image", "", LayerKind.NEW)
    engine.apply_diff("image", "", io.BytesIO(tar_of({"file": b"content"})))
    engine.create("container", "image", LayerKind.CONTAINER)
    yield engine
    for id in engine.layers.ids():
        engine.remove(id)
    engine.close()


def mounts_at(target: Path) -> int:
    return sum(line.split()[4] == str(target) for line in Path("/proc/self/mountinfo").read_text().splitlines())


@pytest.mark.parametrize("id", ["image", "container"])
def test_a_second_mount_changes_nothing_and_one_unmount_undoes_both(engine: Engine, id: str) -> None:
    target = engine.mount(id)
    assert engine.mount(id) == target
    assert mounts_at(target) == 1
    assert (target / "file").read_bytes() == b"content"
    engine.unmount(id)
    assert mounts_at(target) == 0
    engine.unmount(id)


def test_concurrent_mount_calls_create_one_mount(engine: Engine) -> None:
    with ThreadPoolExecutor(8) as pool:
        (target,) = set(pool.map(lambda _: engine.mount("container"), range(24)))
    assert mounts_at(target) == 1


def test_the_first_mount_of_a_new_layer_makes_it_read_write(engine: Engine) -> None:
    engine.create("snapshot", "image", LayerKind.NEW)
    (engine.mount("snapshot") / "written").write_bytes(b"by its user")
    assert engine.layers.get("snapshot").kind is LayerKind.CONTAINER
    engine.unmount("snapshot")
    assert [change.path for change in engine.changes("snapshot", "image")] == [b"/written"]


def test_a_mounted_layer_can_be_removed(engine: Engine) -> None:
    target = engine.mount("container")
    engine.remove("container")
    assert not target.exists()
    engine.remove("container")
    with pytest.raises(NotFound):
        engine.mount("container")


def test_another_engine_of_the_root_finds_the_mount(engine: Engine) -> None:
    target = engine.mount("container")
    (target / "written").touch()
    other = Engine.of(engine.settings)
    assert other.mount("container") == target
    assert mounts_at(target) == 1
    other.unmount("container")
    assert not is_mounted(target)


@pytest.mark.parametrize("call", ["mount", "unmount", "remove"])
def test_an_id_that_is_a_path_is_rejected(engine: Engine, call: str) -> None:
    with pytest.raises(InvalidInput, match="layer id"):
        getattr(engine, call)("../images/image")
