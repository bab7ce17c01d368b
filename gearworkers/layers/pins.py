"""Pins: images whose objects stay on this node, and are fetched again if they are missing.

A pin is a directory in pins/ with two files: `pin.json`, and `objects` in the format of a layer's (cas.refs), the union
over the image's layers. The garbage collector reads it like a layer's list, so a pin outlives the image's layers. The
lazy file server fetches the missing objects of pins (lazyfs.pin_fetch).

Order of writes: a pin is built in build/, synced, and moved to pins/ by one rename. Removal moves it back first.
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
    """A pinned image."""

    name: str
    """The name of the image when it was pinned."""
    image: str
    """The image's id, ``sha256:…``."""

    def matches(self, text: str) -> bool:
        """Whether *text* is the image's name, its id, or the first digits of its id as Docker shows them."""
        digits = self.image.removeprefix("sha256:")
        return text in (self.name, self.image) or (len(text) >= 12 and digits.startswith(text))


class Pins:
    """The pins of one GEAR_ROOT. Several processes of the node may use them at once."""

    def __init__(self, settings: NodeSettings, layers: LayerStore, objects: ObjectStore) -> None:
        self._root = settings.gear_root
        self._directory = settings.gear_pins_path
        self._build = settings.gear_build_path
        self._layers = layers
        self._objects = objects

    def add(self, pin: Pin, top_layer: str) -> None:
        """Pin all objects of the layer chain that begins at *top_layer*; replace a pin of the same image.

        Raises:
            NotFound: A layer is missing.

        Crash: the pin exists completely or not at all. The next start removes leftovers from build/.
        """
        lists = [self._layers.directory(layer) / OBJECTS_FILE for layer in self._layers.layer_chain(top_layer)]
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            with self._layers.build_directory(f"pin.{_key(pin)[:12]}") as build:
                records = sorted_refs(b"".join(path.read_bytes() for path in lists if path.exists()))
                write_synced(build / OBJECTS_FILE, b"".join(records))
                write_synced(build / _PIN_FILE, msgspec.json.encode(pin))
                with publishing(self._root, self._objects):
                    self._move_into_place(build, self._directory / _key(pin))
        except OSError as exc:
            raise from_os_error(exc, f"pin {pin.name}") from exc

    def remove(self, text: str) -> list[Pin]:
        """Remove the pins of the images with this name or id; return them.

        Raises:
            NotFound: No pin has this name or id.
        """
        found = [pin for pin in self.all() if pin.matches(text)]
        if not found:
            raise NotFound(f"{text} is not pinned")
        for pin in found:
            removed_path = self._build / f"removed.{secrets.token_hex(8)}"
            try:
                os.rename(self._directory / _key(pin), removed_path)
                sync_directory(self._directory)
            except OSError as exc:
                raise from_os_error(exc, f"unpin {pin.name}") from exc
            remove_tree(removed_path)
        return found

    def all(self) -> list[Pin]:
        """Return the pins, sorted by name. A damaged record is logged and omitted; its objects stay pinned."""
        found = []
        for path in self._directory.glob(f"*/{_PIN_FILE}"):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Pin))
            except (msgspec.MsgspecError, OSError) as exc:
                _log.error("cannot read a pin", path=str(path), error=str(exc))
        return sorted(found, key=lambda pin: pin.name)

    def objects(self) -> Iterator[tuple[bytes, int]]:
        """Yield (digest, size in bytes) of all pinned objects; an object of two pins appears twice."""
        for path in self._directory.glob(f"*/{OBJECTS_FILE}"):
            yield from read_refs(path)

    def has(self, digest: bytes) -> bool:
        """Whether a pin refers to the object."""
        lists = map(ObjectList.open, self._directory.glob(f"*/{OBJECTS_FILE}"))
        return any(objects is not None and objects.has(digest) for objects in lists)

    def version(self) -> int:
        """Return a number that changes when pins are added or removed."""
        try:
            return self._directory.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _move_into_place(self, build: Path, target: Path) -> None:
        flags = kernel.Rename.EXCHANGE if target.exists() else kernel.Rename.NOREPLACE
        kernel.renameat2(kernel.AT_FDCWD, os.fsencode(build), kernel.AT_FDCWD, os.fsencode(target), flags)
        sync_directory(self._directory)


def _key(pin: Pin) -> str:
    """Return the name of a pin's directory: the id has a fixed length and no slashes, unlike the image's name."""
    return hashlib.sha256(pin.image.encode()).hexdigest()[:32]
