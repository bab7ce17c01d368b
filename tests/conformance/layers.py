"""Helpers that make tar entries, tars and layers for the conformance tests."""

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
from tests.conformance.drivers import Door, Driver, new_layer_id
from tests.support.overlays import Node, snapshot

File = tuple[TarEntry, bytes]

MTIME_NS = 1_600_000_000_123_456_789
NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")
"""A file capability as written by `setcap cap_net_raw+ep`."""


def file(name: str | bytes, content: bytes = b"", mode: int = 0o644, uid: int = 0, gid: int = 0) -> File:
    """Return a regular file."""
    return TarEntry(_bytes(name), REG, b"", mode, uid, gid, len(content), MTIME_NS), content


def with_xattrs(entry: File, **xattrs: bytes) -> File:
    """Return *entry* with extended attributes; a double underscore in a keyword means a dot."""
    entry[0].xattrs = {name.replace("__", ".").encode(): value for name, value in xattrs.items()}
    return entry


def directory(name: str | bytes, mode: int = 0o755, uid: int = 0, gid: int = 0) -> File:
    """Return a directory."""
    return TarEntry(_bytes(name) + b"/", DIR, b"", mode, uid, gid, 0, MTIME_NS), b""


def symlink(name: str | bytes, to: str | bytes) -> File:
    """Return a symlink."""
    return TarEntry(_bytes(name), SYMLINK, _bytes(to), 0o777, mtime_ns=MTIME_NS), b""


def hardlink(name: str | bytes, to: str | bytes, mode: int = 0o644, uid: int = 0, gid: int = 0) -> File:
    """Return a hard link to an earlier entry; the owner and mode of its own header apply, as in Docker."""
    return TarEntry(_bytes(name), HARDLINK, _bytes(to), mode, uid, gid, 0, MTIME_NS), b""


def device(name: str | bytes, major: int, minor: int, kind: int = CHAR) -> File:
    """Return a device."""
    return TarEntry(_bytes(name), kind, b"", 0o620, mtime_ns=MTIME_NS, devmajor=major, devminor=minor), b""


def fifo(name: str | bytes) -> File:
    """Return a FIFO."""
    return TarEntry(_bytes(name), FIFO, b"", 0o600, mtime_ns=MTIME_NS), b""


def whiteout(name: str) -> File:
    """Return the whiteout of *name*."""
    parent, base = os.path.split(name)
    return file(os.path.join(parent, ".wh." + base))


def opaque(name: str) -> File:
    """Return the opaque marker of the directory *name*."""
    return file(os.path.join(name, ".wh..wh..opq"))


def tar(*files: File) -> bytes:
    """Return a complete tar."""
    return b"".join(header(entry) + content + padding(len(content)) for entry, content in files) + END


def apply_layer(door: Door, *files: File, parent: str = "") -> str:
    """Create an image layer with these files; return its id."""
    id = new_layer_id()
    door.create(id, parent)
    door.apply_diff(id, parent, tar(*files))
    return id


@contextmanager
def container(driver: Driver, parent: str, id: str = "") -> Iterator[Path]:
    """Yield the merged tree of the read-write layer *id*; without an id, create one on *parent*."""
    if not id:
        id = new_layer_id()
        driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        yield merged


@contextmanager
def mounted(door: Door, id: str) -> Iterator[Path]:
    """Mount the layer *id* and yield its merged tree."""
    merged = door.get(id)
    try:
        yield merged
    finally:
        door.put(id)


def shown(door: Door, id: str) -> dict[bytes, Node]:
    """Return a snapshot of the mounted layer."""
    with mounted(door, id) as merged:
        return snapshot(merged)


def committed(driver: Driver, id: str, parent: str) -> str:
    """Apply the Diff of *id* to a new layer on *parent*, as `docker commit` does; return the new id."""
    new_id = new_layer_id()
    driver.create(new_id, parent)
    size_bytes = driver.apply_diff(new_id, parent, driver.diff(id, parent))
    assert size_bytes == driver.diff_size(new_id, parent)
    return new_id


def object_names(settings: Settings) -> set[str]:
    """Return the paths of all objects in the public cache."""
    return {str(path) for path in settings.gear_public_cache_path.glob("*/*")}


def object_path(settings: Settings, content: bytes) -> str:
    """Return the path of the object with this content, stored or not."""
    store = ObjectStore(settings.gear_public_cache_path)
    return os.fsdecode(store.path(hashlib.sha256(content).digest()))


def _bytes(name: str | bytes) -> bytes:
    return name if isinstance(name, bytes) else os.fsencode(name)
