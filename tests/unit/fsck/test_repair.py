"""`gear fsck --repair`: lost objects are fetched again, and containers never see a half-written object."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gearworkers.cas.inplace import InPlaceLock
from gearworkers.cas.store import ObjectStore
from gearworkers.engine.engine import Engine
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.lazynode import LazyNode, lazy_node
from tests.support.processes import wait_until
from tests.support.tiny import tar_of

pytestmark = pytest.mark.slow

FILES = {"etc/file": b"content " * 100, "etc/other": b"another " * 100}
DIGEST = hashlib.sha256(FILES["etc/file"]).digest()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LazyNode]:
    """A node with an ordinary image whose contents the remote also has."""
    with lazy_node(tmp_path) as one:
        one.apply(tar_of(FILES), "image")
        for content in FILES.values():
            one.source.put(content)
        assert (one.run("before") / "etc/file").read_bytes() == FILES["etc/file"]
        yield one


def damage(node: LazyNode) -> None:
    path = ObjectStore(node.settings.gear_public_cache_path).path(DIGEST)
    os.chmod(path, 0o600)
    Path(os.fsdecode(path)).write_bytes(b"damaged")


def may_store_in_place(node: LazyNode) -> bool:
    with closing(InPlaceLock(node.settings.gear_root)) as lock:
        return lock.acquire()


def test_a_damaged_object_is_fetched_again_when_it_is_opened(node: LazyNode) -> None:
    """The gateway has cached the layer's record; it notices that another process has changed it."""
    damage(node)
    assert may_store_in_place(node)
    incomplete: list[str] = []
    faults = list(Engine.of(node.settings).faults(read_data=True, repair=True, on_incomplete=incomplete.append))
    assert [line.split()[0] for line in faults] == ["object", "layer"]
    assert set(incomplete) == {"image"}
    assert not may_store_in_place(node)
    assert (node.run("after") / "etc/file").read_bytes() == FILES["etc/file"]
    wait_until(lambda: node.status().incomplete_layers == 0, "the layer is complete again")
    assert not list(Engine.of(node.settings).faults(read_data=True, repair=False))
    GearDriver(node.settings).prepare()
    assert may_store_in_place(node)


def test_a_missing_object_makes_its_layer_incomplete(node: LazyNode) -> None:
    ObjectStore(node.settings.gear_public_cache_path).remove(DIGEST)
    (fault,) = Engine.of(node.settings).faults(read_data=False, repair=False)
    assert "1 of its objects are missing" in fault
    assert node.status().incomplete_layers == 0
    list(Engine.of(node.settings).faults(read_data=False, repair=True))
    assert node.status().incomplete_layers == 1
    assert (node.run("after") / "etc/file").read_bytes() == FILES["etc/file"]


def test_a_half_written_file_of_a_killed_import_does_not_replace_a_lost_object(node: LazyNode) -> None:
    path = Path(os.fsdecode(ObjectStore(node.settings.gear_public_cache_path).path(DIGEST)))
    path.unlink()
    path.write_bytes(FILES["etc/file"][:100])
    list(Engine.of(node.settings).faults(read_data=False, repair=True))
    assert (node.run("after") / "etc/file").read_bytes() == FILES["etc/file"]


def test_storing_in_place_stays_forbidden_after_a_restart_while_an_object_is_lost(node: LazyNode) -> None:
    damage(node)
    (node.source.root / DIGEST.hex()).unlink()
    list(Engine.of(node.settings).faults(read_data=True, repair=True))
    GearDriver(node.settings).prepare()
    assert not may_store_in_place(node)
    with pytest.raises(OSError, match="Input/output"):
        (node.run("after") / "etc/file").read_bytes()
    assert list(node.status().failures) == [DIGEST.hex()]
    node.apply(tar_of(FILES), "again")
    assert (node.run("later") / "etc/file").read_bytes() == FILES["etc/file"]
