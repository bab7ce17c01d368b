"""Pins: images whose objects stay here, and come back if they are gone.

A pin is a directory in pins/: `pin.json`, and `objects` as a layer has it (cas.refs), the union over the image's
layers. The garbage collector takes it for one more list of what is referred to, so a pin outlives its image's layers;
the lazy file server has fetched what a pin misses (lazyfs.pin_fetch).

Order of writes: made in build/, synced, then named by one rename; it goes the other way.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog

from gearworkers.cas.collector import publishing
from gearworkers.cas.refs import OBJECTS_FILE, read_refs, sorted_refs
from gearworkers.cas.store import ObjectStore
from gearworkers.errors import NotFound, from_os_error
from gearworkers.layers.object_list import ObjectList
from gearworkers.layers.store import LayerStore
from gearworkers.settings import NodeSettings
from gearworkers.util import syscalls as kernel
from gearworkers.util.fs import remove_tree
from gearworkers.util.writing import sync_directory, write_synced

_PIN_FILE = "pin.json"
_log = structlog.get_logger(__name__)


class Pin(msgspec.Struct, frozen=True):
    """What is pinned."""

    name: str
    """As the image was called when it was pinned."""
    image: str
    """The image's id, ``sha256:…``."""

    def is_called(self, text: str) -> bool:
        """Whether *text* is its name, its id, or the id's beginning as Docker shows it."""
        digits = self.image.removeprefix("sha256:")
        return text in (self.name, self.image) or (len(text) >= 12 and digits.startswith(text))


class Pins:
    """The pins of one GEAR_ROOT; any process of the node may have them at the same time."""

    def __init__(self, settings: NodeSettings, layers: LayerStore, objects: ObjectStore) -> None:
        self._root = settings.gear_root
        self._directory = settings.gear_pins_path
        self._build = settings.gear_build_path
        self._layers = layers
        self._objects = objects

    def add(self, pin: Pin, top_layer: str) -> None:
        """Keep all objects of this layer and its parents from now on; one of the same image is replaced.

        Raises:
            NotFound: A layer is not here.

        Crash: the pin is there whole or not at all; what lies in build/ is removed at the next start.
        """
        lists = [self._layers.directory(layer) / OBJECTS_FILE for layer in self._layers.layer_chain(top_layer)]
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            with self._layers.build_directory(f"pin.{_key(pin)[:12]}") as build:
                records = sorted_refs(b"".join(path.read_bytes() for path in lists if path.exists()))
                write_synced(build / OBJECTS_FILE, b"".join(records))
                write_synced(build / _PIN_FILE, msgspec.json.encode(pin))
                with publishing(self._root, self._objects):
                    self._place(build, self._directory / _key(pin))
        except OSError as exc:
            raise from_os_error(exc, f"pin {pin.name}") from exc

    def remove(self, text: str) -> list[Pin]:
        """Let go of the image with this name or id; what was let go.

        Raises:
            NotFound: Nothing of this name is pinned.
        """
        found = [pin for pin in self.all() if pin.is_called(text)]
        if not found:
            raise NotFound(f"{text} is not pinned")
        for pin in found:
            grave = self._build / f"removed.{secrets.token_hex(8)}"
            try:
                os.rename(self._directory / _key(pin), grave)
                sync_directory(self._directory)
            except OSError as exc:
                raise from_os_error(exc, f"unpin {pin.name}") from exc
            remove_tree(grave)
        return found

    def all(self) -> list[Pin]:
        """What is pinned, by name; a damaged record is told in the log, and its objects are kept all the same."""
        found = []
        for path in self._directory.glob(f"*/{_PIN_FILE}"):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Pin))
            except (msgspec.MsgspecError, OSError) as exc:
                _log.error("a pin cannot be read", path=str(path), error=str(exc))
        return sorted(found, key=lambda pin: pin.name)

    def objects(self) -> Iterator[tuple[bytes, int]]:
        """(digest, size in bytes) of all that is pinned; what two pins have comes twice."""
        for path in self._directory.glob(f"*/{OBJECTS_FILE}"):
            yield from read_refs(path)

    def has(self, digest: bytes) -> bool:
        """Whether something that is pinned has the object."""
        lists = map(ObjectList.open, self._directory.glob(f"*/{OBJECTS_FILE}"))
        return any(records is not None and records.between(digest, digest) for records in lists)

    def version(self) -> int:
        """Another number when pins came or went."""
        try:
            return self._directory.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _place(self, build: Path, place: Path) -> None:
        exchange = kernel.Rename.EXCHANGE if place.exists() else kernel.Rename.NOREPLACE
        kernel.renameat2(kernel.AT_FDCWD, os.fsencode(build), kernel.AT_FDCWD, os.fsencode(place), exchange)
        sync_directory(self._directory)


def _key(pin: Pin) -> str:
    """A name is no good for a directory: it may be longer than one may be, and have slashes."""
    return hashlib.sha256(pin.image.encode()).hexdigest()[:32]
