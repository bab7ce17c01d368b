"""Objects that arrived while incomplete layers were mounted: hard links in a cache of their own, behind the trap.

The overlay looks an object up in public/, then in the lazy file system, which makes it arrive, then here. By then
the name is here, though public/ was asked before it was there.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.digest import object_path
from gearworkers.errors import from_os_error

_SETTLED_S = 10.0
"""A look-up that was answered is followed by the kernel's look here within so long."""


class Arrivals:
    """The directory of links; one process has it."""

    def __init__(self, path: Path, store: ObjectStore) -> None:
        self._links = ObjectStore(path)
        self._prefix = os.fsencode(path)
        self._store = store
        self._lock = threading.Lock()
        self._last_s = time.monotonic()
        self._count = 1  # a process before this one may have left some

    def prepare(self) -> None:
        """Make the directories that are missing."""
        self._links.prepare()
        (self._links.cache / "replacing").unlink(missing_ok=True)

    def link(self, digest: bytes) -> None:
        """Have an object of the store here too; idempotent.

        Raises:
            NotFound: It is not in the store.
        """
        with self._lock:
            self._last_s = time.monotonic()
            self._count += 1
            link, object = self._prefix + object_path(digest), self._store.path(digest)
            try:
                try:
                    os.link(object, link)
                except FileExistsError:
                    if not os.path.samestat(os.stat(object), os.stat(link)):
                        self._replace(object, link)
            except OSError as exc:
                raise from_os_error(exc, f"link object {digest.hex()} to arrivals") from exc

    def _replace(self, object: bytes, link: bytes) -> None:
        """The link is of an object that was found damaged since, and has come again."""
        temporary = self._prefix + b"/replacing"
        os.link(object, temporary)
        os.rename(temporary, link)

    def empty(self) -> int:
        """Remove all links, unless one was asked for a moment ago; how many. For when no overlay looks here."""
        with self._lock:
            if not self._count or time.monotonic() - self._last_s < _SETTLED_S:
                return 0
            removed = 0
            for shard in self._links.shards():
                for name in self._links.names(shard):
                    os.unlink(shard + b"/" + name)
                    removed += 1
            self._count = 0
            return removed
