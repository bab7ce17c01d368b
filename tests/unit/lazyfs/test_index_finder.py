"""Look-ups of remote indexes: bounded in time, remembered, and paused while the remote is away."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from gearworkers.errors import NotFound, Unavailable
from gearworkers.images.layer_records import ConvertedLayer, LayerRecord, record_name
from gearworkers.lazyfs.client import LayerIndex
from gearworkers.lazyfs.index_finder import IndexFinder
from tests.support.processes import wait_until

INDEX = b"an index"
LAYERS = [f"sha256:{number:064x}" for number in range(1, 5)]


class Documents:
    """The documents of a remote; they can be slow, or refused."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()

    def __call__(self, name: str) -> bytes | None:
        self.asked.append(name)
        self.go.wait(20)
        if self.error is not None:
            raise self.error
        return self.stored.get(name)

    def add(self, layer: str, object_digest: bytes, *, has_index: bool = True) -> None:
        diff_id = f"sha256:{'d' * 64}"
        made = ConvertedLayer(layer, f"sha256:{object_digest.hex()}", len(INDEX), diff_id, 1, 1, 1, 1, 1)
        self.stored[record_name(layer)] = msgspec.json.encode(LayerRecord(made, diff_id, 7, has_index))


class Node:
    """A finder over a remote that has one index."""

    def __init__(self) -> None:
        self.documents, self.digest = Documents(), hashlib.sha256(INDEX).digest()
        self.sends = threading.Event()
        self.sends.set()
        self.finder = IndexFinder(self.documents, self.content, lookup_s=0.2, probe_interval_s=0.1)
        self.index = LayerIndex(self.digest, len(INDEX), f"sha256:{'d' * 64}", 7)

    def content(self, digest: bytes) -> Iterator[bytes]:
        if digest != self.digest:
            raise NotFound("no such object")
        yield INDEX[:3]
        self.sends.wait(20)
        yield INDEX[3:]


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.documents.go.set()
    node.sends.set()
    node.finder.close()


def test_the_layers_with_an_index_are_found(node: Node) -> None:
    node.documents.add(LAYERS[0], node.digest)
    node.documents.add(LAYERS[1], node.digest, has_index=False)
    assert node.finder.find([*LAYERS[:3], "sha256:short"]) == {LAYERS[0]: node.index}


def test_an_absent_record_is_looked_up_once(node: Node) -> None:
    assert node.finder.find(LAYERS[:2]) == {}
    asked = len(node.documents.asked)
    node.documents.add(LAYERS[0], node.digest)
    assert node.finder.find(LAYERS[:2]) == {} and len(node.documents.asked) == asked


def test_a_slow_remote_is_waited_for_once_until_it_answers(node: Node) -> None:
    node.documents.add(LAYERS[0], node.digest)
    node.documents.go.clear()
    begin_s = time.monotonic()
    assert node.finder.find(LAYERS) == {}
    assert 0.2 <= time.monotonic() - begin_s < 2
    begin_s = time.monotonic()
    assert node.finder.find(LAYERS) == {}
    assert time.monotonic() - begin_s < 0.1
    node.documents.go.set()
    wait_until(lambda: node.finder.find(LAYERS[:1]) == {LAYERS[0]: node.index}, "the remote is asked again")


def test_a_remote_that_fails_is_asked_again_when_it_answers(node: Node) -> None:
    node.documents.add(LAYERS[0], node.digest)
    node.documents.error = Unavailable("down")
    assert node.finder.find(LAYERS[:1]) == {}
    time.sleep(0.3)
    assert node.finder.find(LAYERS[:1]) == {}
    node.documents.error = None
    wait_until(lambda: node.finder.find(LAYERS[:1]) == {LAYERS[0]: node.index}, "the remote is asked again")


def test_an_index_is_written_to_a_file(node: Node, tmp_path: Path) -> None:
    node.finder.fetch(node.index, tmp_path / "index")
    assert (tmp_path / "index").read_bytes() == INDEX


def test_an_index_that_the_remote_lacks_is_an_error(node: Node, tmp_path: Path) -> None:
    missing = msgspec.structs.replace(node.index, object_digest=bytes(32))
    with pytest.raises(NotFound):
        node.finder.fetch(missing, tmp_path / "index")


def test_an_index_that_does_not_arrive_is_given_up(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gearworkers.lazyfs.index_finder._FETCH_BASE_S", 0.1)
    node.sends.clear()
    with pytest.raises(Unavailable, match="does not arrive"):
        node.finder.fetch(node.index, tmp_path / "index")
    assert node.finder.find(LAYERS) == {} and not node.documents.asked, "the remote counts as away"
