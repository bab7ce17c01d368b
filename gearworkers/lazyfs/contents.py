"""What the lazy file system's tree asks: objects by their short names, and the bytes of large ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError, IntegrityError, InvalidInput, NotFound
from gearworkers.fetch.chunked import Opened
from gearworkers.fetch.download import Done
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.partial_object import LargeObject
from gearworkers.fetch.priority_pool import Urgency
from gearworkers.layers.incomplete import IncompleteLayers
from gearworkers.lazyfs.arrivals import Arrivals
from gearworkers.lazyfs.tree import Arrived, Found, Served, Unknown, digests_from, node_of
from gearworkers.util.open_file import File, ReadDone

_MOST_READS = 2000
"""Of one object, that are remembered."""
_MOST_READ_OBJECTS = 128
"""Whose reads are; more than an image reads while it starts."""

Kept = TypeVar("Kept", bound=LargeObject | File)


class LazyContents:
    """The objects of one store's incomplete layers; implements `mounts.lazy.tree.Contents`."""

    def __init__(
        self,
        store: ObjectStore,
        arrivals: Arrivals,
        wanted: IncompleteLayers,
        fetcher: Fetcher,
        missed: Callable[[bytes, int], None],
        *,
        large_bytes: int,
        served_bytes: int,
    ) -> None:
        """
        Args:
            store: Where objects are.
            arrivals: Where the overlay finds them in time.
            wanted: What there is.
            fetcher: Who brings them.
            missed: Told digest and size in bytes of each object that is wanted and not here.
            large_bytes: As the fetcher's.
            served_bytes: From this size on an object is served in parts while it arrives.
        """
        self._store = store
        self._arrivals = arrivals
        self._wanted = wanted
        self._fetcher = fetcher
        self._missed = missed
        self._large_bytes = large_bytes
        self._served_bytes = served_bytes
        self._served: dict[int, LargeObject | File] = {}
        self._reads: dict[int, list[tuple[int, int]]] = {}
        self._digests: dict[int, bytes] = {}
        """Of the served nodes."""
        self.lookups = 0

    def want(self, name: bytes, done: Callable[[Found], None]) -> None:
        """Make the object arrive, or be ready to be read while it does."""
        self.lookups += 1
        try:
            found = self._wanted.find_named(name)
            if found is None:
                done(Unknown())
                return
            digest, size_bytes = found
            is_here = self._store.has(digest)
        except GearError as exc:
            done(exc)
            return
        if not is_here:
            self._missed(digest, size_bytes)
        if is_here:
            done(self._arrive(digest))
        elif size_bytes >= self._large_bytes:
            self._fetcher.chunked.open(
                digest, size_bytes, Urgency.ON_DEMAND, lambda opened: self._opened(digest, size_bytes, opened, done)
            )
        else:
            self._fetch(digest, size_bytes, done)

    def is_wanted(self, name: bytes) -> bool:
        """Whether a layer has such an object, as far as can be told."""
        try:
            return self._wanted.find_named(name) is not None
        except GearError:
            return True

    def size_bytes(self, node: int) -> int | GearError:
        """From the lists of the incomplete layers."""
        try:
            return self._object(node)[1]
        except GearError as exc:
            return exc

    def read(self, node: int, offset: int, size_bytes: int, done: ReadDone) -> None:
        """Of a large object, arriving or here."""
        reads = self._reads.setdefault(node, [])
        if len(reads) < _MOST_READS:
            reads.append((offset, size_bytes))
        for oldest in list(self._reads)[:-_MOST_READ_OBJECTS]:
            self._reads.pop(oldest, None)
        served = self._served.get(node)
        if served is None or (isinstance(served, LargeObject) and served.broken is not None):
            self._reopen(node, lambda opened: _read(opened, offset, size_bytes, done))
        else:
            served.read(offset, size_bytes, done)

    def reads(self, object: str) -> list[tuple[int, int]]:
        """Which parts of the object, named by its digest in hex, were read here lately, as (offset, size in bytes)."""
        try:
            return list(self._reads.get(node_of(bytes.fromhex(object)), ()))
        except ValueError as exc:
            raise InvalidInput(f"object {object[:80]!r}: a digest in hex is needed") from exc

    def whole(self, node: int) -> File | None:
        """Of an object that is in the store by now."""
        served = self._served.get(node)
        if not isinstance(served, File):
            try:
                digest, _ = self._object(node)
                if not self._store.has(digest):
                    return None
                served = self._keep(node, digest, File(self._store.open(digest)))
            except GearError:
                return None  # a read will tell
        return served

    def forget(self, node: int) -> None:
        """Close the file; who looks it up again opens it again."""
        self._served.pop(node, None)
        self._digests.pop(node, None)

    def collected(self) -> list[bytes]:
        """Look after the served objects that were removed meanwhile, their image with them.

        The kernel still knows them. One that an image wants again comes again.

        Returns:
            The others' digests: they should be forgotten, so that their disk space becomes free.
        """
        unwanted = []
        for node, digest in list(self._digests.items()):
            served = self._served.get(node)
            if served is None or os.fstat(served.fd).st_nlink:
                continue
            if self._store.has(digest):
                self._keep(node, digest, File(self._store.open(digest)))
            elif self._wanted.refer_to(digest):
                self._reopen(node, lambda _: None)
            else:
                unwanted.append(digest)
        return unwanted

    @property
    def serving(self) -> int:
        """How many objects are read through the lazy file system."""
        return len(self._served)

    def _arrive(self, digest: bytes) -> Found:
        try:
            self._arrivals.link(digest)
        except GearError as exc:
            return exc
        return Arrived()

    def _arrive_after(self, digest: bytes, done: Callable[[Found], None]) -> Done:
        return lambda error: done(self._arrive(digest) if error is None else error)

    def _fetch(self, digest: bytes, size_bytes: int, done: Callable[[Found], None]) -> None:
        self._fetcher.whole.fetch(digest, size_bytes, Urgency.ON_DEMAND, self._arrive_after(digest, done))

    def _read_wholly(
        self, digest: bytes, size_bytes: int, found: bytes | GearError, done: Callable[[Found], None]
    ) -> None:
        """All chunks are here, and the object about to be; or one is not to be had."""
        if isinstance(found, GearError):
            done(found)
        else:
            self._fetcher.fetch(digest, size_bytes, Urgency.ON_DEMAND, self._arrive_after(digest, done))

    def _opened(self, digest: bytes, size_bytes: int, opened: Opened, done: Callable[[Found], None]) -> None:
        if isinstance(opened, GearError):
            done(opened)
        elif isinstance(opened, File):
            done(self._arrive(digest))
        elif opened is None:
            self._fetch(digest, size_bytes, done)
        elif size_bytes < self._served_bytes:
            opened.read(0, size_bytes, lambda found: self._read_wholly(digest, size_bytes, found, done))
        else:
            node = node_of(digest)
            if self._is_shared(node, digest):
                self._fetch(digest, size_bytes, done)
                return
            self._keep(node, digest, opened)
            done(Served(node, size_bytes))

    def _is_shared(self, node: int, digest: bytes) -> bool:
        """Whether another object may have the same node: 63 bits are few enough for who makes such a pair.

        Such a one comes whole, and is a file of its own.
        """
        try:
            others = [other for other, _ in self._wanted.objects_between(*digests_from(node)) if other != digest]
        except GearError:
            return True
        return bool(others) or self._digests.get(node, digest) != digest

    # -- nodes that another process, or this one before, has given out

    def _reopen(self, node: int, use: Callable[[LargeObject | File | GearError], None]) -> None:
        def fetched(digest: bytes, error: GearError | None) -> None:
            use(self._remembered(node, digest, self._whole(digest) if error is None else error))

        def opened(digest: bytes, size_bytes: int, found: Opened) -> None:
            if found is None:  # no source keeps it in chunks
                self._fetcher.whole.fetch(digest, size_bytes, Urgency.ON_DEMAND, lambda error: fetched(digest, error))
            else:
                use(self._remembered(node, digest, found))

        try:
            digest, size_bytes = self._object(node)
        except GearError as exc:
            use(exc)
            return
        self._fetcher.chunked.open(
            digest, size_bytes, Urgency.ON_DEMAND, lambda found: opened(digest, size_bytes, found)
        )

    def _remembered(
        self, node: int, digest: bytes, opened: LargeObject | File | GearError
    ) -> LargeObject | File | GearError:
        return opened if isinstance(opened, GearError) else self._keep(node, digest, opened)

    def _keep(self, node: int, digest: bytes, opened: Kept) -> Kept:
        self._served[node] = opened
        self._digests[node] = digest
        return opened

    def _whole(self, digest: bytes) -> File | GearError:
        try:
            return File(self._store.open(digest))
        except GearError as exc:
            return exc

    def _object(self, node: int) -> tuple[bytes, int]:
        """Digest and size in bytes of the object with this node.

        Raises:
            NotFound: No incomplete layer has it.
            IntegrityError: Two have the same.
        """
        found = self._wanted.objects_between(*digests_from(node))
        if not found:
            raise NotFound(f"object {digests_from(node)[0].hex()}…: no incomplete layer has it")
        if len(found) > 1:
            raise IntegrityError(f"objects {', '.join(digest.hex() for digest, _ in found)} begin with the same bits")
        return found[0]


def _read(opened: LargeObject | File | GearError, offset: int, size_bytes: int, done: ReadDone) -> None:
    if isinstance(opened, GearError):
        done(opened)
    else:
        opened.read(offset, size_bytes, done)
