"""Layers of an image are applied before containerd asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gearworkers.errors import NotFound
from gearworkers.settings import Settings
from gearworkers.workers.messages import ApplyDiff, JobResult, StoredBlob
from plugin_gateway.containerd import early_apply as module
from plugin_gateway.containerd.early_apply import EarlyApplies
from plugin_gateway.containerd.image_blobs import ImageBlob
from tests.support.images import tar_of

pytestmark = pytest.mark.slow

BASE = "sha256:base"
BIG = bytes(module.MIN_BLOB_BYTES)


class Layers:
    """An engine whose layers are names."""

    def __init__(self, root: Path, slots: int) -> None:
        self.settings = Settings(gear_root=root, worker_processes=slots)
        self.names: set[str] = set()

    def create(self, id: str, parent: str, kind: object) -> None:
        self.names.add(id)

    def remove(self, id: str) -> None:
        self.names.discard(id)


class Jobs:
    """A dispatcher whose jobs end when `go` is set; it records them and the largest number at one time."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.paths: list[str] = []
        self.running = self.max_running = 0
        self.error = ""

    async def run(self, job: ApplyDiff, stream: StoredBlob) -> SimpleNamespace:
        self.paths.append(Path(stream.path).name)
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        await self.go.wait()
        self.running -= 1
        return SimpleNamespace(result=JobResult(error=self.error, digest=f"diff of {job.id}", stream_bytes=7))


class Image:
    """The blobs of one image, base first."""

    def __init__(self, directory: Path, layers: int) -> None:
        self.blobs = [ImageBlob(BASE, len(BIG), directory / "base")]
        self.blobs += [ImageBlob(f"sha256:{n}", len(BIG), directory / str(n)) for n in range(1, layers)]
        for blob in self.blobs:
            blob.path.write_bytes(tar_of([("file", BIG)]))

    def of_image(self, digest: str, position: int, namespace: str) -> list[ImageBlob]:
        if digest != BASE:
            raise NotFound("no manifest")
        return self.blobs


class Node:
    """The parts of one test, on the loop that runs it."""

    def __init__(self, directory: Path, *, layers: int = 4, slots: int = 2) -> None:
        self.image, self.layers, self.jobs = Image(directory, layers), Layers(directory, slots), Jobs()
        self.known: set[str] = set()
        parts: Any = (self.layers, self.jobs, self.image, self, self.known.__contains__)
        self.early = EarlyApplies(*parts)

    async def begin(self) -> None:
        self.early.begin(BASE, 0, "default")
        await settle()


async def settle() -> None:
    """Let the tasks do everything that they can do now."""
    for _ in range(50):
        await asyncio.sleep(0.001)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def test_layers_above_the_first_are_applied_in_free_slots(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        await node.begin()
        assert node.jobs.paths == ["1", "2"]
        node.jobs.go.set()
        await settle()
        assert (node.jobs.paths, node.jobs.max_running) == (["1", "2", "3"], 2)
        await node.early.close()

    run(scenario())


def test_a_requested_apply_leaves_one_slot_less(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        await node.early.slots.occupy()
        await node.begin()
        assert node.jobs.paths == ["1"]
        await node.early.slots.release()
        await settle()
        assert node.jobs.paths == ["1", "2"]
        await node.early.close()

    run(scenario())


def test_a_turn_waits_for_a_running_apply_and_takes_its_layer(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        await node.begin()
        request = asyncio.create_task(node.early.take("sha256:1"))
        await settle()
        assert not request.done()
        node.jobs.go.set()
        taken = await request
        assert taken is not None and (taken.diff_id, taken.tar_bytes) == (f"diff of {taken.layer}", 7)
        assert taken.layer in node.layers.names
        await node.early.remove(taken)
        assert taken.layer not in node.layers.names
        await node.early.close()

    run(scenario())


def test_a_turn_does_not_wait_for_an_apply_that_has_not_begun(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        await node.begin()
        assert await node.early.take("sha256:3") is None
        node.jobs.go.set()
        await settle()
        assert node.jobs.paths == ["1", "2"]
        await node.early.close()

    run(scenario())


def test_a_layer_waits_until_its_blob_is_downloaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        data = node.image.blobs[2].path.read_bytes()
        node.image.blobs[2].path.unlink()
        await node.begin()
        assert node.jobs.paths == ["1"]
        node.image.blobs[2].path.write_bytes(data)
        await asyncio.sleep(0.3)
        assert node.jobs.paths == ["1", "2"]
        await node.early.close()

    run(scenario())


def test_no_layer_above_a_private_one_is_applied(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, slots=8)
        node.image.blobs[2].path.write_bytes(tar_of([(".gear-private", b""), ("file", BIG)]))
        await node.begin()
        assert node.jobs.paths == ["1"]
        await node.early.close()

    run(scenario())


def test_known_and_small_layers_are_not_applied_early(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, slots=8)
        node.known.add("sha256:1")
        node.image.blobs[2] = node.image.blobs[2]._replace(size_bytes=100)
        await node.begin()
        assert node.jobs.paths == ["3"]
        await node.early.close()

    run(scenario())


def test_a_failed_early_apply_leaves_the_layer_to_the_requested_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, layers=2)
        node.jobs.error = "damaged"
        node.jobs.go.set()
        await node.begin()
        assert await node.early.take("sha256:1") is None
        assert node.layers.names == set()
        await node.early.close()

    run(scenario())


def test_layers_whose_turn_does_not_come_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_S", 0.05)

    async def scenario() -> None:
        node = Node(tmp_path)
        node.jobs.go.set()
        await node.begin()
        await asyncio.sleep(0.2)
        assert (len(node.jobs.paths), node.layers.names) == (3, set())
        assert await node.early.take("sha256:1") is None
        await node.early.close()

    run(scenario())


def test_closing_removes_the_layers_that_were_not_taken(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.jobs.go.set()
        await node.begin()
        assert node.layers.names
        await node.early.close()
        assert node.layers.names == set()

    run(scenario())
