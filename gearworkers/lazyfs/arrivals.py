"""Hard links to the objects that arrived while incomplete layers are mounted, in a cache behind the fetch directory.

The overlay looks up an object in public/, where it is missing, then in the lazy file system, which fetches it, and then
here, where the link exists by then.
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
"""The kernel looks here within this time after the answer to its lookup."""


class Arrivals:
    """The directory of links; one process owns it."""

    def __init__(self, path: Path, store: ObjectStore) -> None:
        self._links = ObjectStore(path)
        self._prefix = os.fsencode(path)
        self._store = store
        self._lock = threading.Lock()
        self._last_s = time.monotonic()
        self._count = 1  # an earlier process may have left some

    def prepare(self) -> None:
        """Create missing directories."""
        self._links.prepare()
        (self._links.cache / "replacing").unlink(missing_ok=True)

    def link(self, digest: bytes) -> None:
        """Create a link to an object of the store; idempotent.

        Raises:
            NotFound: The object is not in the store.
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
        """Replace the link to an object that was damaged and fetched again."""
        temporary = self._prefix + b"/replacing"
        os.link(object, temporary)
        os.rename(temporary, link)

    def empty(self) -> int:
        """Remove all links, unless one was created recently; call it while no overlay uses this directory.

        Returns:
            The number of removed links.
        """
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
