"""`gear lazyfs` as it is run: with a real remote, after a reboot, and as `gear status` tells it."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.layers.unsynced import verify_unsynced_objects
from gearworkers.lazyfs.client import read_status
from gearworkers.mounts.mountinfo import wait_until_mounted
from gearworkers.remote.factory import open_remote
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.lazynode import LazyNode, gear_tar
from tests.support.processes import PATIENCE_S, wait_until

pytestmark = pytest.mark.slow

GEAR = str(Path(sys.executable).with_name("gear"))
FILES = {"etc/small": b"small", "lib/large": random.Random(1).randbytes(3 << 20)}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LazyNode]:
    """Its server is `gear lazyfs`, its remote a directory that holds the contents of an image."""
    (tmp_path / "remote").mkdir()
    one = LazyNode(tmp_path)
    one.settings = replace(one.settings, remote=replace(one.settings.remote, url=str(tmp_path / "remote")))
    remote = open_remote(one.settings)
    for number, content in enumerate(FILES.values()):
        (tmp_path / f"content{number}").write_bytes(content)
        with open(tmp_path / f"content{number}", "rb") as file:
            remote.put(hashlib.sha256(content).digest(), file.fileno())
    one.apply(gear_tar(FILES), "image")
    with subprocess.Popen([GEAR, "lazyfs"], env=environ(one)) as server:
        try:
            wait_until_mounted(one.settings.lazy_mount_path, PATIENCE_S)
            wait_until(lambda: read_status(one.settings.lazyfs_socket) is not None, "it answers")
            yield one
        finally:
            one.driver.cleanup()
            server.terminate()
            assert server.wait(PATIENCE_S) == 0
            one.close()


def environ(node: LazyNode) -> dict[str, str]:
    return os.environ | {
        "GEAR_ROOT": str(node.settings.gear_root),
        "GEAR_RUN_DIR": str(node.settings.run_dir),
        "GEAR_REMOTE": node.settings.remote.url,
    }


def test_files_come_from_the_remote_of_the_settings_and_status_counts_them(node: LazyNode) -> None:
    root = node.run("c1")
    for name, content in FILES.items():
        assert (root / name).read_bytes() == content
    wait_until(lambda: node.status().fetched_objects == 2, "both are whole")
    told = subprocess.run([GEAR, "status"], env=environ(node), capture_output=True, text=True, check=True).stdout
    assert "2 objects" in told


def test_after_a_power_cut_an_object_without_its_bytes_is_fetched_again(node: LazyNode) -> None:
    store = ObjectStore(node.settings.gear_public_cache_path)
    digest = hashlib.sha256(b"small").digest()
    assert (node.run("c1") / "etc/small").read_bytes() == b"small"
    node.driver.remove("c1")
    os.chmod(store.path(digest), 0o600)
    os.truncate(store.path(digest), 0)
    (node.settings.gear_root / "boot_id").write_text("another boot")
    GearDriver(node.settings).prepare()
    assert not store.has(digest)
    assert (node.run("c2") / "etc/small").read_bytes() == b"small"
    assert verify_unsynced_objects(node.settings.gear_images_path, store) == 0
