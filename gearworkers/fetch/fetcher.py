"""Fetches objects into the store: verifies them, shares one download among readers, and serves readers first.

Crash: leaves files in the directory of partial files, which the next process removes or resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import structlog

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError, NotFound
from gearworkers.fetch.chunk_index import ChunkIndex
from gearworkers.fetch.context import FetchContext
from gearworkers.fetch.delayed_calls import DelayedCalls
from gearworkers.fetch.download import Download
from gearworkers.fetch.download_chunks import DownloadChunks
from gearworkers.fetch.failover import Failover
from gearworkers.fetch.futures import completed, failed, then
from gearworkers.fetch.partial_files import PartialFiles
from gearworkers.fetch.priority_pool import Priority, PriorityPool
from gearworkers.fetch.source import Chunk, ObjectSource
from gearworkers.fetch.stats import FetchStats
from gearworkers.fetch.targets import WholeFile
from gearworkers.util.open_file import ObjectFile

_log = structlog.get_logger(__name__)

BATCH_WAIT_S = 0.1
RETRY_AFTER_S = 10.0


class Fetcher:
    """Fetches objects of one store from its sources; any thread may call all methods.

    Attributes:
        stats: Counters and failures of all downloads.
    """

    def __init__(
        self,
        store: ObjectStore,
        partial_files: Path,
        sources: Sequence[ObjectSource],
        pool: PriorityPool,
        *,
        large_bytes: int,
        is_referenced: Callable[[bytes], bool] = lambda _: True,
        batch_wait_s: float = BATCH_WAIT_S,
    ) -> None:
        """
        Args:
            store: Receives the objects.
            partial_files: A directory that only this process uses, on the store's file system.
            sources: The nearest first.
            pool: Runs the fetches.
            large_bytes: An object of at least this size is fetched in chunks, if its source keeps it in chunks.
            is_referenced: Whether an image or a pin still refers to an object, given its digest; other objects are
                fetched for their readers, but not stored.
            batch_wait_s: How long a reader waits for a batch request before the object is fetched alone.
        """
        self._large_bytes = large_bytes
        self._downloads: dict[bytes, Download] = {}
        """All downloads that have not ended, by digest; guarded by the lock."""
        self.stats = FetchStats()
        files = PartialFiles(partial_files)
        self._context = FetchContext(
            store=store,
            partial_files=files,
            chunk_index=ChunkIndex(files.chunk_index, self._open_file),
            failover=Failover(sources, self.stats),
            stats=self.stats,
            pool=pool,
            batch_wait=DelayedCalls(batch_wait_s),
            is_referenced=is_referenced,
        )

    def prepare(self) -> None:
        """Create the directory of partial files; remove leftovers of a crash, except large objects to resume.

        Raises:
            GearError: The directory cannot be used.
        """
        self._context.partial_files.prepare()
        self._context.chunk_index.prepare()

    def close(self) -> None:
        """Close the chunk index, after the pool was closed."""
        self._context.chunk_index.close()

    @property
    def arriving(self) -> int:
        """Number of objects that are being fetched."""
        return sum(download.is_arriving for download in self._all_downloads())

    def is_here(self, digest: bytes) -> bool:
        """Return whether the object needs no fetch; True also if another content is stored under its name."""
        try:
            return self._context.store.has(digest)
        except GearError as exc:
            _log.error("cannot look up an object", error=str(exc))
            return True

    def open(self, digest: bytes, size_bytes: int, priority: Priority = Priority.ON_DEMAND) -> Future[Download | None]:
        """Prepare an object that is not in the store for reading; join its download if one runs.

        Returns:
            None when the object is in the store, or its download as soon as it can be read while chunks arrive.
            GearError if it cannot be fetched.
        """
        with self._context.lock:
            download = self._downloads.get(digest) or self._add(digest, size_bytes)
            return download.open(priority)

    def fetch(self, digest: bytes, size_bytes: int, priority: Priority) -> Future[None]:
        """Fetch the object into the store, if it is not there.

        Returns:
            Done when it is there; IntegrityError if another content is stored under its name, GearError if it cannot
            be fetched.
        """
        try:
            if self._context.store.has(digest):
                return completed(None)
        except GearError as exc:
            return failed(exc)

        def opened(download: Download | None) -> Future[None] | None:
            return download.store(priority) if download is not None else None

        return then(self.open(digest, size_bytes, priority), opened)

    # -- for prefetching

    def get(self, digest: bytes) -> Download | None:
        """Return the download of a large object if it can be read, otherwise None."""
        download = self._downloads.get(digest)
        return download if download is not None and download.is_readable else None

    def claim(self, digest: bytes, size_bytes: int, *, is_required: bool) -> DownloadChunks | None:
        """Let a batch request fetch a small object.

        Args:
            digest: SHA-256 of the object.
            size_bytes: Its size.
            is_required: Whether to fetch the object alone if the batch request, or an earlier one, does not deliver it.

        Returns:
            The chunks of the download; the batch request must `deliver` or `miss` chunk 0. None if the object is stored
            or requested already.
        """
        if self.is_here(digest):
            return None
        with self._context.lock:
            download = self._downloads.get(digest)
            is_new = download is None
            if download is None:
                download = self._add(digest, size_bytes)
            if is_required:
                download.require()
            return download.chunks if is_new and download.chunks.claim(0) else None

    def adopt_layout(self, digest: bytes, size_bytes: int, layout: Sequence[Chunk]) -> None:
        """Make a large object readable with the layout from a batch request, before its first reader.

        Blocks. Does nothing if the object has a download already, or if its layout was found to be wrong.
        """
        with self._context.lock:
            if digest in self._downloads or digest in self._context.wrong_layouts:
                return
            download = self._add(digest, size_bytes)
        download.adopt_layout(layout)

    # -- for periodic maintenance

    def fill_idle(self, idle_s: float, *, retry_after_s: float = RETRY_AFTER_S) -> None:
        """Fetch the rest of the large objects whose last read is *idle_s* ago or longer.

        An object is skipped for *retry_after_s* after one of its chunks failed: the remote may be unreachable, the disk
        full, or the chunk damaged in the remote.
        """
        now_s = time.monotonic()
        for download in self._all_downloads():
            is_idle = download.last_read_s <= now_s - idle_s and download.is_readable
            if is_idle and download.chunks.failed_s <= now_s - retry_after_s:
                download.chunks.fill()

    def remove_unreferenced(self, idle_s: float) -> None:
        """Remove the partial files of unreferenced objects that were not read within *idle_s*.

        Objects that a batch request is fetching stay until the next call.

        Raises:
            IntegrityError: Another content is stored under an object's name.
        """
        context = self._context
        for digest in context.partial_files.digests():
            if not context.is_referenced(digest):
                self._discard(digest, idle_s)
        partial = set(context.partial_files.digests())
        context.chunk_index.remove_missing(lambda digest: digest in partial or context.store.has(digest))

    def _discard(self, digest: bytes, idle_s: float) -> None:
        download = self._downloads.get(digest)
        if download is not None:
            download.discard_if_idle(idle_s)
            return
        with self._context.lock:
            if digest not in self._downloads:
                self._context.partial_files.remove(digest)

    # -- downloads

    def _all_downloads(self) -> list[Download]:
        with self._context.lock:
            return list(self._downloads.values())

    def _add(self, digest: bytes, size_bytes: int) -> Download:
        """Create a download; call it under the lock."""
        is_whole = size_bytes < self._large_bytes or digest in self._context.wrong_layouts
        target = WholeFile(self._context, digest, size_bytes) if is_whole else None
        download = self._downloads[digest] = Download(self._context, digest, size_bytes, target, self._forget)
        return download

    def _forget(self, download: Download) -> None:
        """Remove a download that has ended; call it under the lock."""
        if self._downloads.get(download.digest) is download:
            del self._downloads[download.digest]

    def _open_file(self, digest: bytes) -> ObjectFile | None:
        """Open a stored or partial object; None if there is none."""
        try:
            return ObjectFile(self._context.store.open(digest))
        except NotFound:
            return self._context.partial_files.open(digest)
