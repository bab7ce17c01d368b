"""Pins: they keep and fetch objects, and are removed by the image's name or id."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path

import pytest

from gearworkers.cli.image_objects import NodeStore
from gearworkers.errors import NotFound
from gearworkers.fetch.priority_pool import Priority, PriorityPool
from gearworkers.layers.pins import Pin
from gearworkers.lazyfs.pin_fetch import PinFetcher
from gearworkers.settings import Settings
from gearworkers.util import syscalls
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.lazynode import gear_tar
from tests.support.processes import wait_until
from tests.support.tiny import tar_of, tiny_tar

CONTENT = b"content" * 1000
DIGEST = hashlib.sha256(CONTENT).digest()
PIN = Pin("localhost/image:v1", f"sha256:{'ab' * 32}")


@pytest.fixture
def node(tmp_path: Path) -> NodeStore:
    settings = Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run")
    driver = GearDriver(settings)
    driver.prepare()
    driver.create("one", "")
    driver.apply_diff("one", "", io.BytesIO(tiny_tar({"file": CONTENT})))
    return NodeStore(settings)


def driver(node: NodeStore) -> GearDriver:
    return GearDriver(node.settings)


def test_pinned_objects_outlive_their_layer_until_the_pin_is_removed(node: NodeStore) -> None:
    node.pins.add(PIN, "one")
    driver(node).remove("one")
    driver(node).engine.collect_garbage()
    assert node.objects.has(DIGEST)
    assert node.pins.remove("abababababab") == [PIN]
    driver(node).engine.collect_garbage()
    assert not node.objects.has(DIGEST)


@pytest.mark.parametrize("name", [PIN.name, PIN.image, "ab" * 32, "ab" * 6])
def test_a_pin_matches_its_name_and_its_id(name: str) -> None:
    assert PIN.matches(name)


@pytest.mark.parametrize("name", ["", "ab", "localhost/image", "localhost/image:v2", "cd" * 6])
def test_a_pin_matches_no_other_name(node: NodeStore, name: str) -> None:
    node.pins.add(PIN, "one")
    with pytest.raises(NotFound):
        node.pins.remove(name)
    assert node.pins.all() == [PIN]


def test_pinning_again_replaces_the_pin(node: NodeStore) -> None:
    node.pins.add(PIN, "one")
    driver(node).create("two", "one")
    driver(node).apply_diff("two", "one", io.BytesIO(tar_of({"more": b"more" * 100})))
    node.pins.add(PIN, "two")
    assert node.pins.all() == [PIN]
    assert (hashlib.sha256(b"more" * 100).digest(), 400) in list(node.pins.objects())
    assert not list(node.settings.gear_build_path.iterdir())


def test_a_pin_with_a_damaged_record_keeps_its_objects(node: NodeStore) -> None:
    node.pins.add(PIN, "one")
    next(node.settings.gear_pins_path.glob("*/pin.json")).write_bytes(b"nonsense")
    driver(node).remove("one")
    driver(node).engine.collect_garbage()
    assert node.pins.all() == [] and node.objects.has(DIGEST)


def test_objects_of_pins_are_verified_after_a_power_cut(node: NodeStore) -> None:
    node.pins.add(PIN, "one")
    driver(node).remove("one")
    path = Path(node.objects.path(DIGEST).decode("latin-1"))
    path.chmod(0o600)
    path.write_bytes(bytes(len(CONTENT)))  # its bytes did not reach the disk, its name and digest did
    (node.settings.gear_root / "boot_id").write_text("another boot")
    driver(node).prepare()
    assert not node.objects.has(DIGEST)


def test_missing_objects_are_requested_at_once_and_when_pins_change(node: NodeStore) -> None:
    requested: list[dict[bytes, int]] = []
    pool = PriorityPool(1, for_background=1)
    fetcher = PinFetcher(node.pins, node.objects.has, pool, lambda wanted: requested.append(dict(wanted)))
    fetcher.check()
    has_looked = threading.Event()
    pool.submit(has_looked.set, Priority.BACKGROUND)
    assert has_looked.wait(60)
    driver(node).create("lazy", "")
    driver(node).apply_diff("lazy", "", io.BytesIO(gear_tar({"missing": b"none" * 1000})))
    node.pins.add(PIN, "lazy")
    fetcher.check()
    fetcher.check()
    wait_until(lambda: bool(requested), "the objects are requested")
    pool.close()
    assert requested == [{hashlib.sha256(b"none" * 1000).digest(): 4000}]


def test_missing_objects_are_requested_again_only_if_none_arrive(node: NodeStore) -> None:
    contents = {f"file{number}": b"missing%d" % number * 1000 for number in range(3)}
    driver(node).create("lazy", "")
    driver(node).apply_diff("lazy", "", io.BytesIO(gear_tar(contents)))
    node.pins.add(PIN, "lazy")
    requested: list[set[bytes]] = []
    present: set[bytes] = set()
    pool = PriorityPool(1, for_background=1)
    fetcher = PinFetcher(
        node.pins, present.__contains__, pool, lambda wanted: requested.append({digest for digest, _ in wanted})
    )
    digests = [hashlib.sha256(content).digest() for content in contents.values()]
    fetcher.fetch_missing()
    present.add(digests[0])
    fetcher.fetch_missing()
    assert requested == [set(digests)]
    fetcher.fetch_missing()
    assert requested == [set(digests), set(digests[1:])]
    present.update(digests)
    fetcher.fetch_missing()
    present.clear()
    fetcher.fetch_missing()
    assert requested[2:] == [set(digests)]
    pool.close()


def test_a_process_killed_before_the_rename_adds_no_pin_and_the_next_start_removes_its_files(
    node: NodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.fork()
    if not child:
        monkeypatch.setattr(syscalls, "renameat2", lambda *_: os._exit(9))
        node.pins.add(PIN, "one")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert node.pins.all() == [] and list(node.settings.gear_build_path.iterdir())
    driver(node).prepare()
    assert not list(node.settings.gear_build_path.iterdir())
