"""Fetches objects into the store: verified, once however many readers wait, readers before background work.

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
from gearworkers.util.open_file import File

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
        is_wanted: Callable[[bytes], bool] = lambda _: True,
        batch_wait_s: float = BATCH_WAIT_S,
    ) -> None:
        """
        Args:
            store: Receives the objects.
            partial_files: A directory of this process alone, on the store's file system.
            sources: The nearest first.
            pool: Runs the fetches.
            large_bytes: An object of at least this size is fetched in chunks, if its source keeps it so.
            is_wanted: Whether an image or a pin still refers to an object, given its digest; other objects are fetched
                for their readers, but not stored.
            batch_wait_s: How long a reader waits for a batch request before the object is fetched alone.
        """
        self._large_bytes = large_bytes
        self._downloads: dict[bytes, Download] = {}
        """All downloads that have not ended, by digest; under the lock."""
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
            is_wanted=is_wanted,
        )

    def prepare(self) -> None:
        """Make the directory of partial files; remove leftovers of a crash, except large objects to resume.

        Raises:
            GearError: It cannot be used.
        """
        self._context.partial_files.prepare()
        self._context.chunk_index.prepare()

    def close(self) -> None:
        """Close the chunk index; the pool is closed."""
        self._context.chunk_index.close()

    @property
    def arriving(self) -> int:
        """Number of objects that are being fetched."""
        return sum(download.is_arriving for download in self._all_downloads())

    def is_here(self, digest: bytes) -> bool:
        """Return whether nothing is to be fetched; True also if another content stands at the object's name."""
        try:
            return self._context.store.has(digest)
        except GearError as exc:
            _log.error("cannot look up an object", error=str(exc))
            return True

    def open(self, digest: bytes, size_bytes: int, priority: Priority = Priority.ON_DEMAND) -> Future[Download | None]:
        """Have an object that is not in the store ready to be read; joins a download that runs already.

        Returns:
            None when the object is in the store, or its download as soon as it can be read while chunks arrive.
            GearError if it cannot be fetched.
        """
        with self._context.lock:
            download = self._downloads.get(digest) or self._add(digest, size_bytes)
            return download.open(priority)

    def fetch(self, digest: bytes, size_bytes: int, priority: Priority) -> Future[None]:
        """Have the object in the store.

        Returns:
            Done when it is there; IntegrityError if another content stands at its name, GearError if it cannot be
            fetched.
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
        """Let a batch request bring a small object.

        Args:
            digest: SHA-256 of the object.
            size_bytes: Its size.
            is_required: Whether to fetch the object alone if no batch request brings it, this one or an earlier one.

        Returns:
            The chunks of the download, of which the batch request must bring chunk 0; None if the object is stored or
            requested already.
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
        """Make a large object readable by a layout that a batch request brought; nobody has asked for it yet.

        Blocks. Does nothing if the object is downloaded already, or if its layout was found to be wrong.
        """
        with self._context.lock:
            if digest in self._downloads or digest in self._context.wrong_layouts:
                return
            download = self._add(digest, size_bytes)
        download.adopt_layout(layout)

    # -- for a thread that calls from time to time

    def fill_idle(self, idle_s: float, *, retry_after_s: float = RETRY_AFTER_S) -> None:
        """Fetch the rest of the large objects that nobody has read within *idle_s*.

        An object is left alone for *retry_after_s* after one of its chunks failed: the remote may be unreachable, the
        disk full, or the chunk damaged in the remote.
        """
        now_s = time.monotonic()
        for download in self._all_downloads():
            is_idle = download.last_read_s <= now_s - idle_s and download.is_readable
            if is_idle and download.chunks.failed_s <= now_s - retry_after_s:
                download.chunks.fill()

    def forget_unwanted(self, idle_s: float) -> None:
        """Remove the partial files of objects that no image wants and nobody has read within *idle_s*.

        Objects that a batch request is bringing stay until the next call.

        Raises:
            IntegrityError: Another content stands at an object's name.
        """
        context = self._context
        for digest in context.partial_files.digests():
            if not context.is_wanted(digest):
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
        """Make a download; under the lock."""
        is_whole = size_bytes < self._large_bytes or digest in self._context.wrong_layouts
        target = WholeFile(self._context, digest, size_bytes) if is_whole else None
        download = self._downloads[digest] = Download(self._context, digest, size_bytes, target, self._forget)
        return download

    def _forget(self, download: Download) -> None:
        """Remove a download that has ended; under the lock."""
        if self._downloads.get(download.digest) is download:
            del self._downloads[download.digest]

    def _open_file(self, digest: bytes) -> File | None:
        """Open an object that is here or partly here."""
        try:
            return File(self._context.store.open(digest))
        except NotFound:
            return self._context.partial_files.open(digest)
