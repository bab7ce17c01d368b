"""What incomplete layers still want: from an object's short name to its full digest and size.

A layer is incomplete while an object of its `objects` list is not in the public cache. Layers appear and vanish
while the lists are in use; each list is a sorted file that is mapped, not read.
"""

from __future__ import annotations

import binascii
import bisect
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from gearworkers.cas.collector import publishing
from gearworkers.cas.refs import OBJECTS_FILE, REF_RECORD
from gearworkers.cas.store import ObjectStore, verify_file
from gearworkers.digest import object_name
from gearworkers.errors import GearError, IntegrityError, NotFound, from_os_error
from gearworkers.layers.store import RECORD_FILE, Layer, LayerKind
from gearworkers.util import syscalls as kernel
from gearworkers.util.fs import opened_directory
from gearworkers.util.open_file import File
from gearworkers.util.writing import replace_file

_log = structlog.get_logger(__name__)
_STEP_OBJECTS = 5000
_FROM_URLSAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(slots=True)
class ObjectList:
    """The objects of one layer, in the order of their digests."""

    records: mmap.mmap
    entries: range
    here: int = 0
    """So many of the first records are known to be in the store."""

    def between(self, least: bytes, greatest: bytes) -> list[tuple[bytes, int]]:
        """The records whose digest begins with what lies between the two, of one length."""
        length = len(least)
        first = bisect.bisect_left(self.entries, least, key=lambda at: self._prefix(at, length))
        found = []
        for at in self.entries[first:]:
            if self._prefix(at, length) > greatest:
                break
            found.append(self.record(at))
        return found

    def named(self, name: bytes) -> tuple[bytes, int] | None:
        """Digest and size in bytes of the object with this name of 21 characters."""
        least = _least_digest(name)
        found = self.between(least[:15], least[:15]) if least is not None else []
        return next((record for record in found if object_name(record[0]) == name), None)

    def record(self, at: int) -> tuple[bytes, int]:
        """Digest and size in bytes."""
        digest, size_bytes = REF_RECORD.unpack_from(self.records, at * REF_RECORD.size)
        return digest, size_bytes

    def _prefix(self, at: int, length: int) -> bytes:
        return self.records[at * REF_RECORD.size : at * REF_RECORD.size + length]


class IncompleteLayers:
    """The incomplete layers of one root; all methods from any thread; GearError if they cannot be read."""

    def __init__(self, images: Path) -> None:
        self._images = images
        self._lists: dict[str, ObjectList] = {}
        self._seen_ns = -1
        self._lock = threading.Lock()

    def has(self, digest: bytes) -> bool:
        """Whether an incomplete layer has the object; True if that cannot be told."""
        try:
            return bool(self._find(digest, digest))
        except GearError as exc:
            _log.error("the lists of incomplete layers cannot be read", error=str(exc))
            return True

    def known(self, name: bytes) -> tuple[bytes, int] | None:
        """Digest and size in bytes of the object with this name of 21 characters, if a layer has it (`between`)."""
        least = _least_digest(name)
        found = self.between(least[:15], least[:15]) if least is not None else []
        return next((record for record in found if object_name(record[0]) == name), None)

    def between(self, least: bytes, greatest: bytes) -> list[tuple[bytes, int]]:
        """The distinct objects whose digest begins with what lies between the two, of one length.

        Also of complete layers, which takes longer: one may have become complete with a file of it open.
        """
        found = self._find(least, greatest)
        if not found:
            with _translated():
                for path in self._images.iterdir():
                    complete = object_list(path / OBJECTS_FILE)
                    found = found or (complete.between(least, greatest) if complete is not None else [])
        return found

    def layers(self) -> list[str]:
        """The ids of the incomplete layers."""
        self._refresh()
        return list(self._lists)

    def digests(self) -> set[bytes]:
        """All that the incomplete layers refer to."""
        self._refresh()
        return {wanted.record(at)[0] for wanted in self._lists.values() for at in wanted.entries}

    def missing(self, id: str, store: ObjectStore) -> list[tuple[bytes, int]]:
        """What the layer lacks, as (digest, size in bytes); nothing if it is not incomplete."""
        self._refresh()
        wanted = self._lists.get(id)
        if wanted is None:
            return []
        return [record for record in map(wanted.record, wanted.entries) if not store.has(record[0])]

    def completed(self, store: ObjectStore) -> list[str]:
        """The layers that lack nothing any more; looks at some thousand objects a call, each one once."""
        self._refresh()
        done = []
        for id, wanted in list(self._lists.items()):
            for at in wanted.entries[wanted.here : wanted.here + _STEP_OBJECTS]:
                if not _is_here(store, wanted.record(at)[0]):
                    break
                wanted.here += 1
            if wanted.here == len(wanted.entries):
                done.append(id)
        return done

    def complete(self, id: str, store: ObjectStore) -> bool:
        """Say durably that the layer is complete, after a last look at all of it; whether it is."""
        done = mark_complete(self._images, id, store)
        with self._lock:
            if not done and id in self._lists:
                self._lists[id].here = 0  # one was lost after it had been seen
                return False
            self._lists = {known: wanted for known, wanted in self._lists.items() if known != id}
        return done

    def _find(self, least: bytes, greatest: bytes) -> list[tuple[bytes, int]]:
        self._refresh()
        found = self._search(least, greatest)
        if not found and self._refresh(even_if_unchanged=True):
            found = self._search(least, greatest)
        return found

    def _search(self, least: bytes, greatest: bytes) -> list[tuple[bytes, int]]:
        found: dict[bytes, int] = {}
        for wanted in tuple(self._lists.values()):
            found.update(wanted.between(least, greatest))
        return list(found.items())

    def _refresh(self, *, even_if_unchanged: bool = False) -> bool:
        """Look for layers that came or went; whether anything changed.

        The directory's time tells that it was changed; two changes within one tick of the kernel's clock look like
        one, therefore who finds nothing looks again anyway.
        """
        try:
            with _translated():
                seen_ns = self._images.stat().st_mtime_ns
        except NotFound:
            return False  # the gateway has not started yet
        if seen_ns == self._seen_ns and not even_if_unchanged:
            return False
        with self._lock, _translated():
            before = self._lists
            ids = [id for id in os.listdir(self._images) if _is_incomplete(self._images / id)]
            lists = {id: before.get(id) or object_list(self._images / id / OBJECTS_FILE) for id in ids}
            self._lists = {id: wanted for id, wanted in lists.items() if wanted is not None}
            self._seen_ns = seen_ns
            return self._lists.keys() != before.keys()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise from_os_error(exc, "read the lists of incomplete layers") from exc


def _least_digest(name: bytes) -> bytes | None:
    """The first 126 bits of the digests with this name, two zero bits behind them."""
    try:
        return binascii.a2b_base64(name.translate(_FROM_URLSAFE) + b"A==") if len(name) == 21 else None
    except binascii.Error:
        return None


def _is_here(store: ObjectStore, digest: bytes) -> bool:
    try:
        return store.has(digest)
    except GearError as exc:
        _log.error("an object cannot be looked at", error=str(exc))
        return False


def _is_incomplete(directory: Path) -> bool:
    try:
        layer = msgspec.json.decode((directory / RECORD_FILE).read_bytes(), type=Layer)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except msgspec.DecodeError as exc:
        _log.error("a layer's record is damaged", layer=directory.name, error=str(exc))
        return False
    return layer.kind is LayerKind.IMAGE and not layer.complete


def object_list(path: Path) -> ObjectList | None:
    """The list in the file *path*; None if the layer was removed, or has no objects."""
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if not size_bytes:
                return None
            return ObjectList(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), range(size_bytes // REF_RECORD.size)
            )
    except (FileNotFoundError, NotADirectoryError):
        return None


def verify_unsynced_objects(images: Path, store: ObjectStore, pinned: Iterable[bytes] = ()) -> int:
    """After a power cut: compare each object that only incomplete layers and pins have with its digest.

    Returns:
        How many were removed.

    What was fetched was not synced, so such an object may have its name without its bytes. A complete layer's objects
    were synced before it was complete.
    """
    wanted = IncompleteLayers(images)
    incomplete = wanted.layers()
    vouching = [object_list(path / OBJECTS_FILE) for path in images.iterdir() if path.name not in incomplete]
    removed = 0
    for digest in wanted.digests().union(pinned):
        if any(known is not None and known.between(digest, digest) for known in vouching):
            continue
        try:
            if store.has(digest):
                object = File(store.open(digest))
                verify_file(object.fd, digest)
        except IntegrityError as exc:
            _log.warning("an object did not survive the power cut", error=str(exc))
            store.remove(digest)
            removed += 1
    return removed


def mark_complete(images: Path, id: str, store: ObjectStore) -> bool:
    """Say durably that all objects of the layer are here; later mounts leave the lazy file system out.

    Returns:
        Whether they are, and the layer too.

    Raises:
        GearError: It cannot be written; the layer stays incomplete.

    Crash: the layer is incomplete before the rename and complete after it; its objects were synced before.
    """
    with publishing(images.parent, store):
        records = object_list(images / id / OBJECTS_FILE)
        if records is None or not all(_is_here(store, records.record(at)[0]) for at in records.entries):
            return False
        with opened_directory(images) as images_fd:
            kernel.syncfs(images_fd)
        return _mark(images, id, complete=True)


def mark_incomplete(images: Path, id: str) -> bool:
    """Say that objects of the layer are about to be gone and must be fetched; whether there is such a layer.

    The caller keeps objects from being stored in place (objects.inplace.mark_objects_lost), before and after.
    """
    done = _mark(images, id, complete=False)
    os.utime(images)  # the lazy file server looks again
    return done


def layers_referring_to(images: Path, name: bytes) -> list[str]:
    """The image layers that refer to an object of this name of 21 characters."""
    found = []
    for directory in images.iterdir():
        records = object_list(directory / OBJECTS_FILE)
        if records is not None and records.named(name) is not None:
            found.append(directory.name)
    return found


def _mark(images: Path, id: str, *, complete: bool) -> bool:
    directory = images / id
    try:
        layer = msgspec.json.decode((directory / RECORD_FILE).read_bytes(), type=Layer)
        record = msgspec.json.encode(msgspec.structs.replace(layer, complete=complete))
        replace_file(directory / RECORD_FILE, record, sync=False)
    except FileNotFoundError:
        return False  # it was removed meanwhile
    except OSError as exc:
        raise from_os_error(exc, f"mark layer {id}") from exc
    return True
