"""Garbage collection: objects that no layer refers to go away; one that an import under way has found stays.

How a race with an import is decided: the import writes its claim, then looks for the object; the collector hides
the object, then reads the claims. So either the import does not find it and stores it anew, or the collector sees
the claim and puts it back. What is claimed before that is not hidden at all: it may be a file that an import is
writing in place (inplace.py), whose claim is older than the file. A layer cannot become visible while objects are
hidden (locks.GarbageLock).

Crash: hidden objects lie in hidden/ and are put back before anything else is published or collected.
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
    """What a collection found."""

    removed_objects: int
    removed_bytes: int
    kept_objects: int
    kept_bytes: int


class GarbageCollector:
    """Collects one root; two at once do each other no harm, but do the work twice."""

    def __init__(self, root: Path, store: ObjectStore, *, published: Sequence[Path], building: Path) -> None:
        self._store = store
        self._lock = GarbageLock(root)
        self._hidden = HiddenObjects(root / HIDDEN, store)
        self._published = published
        self._building = building

    def collect(self) -> GarbageReport:
        """Remove what nothing refers to.

        Raises:
            GearError: A directory or a list could not be read; nothing is removed by a list that is in doubt.
        """
        with self._lock.exclusive():
            self._hidden.restore()
        removed = removed_bytes = kept = kept_bytes = 0
        for order, shard in enumerate(self._store.shards()):
            lists = self._lists(*self._published)
            marked = _marked(lists, order)
            garbage: list[bytes] = []
            for name, size_bytes in _sizes(shard):
                if name in marked:
                    kept, kept_bytes = kept + 1, kept_bytes + size_bytes
                else:
                    garbage.append(name)
            for at in range(0, len(garbage), _BATCH):
                gone, gone_bytes = self._remove(order, shard, garbage[at : at + _BATCH], lists)
                removed, removed_bytes = removed + gone, removed_bytes + gone_bytes
        return GarbageReport(removed, removed_bytes, kept, kept_bytes)

    def remove_stale_announcements(self, push_queue: PushQueue) -> int:
        """Let go of what was announced for push and neither is stored nor being imported; how many.

        Nothing is hidden or published meanwhile.
        """
        with self._lock.exclusive():
            self._hidden.restore()
            return push_queue.remove_unstored(
                lambda: {digest for path in self._lists(self._building) for digest, _ in read_refs(path)}
            )

    def _remove(self, order: int, shard: bytes, names: list[bytes], read: set[Path]) -> tuple[int, int]:
        """Hide, look at the claims once more, then remove; how many objects and bytes went."""
        removed = removed_bytes = 0
        left = set(names)
        while left:
            with self._lock.exclusive():
                left -= self._claimed(read)
                hidden = self._hide(shard, left)
                for name in hidden & self._claimed(read):
                    self._hidden.put_back(ALPHABET[order : order + 1] + name)
                gone, gone_bytes = self._hidden.clear()
            removed, removed_bytes = removed + gone, removed_bytes + gone_bytes
            left -= hidden
        return removed, removed_bytes

    def _hide(self, shard: bytes, names: set[bytes]) -> set[bytes]:
        """Those that could be hidden: a full disk has no room for all their names in another directory at once."""
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

    def _claimed(self, read: set[Path]) -> set[bytes]:
        """Names, without the shard's character, that imports under way and layers not in *read* refer to."""
        late = self._lists(self._building) | (self._lists(*self._published) - read)
        return {object_name(digest)[1:] for path in late for digest, _ in read_refs(path)}

    def _lists(self, *parents: Path) -> set[Path]:
        return {
            objects for parent in parents for layer in parent.iterdir() if (objects := layer / OBJECTS_FILE).exists()
        }


@contextmanager
def publishing(root: Path, store: ObjectStore) -> Iterator[None]:
    """Within it a layer may become visible: no object is hidden, by a collector at work or one that died."""
    with GarbageLock(root).shared():
        HiddenObjects(root / HIDDEN, store).restore()
        yield


class HiddenObjects:
    """Objects out of sight for the moment between hiding them and the last look at the claims."""

    def __init__(self, directory: Path, store: ObjectStore) -> None:
        self._directory = directory
        self._prefix = os.fsencode(directory) + b"/"
        self._store = store

    def hide(self, shard: bytes, name: bytes) -> None:
        """Take the object out of sight; it may be gone already."""
        try:
            os.rename(shard + b"/" + name, self._prefix + shard[-1:] + name)
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise from_os_error(exc, f"hide object {os.fsdecode(name)}") from exc

    def put_back(self, name: bytes) -> None:
        """Make it visible again; if an import has stored it anew meanwhile, that one stays, if it is whole.

        Of two who do it at the same time one finds it done.
        """
        target = os.fsencode(self._store.cache) + b"/" + RESERVED + name[:1] + b"/" + name[1:]
        with suppress(FileNotFoundError):
            try:
                kernel.renameat2(-1, self._prefix + name, -1, target, kernel.Rename.NOREPLACE)
            except FileExistsError:
                if _has_digest(self._prefix + name) and not _has_digest(target):
                    # The import that writes there may die, others have found this.
                    os.rename(self._prefix + name, target)
                else:
                    os.unlink(self._prefix + name)

    def clear(self) -> tuple[int, int]:
        """Remove what is hidden; how many objects and bytes."""
        count = size_bytes = 0
        for name, object_bytes in _sizes(self._prefix):
            os.unlink(self._prefix + name)
            count, size_bytes = count + 1, size_bytes + object_bytes
        return count, size_bytes

    def restore(self) -> None:
        """Put back all that a crash left hidden; the caller holds the garbage lock."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        for name in os.listdir(self._prefix):
            self.put_back(name)


def _has_digest(path: bytes) -> bool:
    """Whether it is a whole object."""
    try:
        os.getxattr(path, DIGEST_XATTR)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.ENOENT):
            return False
        raise
    return True


def _marked(lists: Iterable[Path], order: int) -> set[bytes]:
    """Names (without the shard's character) that the sorted *lists* refer to in the shard of this order."""
    names: set[bytes] = set()
    for path in lists:
        try:
            with open(path, "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    continue
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as records:
                    names.update(_shard_names(records, order))
        except FileNotFoundError:
            continue  # the layer was removed meanwhile
    return names


def _shard_names(records: mmap.mmap, order: int) -> Iterator[bytes]:
    """A shard is the records whose digest begins with these six bits, and the records are sorted."""
    positions = range(len(records) // REF_RECORD.size)
    first = bisect.bisect_left(positions, order << 2, key=lambda at: records[at * REF_RECORD.size])
    for at in positions[first:]:
        start = at * REF_RECORD.size
        if records[start] >> 2 != order:
            return
        yield object_name(records[start : start + DIGEST_BYTES])[1:]


def _sizes(directory: bytes) -> Iterator[tuple[bytes, int]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                yield entry.name, entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
