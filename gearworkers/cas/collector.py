"""Garbage collection: remove objects that no layer and no pin refers to.

Race with an import: the import writes a ref, then looks for the object. The collector hides the object, then reads the
refs. So either the import does not find the object and stores it again, or the collector finds the ref and puts the
object back. Objects with a ref at the start are not hidden at all, since an import may be writing such a file in place
(`inplace`); its ref is older than the file. No layer becomes visible while objects are hidden (`locks.GarbageLock`).

Crash: leaves hidden objects in hidden/. They are put back before anything is published or collected.
"""

from __future__ import annotations

import bisect
import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gearworkers.cas.locks import GarbageLock
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.refs import OBJECTS_FILE, REF_RECORD, read_refs
from gearworkers.cas.store import ObjectStore
from gearworkers.digest import ALPHABET, DIGEST_BYTES, DIGEST_XATTR, RESERVED, object_name
from gearworkers.errors import ResourceExhausted, from_os_error
from gearworkers.util import syscalls as kernel

HIDDEN = "hidden"
_BATCH = 2000


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """The result of a collection."""

    removed_objects: int
    removed_bytes: int
    kept_objects: int
    kept_bytes: int


class GarbageCollector:
    """Collects the garbage of one root. Two collectors at once are safe, but do the work twice."""

    def __init__(self, root: Path, store: ObjectStore, *, published: Sequence[Path], building: Path) -> None:
        self._store = store
        self._lock = GarbageLock(root)
        self._hidden = HiddenObjects(root / HIDDEN, store)
        self._published = published
        self._building = building

    def collect(self) -> GarbageReport:
        """Remove unreferenced objects.

        Raises:
            GearError: A directory or an `objects` file cannot be read; objects that may be in use stay.
        """
        with self._lock.exclusive():
            self._hidden.restore()
        removed = removed_bytes = kept = kept_bytes = 0
        for shard_number, shard in enumerate(self._store.shards()):
            lists = self._lists(*self._published)
            referred = _names_in_shard(lists, shard_number)
            garbage: list[bytes] = []
            for name, size_bytes in _sizes(shard):
                if name in referred:
                    kept, kept_bytes = kept + 1, kept_bytes + size_bytes
                else:
                    garbage.append(name)
            for at in range(0, len(garbage), _BATCH):
                count, count_bytes = self._remove(shard_number, shard, garbage[at : at + _BATCH], lists)
                removed, removed_bytes = removed + count, removed_bytes + count_bytes
        return GarbageReport(removed, removed_bytes, kept, kept_bytes)

    def remove_stale_announcements(self, push_queue: PushQueue) -> int:
        """Remove announcements from the push queue whose object is neither stored nor being imported.

        No object is hidden and no layer is published meanwhile.

        Returns:
            The number of announcements removed.
        """
        with self._lock.exclusive():
            self._hidden.restore()
            return push_queue.remove_unstored(
                lambda: {digest for path in self._lists(self._building) for digest, _ in read_refs(path)}
            )

    def _remove(self, shard_number: int, shard: bytes, names: list[bytes], read: set[Path]) -> tuple[int, int]:
        """Hide objects, read the refs again, then remove; return the number of objects and bytes removed."""
        removed = removed_bytes = 0
        left = set(names)
        while left:
            with self._lock.exclusive():
                left -= self._names_in_new_lists(read)
                hidden = self._hide(shard, left)
                for name in hidden & self._names_in_new_lists(read):
                    self._hidden.put_back(ALPHABET[shard_number : shard_number + 1] + name)
                count, count_bytes = self._hidden.clear()
            removed, removed_bytes = removed + count, removed_bytes + count_bytes
            left -= hidden
        return removed, removed_bytes

    def _hide(self, shard: bytes, names: set[bytes]) -> set[bytes]:
        """Hide objects; return the hidden ones. A full disk may not have space for all their names in hidden/."""
        hidden: set[bytes] = set()
        for name in names:
            try:
                self._hidden.hide(shard, name)
            except ResourceExhausted:
                if not hidden:
                    raise
                break
            hidden.add(name)
        return hidden

    def _names_in_new_lists(self, read: set[Path]) -> set[bytes]:
        """Return the names, without the shard's character, in lists of running imports and in lists not in *read*."""
        new = self._lists(self._building) | (self._lists(*self._published) - read)
        return {object_name(digest)[1:] for path in new for digest, _ in read_refs(path)}

    def _lists(self, *parents: Path) -> set[Path]:
        return {
            objects for parent in parents for layer in parent.iterdir() if (objects := layer / OBJECTS_FILE).exists()
        }


@contextmanager
def publishing(root: Path, store: ObjectStore) -> Iterator[None]:
    """Provide a context in which a layer may become visible: no object is hidden, even if a collector has died."""
    with GarbageLock(root).shared():
        HiddenObjects(root / HIDDEN, store).restore()
        yield


class HiddenObjects:
    """The directory hidden/: objects between hiding and the second reading of the refs."""

    def __init__(self, directory: Path, store: ObjectStore) -> None:
        self._directory = directory
        self._prefix = os.fsencode(directory) + b"/"
        self._store = store

    def hide(self, shard: bytes, name: bytes) -> None:
        """Hide an object; do nothing if it does not exist."""
        try:
            os.rename(shard + b"/" + name, self._prefix + shard[-1:] + name)
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise from_os_error(exc, f"hide object {os.fsdecode(name)}") from exc

    def put_back(self, name: bytes) -> None:
        """Make an object visible again, unless an import has stored it again meanwhile.

        Two processes may call this at once; the second call does nothing.
        """
        target = os.fsencode(self._store.cache) + b"/" + RESERVED + name[:1] + b"/" + name[1:]
        with suppress(FileNotFoundError):
            try:
                kernel.renameat2(-1, self._prefix + name, -1, target, kernel.Rename.NOREPLACE)
            except FileExistsError:
                if _has_digest(self._prefix + name) and not _has_digest(target):
                    # Other imports have found the hidden object, and the import that writes the new file may die.
                    os.rename(self._prefix + name, target)
                else:
                    os.unlink(self._prefix + name)

    def clear(self) -> tuple[int, int]:
        """Remove all hidden objects; return the number of objects and bytes."""
        count = size_bytes = 0
        for name, object_bytes in _sizes(self._prefix):
            os.unlink(self._prefix + name)
            count, size_bytes = count + 1, size_bytes + object_bytes
        return count, size_bytes

    def restore(self) -> None:
        """Put back all objects that a crash left hidden. The caller holds the garbage lock."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        for name in os.listdir(self._prefix):
            self.put_back(name)


def _has_digest(path: bytes) -> bool:
    """Whether the file is a whole object."""
    try:
        os.getxattr(path, DIGEST_XATTR)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.ENOENT):
            return False
        raise
    return True


def _names_in_shard(lists: Iterable[Path], shard_number: int) -> set[bytes]:
    """Return the names, without the shard's character, that the sorted *lists* contain for one shard."""
    names: set[bytes] = set()
    for path in lists:
        try:
            with open(path, "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    continue
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as records:
                    names.update(_shard_names(records, shard_number))
        except FileNotFoundError:
            continue  # the layer was removed meanwhile
    return names


def _shard_names(records: mmap.mmap, shard_number: int) -> Iterator[bytes]:
    """Yield the names of one shard: its digests begin with the same six bits, so their records are adjacent."""
    positions = range(len(records) // REF_RECORD.size)
    first = bisect.bisect_left(positions, shard_number << 2, key=lambda at: records[at * REF_RECORD.size])
    for at in positions[first:]:
        start = at * REF_RECORD.size
        if records[start] >> 2 != shard_number:
            return
        yield object_name(records[start : start + DIGEST_BYTES])[1:]


def _sizes(directory: bytes) -> Iterator[tuple[bytes, int]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                yield entry.name, entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
