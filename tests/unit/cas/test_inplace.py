"""Storing in place ends when it is forbidden, soon, and no overlay opens what an import has half written."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from gearworkers.cas import inplace
from gearworkers.cas import writer as module
from gearworkers.cas.inplace import InPlaceLock, forbid
from gearworkers.cas.store import ObjectStore
from gearworkers.engine.engine import Engine
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.lazynode import gear_tar, lazy_node
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.tiny import tar_of

FILES = {"etc/file": b"content " * 100}
DIGEST = hashlib.sha256(FILES["etc/file"]).digest()
ABSENT = {"etc/absent": b"absent " * 100}


@pytest.fixture
def driver(tmp_path: Path) -> GearDriver:
    driver = GearDriver(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test"))
    driver.prepare()
    return driver


class Stalled:
    """A tar that comes to its last byte but one, and then no further until `go`."""

    def __init__(self, tar: bytes) -> None:
        self._rest = memoryview(tar)
        self.is_waited_for = threading.Event()
        self.go = threading.Event()

    def readinto(self, buffer: memoryview, /) -> int:
        if len(self._rest) == 1:
            self.is_waited_for.set()
            assert self.go.wait(PATIENCE_S)
        count = min(len(buffer), max(len(self._rest) - 1, 1), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def goes_through(work: Callable[[], object]) -> bool:
    """Whether *work* ends."""
    working = threading.Thread(target=work, daemon=True)
    working.start()
    working.join(PATIENCE_S)
    return not working.is_alive()


def apply(driver: GearDriver, id: str, tar: bytes) -> None:
    driver.create(id, "")
    driver.apply_diff(id, "", io.BytesIO(tar))


@pytest.mark.parametrize("files", [1, module._ALONE_CONTENTS + module._BATCH_CONTENTS], ids=["alone", "beside"])
def test_an_import_that_stands_still_keeps_nobody_from_publishing_a_gear_layer_or_repairing(
    driver: GearDriver, files: int
) -> None:
    contents = {f"file{number}": b"%d" % number for number in range(files)}
    apply(driver, "damaged", tar_of(FILES))
    ObjectStore(driver.settings.gear_public_cache_path).remove(DIGEST)
    tar = Stalled(tar_of(contents))
    driver.create("stalled", "")
    importing = threading.Thread(target=driver.apply_diff, args=("stalled", "", tar))
    importing.start()
    try:
        assert tar.is_waited_for.wait(PATIENCE_S)
        assert goes_through(partial(apply, driver, "gear", gear_tar(ABSENT)))
        assert goes_through(lambda: list(Engine.of(driver.settings).faults(read_data=False, repair=True)))
    finally:
        tar.go.set()
        importing.join()
    assert not driver.engine.layers.get("gear").complete and not driver.engine.layers.get("damaged").complete
    assert driver.engine.layers.get("stalled").new_objects == files


def test_forbidding_waits_for_the_burst_under_way_and_no_other_begins(tmp_path: Path) -> None:
    events: list[str] = []
    with closing(InPlaceLock(tmp_path)) as bursts, closing(InPlaceLock(tmp_path)) as others:
        assert bursts.begin() and others.begin()
        others.end()

        def forbid_it() -> None:
            forbid(tmp_path)
            events.append("forbidden")

        forbidding = threading.Thread(target=forbid_it)
        forbidding.start()
        wait_until((tmp_path / "incomplete-layers").exists, "the mark is there")
        assert bursts.begin() and not others.begin()
        with closing(InPlaceLock(tmp_path)) as later:
            assert not later.begin()
        events.append("ended")
        bursts.end()
        forbidding.join()
        assert events == ["ended", "forbidden"]
        assert not bursts.begin()


def test_an_import_that_may_not_store_in_place_never_holds_the_lock(tmp_path: Path) -> None:
    forbid(tmp_path)
    with closing(InPlaceLock(tmp_path)) as bursts:
        assert not bursts.begin()
        forbid(tmp_path)  # would wait for it


def test_what_a_killed_import_left_at_an_objects_name_is_not_read_through_a_gear_layer(tmp_path: Path) -> None:
    with lazy_node(tmp_path) as node:
        path = ObjectStore(node.settings.gear_public_cache_path).path(DIGEST)
        Path(os.fsdecode(path)).write_bytes(FILES["etc/file"][:100])
        node.pull(FILES)
        assert (node.run("container") / "etc/file").read_bytes() == FILES["etc/file"]


def test_an_object_that_arrives_while_a_leftover_is_removed_stays(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "public")
    store.prepare()
    staging_fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        store.put(DIGEST, memoryview(FILES["etc/file"]), staging_fd)
        inplace.remove_unfinished(store, DIGEST, staging_fd)
        assert store.has(DIGEST)
        inplace.remove_unfinished(store, hashlib.sha256(b"absent").digest(), staging_fd)
    finally:
        os.close(staging_fd)
    assert sorted(os.listdir(tmp_path)) == ["public"]
