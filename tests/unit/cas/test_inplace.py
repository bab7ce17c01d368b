"""Storing in place: `forbid_in_place` ends it soon, and no overlay opens a half-written file."""

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

from gearworkers.cas.inplace import InPlaceLock, forbid_in_place, remove_unfinished
from gearworkers.cas.store import ObjectState, ObjectStore
from gearworkers.cas.writer import FORK_AFTER_CONTENTS
from gearworkers.cas.writer_process import BATCH_CONTENTS
from gearworkers.engine.engine import Engine
from gearworkers.settings import Settings
from gearworkers.util.fs import opened_directory
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
    """A tar whose last byte does not arrive until `go` is set."""

    def __init__(self, tar: bytes) -> None:
        self._rest = memoryview(tar)
        self.is_at_last_byte = threading.Event()
        self.go = threading.Event()

    def readinto(self, buffer: memoryview, /) -> int:
        if len(self._rest) == 1:
            self.is_at_last_byte.set()
            assert self.go.wait(PATIENCE_S)
        count = min(len(buffer), max(len(self._rest) - 1, 1), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def ends_in_time(work: Callable[[], object]) -> bool:
    """Whether *work* ends."""
    working = threading.Thread(target=work, daemon=True)
    working.start()
    working.join(PATIENCE_S)
    return not working.is_alive()


def apply(driver: GearDriver, id: str, tar: bytes) -> None:
    driver.create(id, "")
    driver.apply_diff(id, "", io.BytesIO(tar))


@pytest.mark.parametrize("files", [1, FORK_AFTER_CONTENTS + BATCH_CONTENTS], ids=["one process", "two processes"])
def test_a_stalled_import_does_not_block_publishing_a_gear_layer_or_a_repair(driver: GearDriver, files: int) -> None:
    contents = {f"file{number}": b"%d" % number for number in range(files)}
    apply(driver, "damaged", tar_of(FILES))
    ObjectStore(driver.settings.gear_public_cache_path).remove(DIGEST)
    tar = Stalled(tar_of(contents))
    driver.create("stalled", "")
    importing = threading.Thread(target=driver.apply_diff, args=("stalled", "", tar))
    importing.start()
    try:
        assert tar.is_at_last_byte.wait(PATIENCE_S)
        assert ends_in_time(partial(apply, driver, "gear", gear_tar(ABSENT)))
        assert ends_in_time(lambda: list(Engine.of(driver.settings).faults(read_data=False, repair=True)))
    finally:
        tar.go.set()
        importing.join()
    assert not driver.engine.layers.get("gear").complete and not driver.engine.layers.get("damaged").complete
    assert driver.engine.layers.get("stalled").new_objects == files


def test_forbid_waits_for_the_lock_and_prevents_new_holders(tmp_path: Path) -> None:
    events: list[str] = []
    with closing(InPlaceLock(tmp_path)) as lock, closing(InPlaceLock(tmp_path)) as other:
        assert lock.acquire() and other.acquire()
        other.release()

        def forbid_storing() -> None:
            forbid_in_place(tmp_path)
            events.append("forbidden")

        forbidding = threading.Thread(target=forbid_storing)
        forbidding.start()
        wait_until((tmp_path / "incomplete-layers").exists, "the mark exists")
        assert lock.acquire() and not other.acquire()
        with closing(InPlaceLock(tmp_path)) as later:
            assert not later.acquire()
        events.append("released")
        lock.release()
        forbidding.join()
        assert events == ["released", "forbidden"]
        assert not lock.acquire()


def test_an_import_that_must_not_store_in_place_never_holds_the_lock(tmp_path: Path) -> None:
    forbid_in_place(tmp_path)
    with closing(InPlaceLock(tmp_path)) as lock:
        assert not lock.acquire()
        forbid_in_place(tmp_path)  # would wait for the lock


@pytest.mark.slow
def test_a_gear_layer_does_not_show_the_half_written_file_of_a_killed_import(tmp_path: Path) -> None:
    with lazy_node(tmp_path) as node:
        path = ObjectStore(node.settings.gear_public_cache_path).path(DIGEST)
        Path(os.fsdecode(path)).write_bytes(FILES["etc/file"][:100])
        node.pull(FILES)
        assert (node.run("container") / "etc/file").read_bytes() == FILES["etc/file"]


def test_an_object_that_is_stored_while_its_unfinished_file_is_removed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore(tmp_path / "public")
    store.prepare()
    with opened_directory(tmp_path) as staging_fd:
        store.put(DIGEST, memoryview(FILES["etc/file"]), staging_fd)
        monkeypatch.setattr(store, "find", lambda digest: ObjectState.UNFINISHED)
        remove_unfinished(store, [DIGEST], staging_fd)
    assert ObjectStore(tmp_path / "public").has(DIGEST)
    assert sorted(os.listdir(tmp_path)) == ["public"]


@pytest.mark.parametrize("others", [1, 3000])
@pytest.mark.parametrize("wanted", [1, 1000])
def test_unfinished_files_are_removed_and_objects_stay(others: int, wanted: int, tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "public")
    store.prepare()
    digests = sorted(hashlib.sha256(b"%d" % number).digest() for number in range(wanted))
    unfinished = digests[::3]
    for digest in unfinished:
        Path(os.fsdecode(store.path(digest))).write_bytes(b"half")
    shard = Path(os.fsdecode(store.path(unfinished[0]))).parent
    for number in range(others):
        (shard / f"{number:020}").touch()
    assert (store.names_if_few(os.fsencode(shard)) is None) == (others > 1)
    with opened_directory(tmp_path) as staging_fd:
        store.put(DIGEST, memoryview(FILES["etc/file"]), staging_fd)
        remove_unfinished(store, [DIGEST, *digests], staging_fd)
    assert {store.find(digest) for digest in digests} == {ObjectState.ABSENT}
    assert store.has(DIGEST)
    assert len(list(tmp_path.glob("public/*/*"))) == others + 1
