"""Layers whose mounts map ids: the Diff of a container in a user namespace, and lazily fetched files."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.engine.engine import Engine
from gearworkers.layers.record import LayerKind
from gearworkers.settings import Settings
from tests.conformance.layers import NET_RAW, directory, file, tar, with_xattrs
from tests.support.lazynode import lazy_node
from tests.support.userns import FIRST_ID, MAPS, run_as_root

CAPABILITY = "SCHILY.xattr.security.capability"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with an image layer and a container on it whose ids are mapped."""
    engine = Engine.of(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run"))
    engine.prepare()
    engine.create("image", "", LayerKind.NEW)
    files = tar(
        directory("home", 0o750, 1000, 1001),
        file("home/file", b"content", 0o600, 1000, 1001),
        file("untouched", b"content", 0o4755, 33, 34),
        with_xattrs(file("capable", b"binary", 0o755), security__capability=NET_RAW),
    )
    engine.apply_diff("image", "", io.BytesIO(files))
    engine.create("container", "image", LayerKind.NEW, mount_ids=MAPS)
    engine.make_writable("container")
    yield engine
    for id in engine.layers.ids():
        engine.remove(id)
    engine.close()


def members(engine: Engine) -> dict[str, tarfile.TarInfo]:
    sink = io.BytesIO()
    engine.diff("container", "image", sink)
    sink.seek(0)
    with tarfile.open(fileobj=sink) as found:
        return {member.name: member for member in found}


@pytest.mark.parametrize("is_mounted", [True, False], ids=["running", "stopped"])
def test_the_diff_has_the_containers_ids(engine: Engine, is_mounted: bool) -> None:
    top = engine.mount("container")
    script = "echo new > new; chown 7:8 new; chmod 640 home/file; chmod 700 capable; mv home moved; rm untouched"
    run_as_root(script, top)
    assert ((top / "new").stat().st_uid, (top / "moved").stat().st_uid) == (FIRST_ID + 7, FIRST_ID + 1000)
    if not is_mounted:
        engine.unmount("container")
    found = members(engine)
    ids = {name: (member.uid, member.gid, member.mode) for name, member in found.items()}
    assert ids == {
        "new": (7, 8, 0o644),
        "moved": (1000, 1001, 0o750),
        "moved/file": (1000, 1001, 0o640),
        "capable": (0, 0, 0o700),
        ".wh.home": (0, 0, 0o600),
        ".wh.untouched": (0, 0, 0o600),
    }
    capability = found["capable"].pax_headers[CAPABILITY]
    assert capability.encode("utf-8", "surrogateescape") == NET_RAW


def test_a_file_of_another_host_user_belongs_to_nobody_in_the_diff(engine: Engine) -> None:
    (engine.mount("container") / "by-the-host").write_text("host")
    found = members(engine)["by-the-host"]
    assert (found.uid, found.gid) == (65534, 65534)


@pytest.mark.slow
def test_missing_files_are_fetched_for_a_container_whose_ids_are_mapped(tmp_path: Path) -> None:
    with lazy_node(tmp_path) as node:
        node.pull({"program": b"fetched", "copied": b"copied up"})
        engine = Engine.of(node.settings)
        engine.create("container", "image", LayerKind.NEW, mount_ids=MAPS)
        engine.make_writable("container")
        top = engine.mount("container")
        try:
            assert run_as_root("cat program; stat -c ' %u' program", top) == "fetched 0"
            assert run_as_root("echo more >> copied; cat copied", top) == "copied upmore"
            assert os.stat(top / "copied").st_uid == FIRST_ID
        finally:
            engine.unmount("container")
