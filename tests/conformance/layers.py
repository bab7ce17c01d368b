"""Tars and layers for the suite, in the words of its tests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.settings import Settings
from gearworkers.tar.entry import CHAR, DIR, FIFO, HARDLINK, REG, SYMLINK, TarEntry
from gearworkers.tar.writer import END, header, padding
from tests.conformance.drivers import Driver, an_id
from tests.support.overlays import Node, snapshot

File = tuple[TarEntry, bytes]

MTIME_NS = 1_600_000_000_123_456_789
NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")
"""A file capability as `setcap cap_net_raw+ep` writes it."""


def file(name: str | bytes, content: bytes = b"", mode: int = 0o644, uid: int = 0, gid: int = 0) -> File:
    """A regular file."""
    return TarEntry(_bytes(name), REG, b"", mode, uid, gid, len(content), MTIME_NS), content


def with_xattrs(made: File, **xattrs: bytes) -> File:
    """*made* with extended attributes; a double underscore in a keyword stands for the dot."""
    made[0].xattrs = {name.replace("__", ".").encode(): value for name, value in xattrs.items()}
    return made


def directory(name: str | bytes, mode: int = 0o755, uid: int = 0, gid: int = 0) -> File:
    """A directory."""
    return TarEntry(_bytes(name) + b"/", DIR, b"", mode, uid, gid, 0, MTIME_NS), b""


def symlink(name: str | bytes, to: str | bytes) -> File:
    """A symlink."""
    return TarEntry(_bytes(name), SYMLINK, _bytes(to), 0o777, mtime_ns=MTIME_NS), b""


def hardlink(name: str | bytes, to: str | bytes, mode: int = 0o644, uid: int = 0, gid: int = 0) -> File:
    """A hard link to an earlier entry; its header's owner and mode count, as in Docker."""
    return TarEntry(_bytes(name), HARDLINK, _bytes(to), mode, uid, gid, 0, MTIME_NS), b""


def device(name: str | bytes, major: int, minor: int, kind: int = CHAR) -> File:
    """A device."""
    return TarEntry(_bytes(name), kind, b"", 0o620, mtime_ns=MTIME_NS, devmajor=major, devminor=minor), b""


def fifo(name: str | bytes) -> File:
    """A FIFO."""
    return TarEntry(_bytes(name), FIFO, b"", 0o600, mtime_ns=MTIME_NS), b""


def whiteout(name: str) -> File:
    """The whiteout of *name*."""
    parent, base = os.path.split(name)
    return file(os.path.join(parent, ".wh." + base))


def opaque(name: str) -> File:
    """The opaque marker of the directory *name*."""
    return file(os.path.join(name, ".wh..wh..opq"))


def tar(*files: File) -> bytes:
    """A whole tar."""
    return b"".join(header(entry) + content + padding(len(content)) for entry, content in files) + END


def applied(driver: Driver, *files: File, parent: str = "") -> str:
    """The id of a new image layer with these files."""
    id = an_id()
    driver.create(id, parent)
    driver.apply_diff(id, parent, tar(*files))
    return id


@contextmanager
def container(driver: Driver, parent: str, id: str = "") -> Iterator[Path]:
    """The merged tree of a read-write layer, made on *parent*, or of the one that is *id*."""
    if not id:
        id = an_id()
        driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        yield merged


@contextmanager
def mounted(driver: Driver, id: str) -> Iterator[Path]:
    """The merged tree of the layer *id*."""
    merged = driver.get(id)
    try:
        yield merged
    finally:
        driver.put(id)


def shown(driver: Driver, id: str) -> dict[bytes, Node]:
    """All that a user can see in the layer."""
    with mounted(driver, id) as merged:
        return snapshot(merged)


def committed(driver: Driver, id: str, parent: str) -> str:
    """The id of the image layer that the Diff of *id* makes on *parent*; as `docker commit` does it."""
    new_id = an_id()
    driver.create(new_id, parent)
    size_bytes = driver.apply_diff(new_id, parent, driver.diff(id, parent))
    assert size_bytes == driver.diff_size(new_id, parent)
    return new_id


def object_names(settings: Settings) -> set[str]:
    """Every object in the public cache."""
    return {str(path) for path in settings.gear_public_cache_path.glob("*/*")}


def object_path(settings: Settings, content: bytes) -> str:
    """Where the object with these bytes lies or would lie."""
    store = ObjectStore(settings.gear_public_cache_path)
    return os.fsdecode(store.path(hashlib.sha256(content).digest()))


def _bytes(name: str | bytes) -> bytes:
    return name if isinstance(name, bytes) else os.fsencode(name)
