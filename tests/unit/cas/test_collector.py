"""The garbage collector in races with imports."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from gearworkers.cas.collector import GarbageCollector, HiddenObjects
from gearworkers.cas.refs import RefWriter
from gearworkers.cas.store import ObjectStore
from gearworkers.digest import DIGEST_XATTR, object_name

CONTENT = b"wanted"
DIGEST = hashlib.sha256(CONTENT).digest()


class Root:
    """A GEAR_ROOT with a running import in build/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = ObjectStore(path / "public")
        self.store.prepare()
        for name in ("images", "build/import"):
            (path / name).mkdir(parents=True)
        self.refs = RefWriter(path / "build/import")

    def stored(self) -> Path:
        """Store the object; return its path."""
        path = Path(os.fsdecode(self.store.path(DIGEST)))
        path.write_bytes(CONTENT)
        os.setxattr(path, DIGEST_XATTR, DIGEST)
        return path

    def collect(self) -> int:
        """Run the collector; return the number of objects removed."""
        published = (self.path / "images",)
        collector = GarbageCollector(self.path, self.store, published=published, building=self.path / "build")
        return collector.collect().removed_objects


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_an_unreferenced_object_is_removed(root: Root) -> None:
    path = root.stored()
    assert root.collect() == 1
    assert not path.exists()


def test_an_object_with_the_ref_of_an_import_is_kept(root: Root) -> None:
    path = root.stored()
    root.refs.add(DIGEST, len(CONTENT))
    assert root.collect() == 0
    assert path.read_bytes() == CONTENT


def test_a_file_that_an_import_writes_in_place_is_never_renamed(root: Root) -> None:
    root.refs.add(DIGEST, len(CONTENT))
    path = Path(os.fsdecode(root.store.path(DIGEST)))
    path.write_bytes(CONTENT[:3])
    before = path.stat()
    assert root.collect() == 0
    after = path.stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns), "a rename would change the ctime"


def test_the_half_written_file_of_a_crash_is_removed(root: Root) -> None:
    path = Path(os.fsdecode(root.store.path(DIGEST)))
    path.write_bytes(CONTENT[:3])
    assert root.collect() == 1
    assert not path.exists()


def test_a_hidden_object_replaces_a_half_written_file(root: Root) -> None:
    path = root.stored()
    hidden = HiddenObjects(root.path / "hidden", root.store)
    hidden.restore()
    hidden.hide(os.fsencode(path.parent), os.fsencode(path.name))
    path.write_bytes(b"half of the sa")
    hidden.put_back(object_name(DIGEST))
    assert path.read_bytes() == CONTENT
    assert root.store.has(DIGEST)


def test_a_hidden_object_does_not_replace_a_whole_object(root: Root) -> None:
    path = root.stored()
    hidden = HiddenObjects(root.path / "hidden", root.store)
    hidden.restore()
    hidden.hide(os.fsencode(path.parent), os.fsencode(path.name))
    inode = root.stored().stat().st_ino
    hidden.put_back(object_name(DIGEST))
    assert path.stat().st_ino == inode
    assert not os.listdir(root.path / "hidden")


def test_a_ref_writer_that_fails_leaves_no_descriptor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no space"):
        RefWriter(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_two_processes_may_put_back_the_same_hidden_object(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root.stored()
    hidden = HiddenObjects(root.path / "hidden", root.store)
    hidden.restore()
    hidden.hide(os.fsencode(path.parent), os.fsencode(path.name))
    root.stored()

    getxattr = os.getxattr

    def after_the_other(path: bytes, name: str) -> bytes:
        (root.path / "hidden" / os.fsdecode(object_name(DIGEST))).unlink(missing_ok=True)
        return getxattr(path, name)

    monkeypatch.setattr(os, "getxattr", after_the_other)
    hidden.put_back(object_name(DIGEST))
    assert path.read_bytes() == CONTENT
