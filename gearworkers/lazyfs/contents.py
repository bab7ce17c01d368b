"""The objects behind the tree: found by name, read by node, fetched if they are missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError, IntegrityError, InvalidInput, NotFound
from gearworkers.fetch.download import Download, DownloadState
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.futures import completed, failed, then
from gearworkers.fetch.priority_pool import Priority
from gearworkers.layers.incomplete import IncompleteLayers
from gearworkers.lazyfs.arrivals import Arrivals
from gearworkers.lazyfs.read_log import ReadLog
from gearworkers.lazyfs.tree import Arrived, LookupResult, Served, Unknown, digests_from, node_of
from gearworkers.util.open_file import ObjectFile


class LazyContents:
    """The objects of one store's incomplete layers; implements `tree.ObjectProvider`.

    Attributes:
        read_log: The reads of large objects; for start-up profiles.
        lookups: Number of lookups.
    """

    def __init__(
        self,
        store: ObjectStore,
        arrivals: Arrivals,
        incomplete: IncompleteLayers,
        fetcher: Fetcher,
        report_miss: Callable[[bytes, int], None],
        *,
        served_bytes: int,
        read_log: ReadLog | None = None,
        node_of: Callable[[bytes], int] = node_of,
    ) -> None:
        """
        Args:
            store: Holds the objects that have arrived.
            arrivals: Shows them to overlays that are mounted already.
            incomplete: Has digest and size of the objects of incomplete layers.
            fetcher: Fetches the other objects.
            report_miss: Called with digest and size in bytes of each object that is looked up and missing.
            served_bytes: An object of at least this size is served while it arrives.
            read_log: The reads of large objects.
            node_of: Returns the node number of an object, given its digest.
        """
        self._store = store
        self._arrivals = arrivals
        self._incomplete = incomplete
        self._fetcher = fetcher
        self._report_miss = report_miss
        self._served_bytes = served_bytes
        self._node_of = node_of
        self._served: dict[int, Download | ObjectFile] = {}
        """By node."""
        self._digests: dict[int, bytes] = {}
        """The digests of files that are read through the server, by node."""
        self.read_log = read_log or ReadLog()
        self.lookups = 0

    def look_up(self, name: bytes) -> Future[LookupResult]:
        """Fetch the object, or serve it while it arrives."""
        self.lookups += 1
        try:
            known = self._incomplete.find_named(name)
            if known is None:
                return completed(Unknown())
            digest, size_bytes = known
            if self._store.has(digest):
                return completed(self._arrive(digest))
        except GearError as exc:
            return failed(exc)
        self._report_miss(digest, size_bytes)
        return then(self._fetcher.open(digest, size_bytes), partial(self._opened, digest, size_bytes))

    def is_known(self, name: bytes) -> bool:
        """Return whether a layer has an object of this name; True if the lists cannot be read."""
        try:
            return self._incomplete.find_named(name) is not None
        except GearError:
            return True

    def size_bytes(self, node: int) -> int:
        """Return the size of the node's object, from the lists of the layers."""
        return self._object(node)[1]

    def read(self, node: int, offset: int, size_bytes: int) -> Future[bytes]:
        """Read a large object that is arriving or stored."""
        self.read_log.add(node, offset, size_bytes)
        served = self._served.get(node)
        if served is None or (isinstance(served, Download) and served.state is DownloadState.FAILED):
            return then(self._serve_again(node), lambda reopened: _read(reopened, offset, size_bytes))
        return _read(served, offset, size_bytes)

    def reads(self, digest: str) -> list[tuple[int, int]]:
        """Return the recent reads of an object, given its digest in hex, as (offset, size in bytes).

        Raises:
            InvalidInput: *digest* is not hexadecimal.
        """
        try:
            return self.read_log.of(self._node_of(bytes.fromhex(digest)))
        except ValueError as exc:
            raise InvalidInput(f"object {digest[:80]!r}: expected a digest in hex") from exc

    def whole(self, node: int) -> ObjectFile | None:
        """Return the file of the node's object if the object is in the store."""
        served = self._served.get(node)
        if isinstance(served, ObjectFile):
            return served
        try:
            digest, _ = self._object(node)
            return self._serve_stored(node, digest) if self._store.has(digest) else None
        except GearError:
            return None  # reads report the error

    def forget(self, node: int) -> None:
        """Stop serving the node; the next lookup opens it again."""
        self._served.pop(node, None)
        self._digests.pop(node, None)

    def restore_removed(self) -> list[bytes]:
        """Serve objects again that were removed from the store while the kernel still knows them.

        Objects that an incomplete layer refers to are fetched again.

        Returns:
            The digests of the unreferenced objects: the kernel must forget them to free their disk space.
        """
        unreferenced = []
        for node, digest in list(self._digests.items()):
            served = self._served.get(node)
            if served is None or os.fstat(served.fd).st_nlink:
                continue
            if self._store.has(digest):
                self._serve_stored(node, digest)
            elif self._incomplete.refer_to(digest):
                self._serve_again(node)
            else:
                unreferenced.append(digest)
        return unreferenced

    @property
    def serving(self) -> int:
        """Number of objects that are read through the lazy file system."""
        return len(self._served)

    # -- lookups

    def _arrive(self, digest: bytes) -> LookupResult:
        self._arrivals.link(digest)
        return Arrived()

    def _opened(self, digest: bytes, size_bytes: int, download: Download | None) -> LookupResult | Future[LookupResult]:
        if download is None:
            return self._arrive(digest)
        node = self._node_of(digest)
        if size_bytes < self._served_bytes or self._is_shared(node, digest):
            return then(download.store(Priority.ON_DEMAND), lambda _: self._arrive(digest))
        self._serve(node, digest, download)
        return Served(node, size_bytes)

    def _is_shared(self, node: int, digest: bytes) -> bool:
        """Return whether another object may have the same node: an attacker can make digests share 63 bits.

        Such an object is not served: it is fetched whole and becomes a file of its own.
        """
        try:
            others = [other for other, _ in self._incomplete.objects_between(*digests_from(node)) if other != digest]
        except GearError:
            return True
        return bool(others) or self._digests.get(node, digest) != digest

    # -- serving

    def _serve_again(self, node: int) -> Future[Download | ObjectFile]:
        """Serve a node of an earlier process, or one whose download failed."""
        try:
            digest, size_bytes = self._object(node)
            if self._store.has(digest):
                return completed(self._serve_stored(node, digest))
        except GearError as exc:
            return failed(exc)

        def opened(download: Download | None) -> Download | ObjectFile:
            if download is None:
                return self._serve_stored(node, digest)
            self._serve(node, digest, download)
            return download

        return then(self._fetcher.open(digest, size_bytes), opened)

    def _serve_stored(self, node: int, digest: bytes) -> ObjectFile:
        file = ObjectFile(self._store.open(digest))
        self._serve(node, digest, file)
        return file

    def _serve(self, node: int, digest: bytes, served: Download | ObjectFile) -> None:
        self._served[node] = served
        self._digests[node] = digest

    def _object(self, node: int) -> tuple[bytes, int]:
        """Return digest and size in bytes of the node's object.

        Raises:
            NotFound: No layer has it.
            IntegrityError: Two objects share the node.
        """
        found = self._incomplete.objects_between(*digests_from(node))
        if not found:
            raise NotFound(f"object {digests_from(node)[0].hex()}…: no incomplete layer has it")
        if len(found) > 1:
            raise IntegrityError(f"objects {', '.join(digest.hex() for digest, _ in found)} begin with the same bits")
        return found[0]


def _read(served: Download | ObjectFile, offset: int, size_bytes: int) -> Future[bytes]:
    if isinstance(served, Download):
        return served.read(offset, size_bytes)
    try:
        return completed(served.read(offset, size_bytes))
    except GearError as exc:
        return failed(exc)
