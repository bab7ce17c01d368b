"""Large objects that come in chunks: opened once however many wait, ready to be read while they arrive."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from gearworkers.cas.store import verify_file
from gearworkers.errors import GearError, IntegrityError, NotFound, from_os_error
from gearworkers.fetch.chunk_index import ChunkIndex
from gearworkers.fetch.context import FetchContext
from gearworkers.fetch.download import Done
from gearworkers.fetch.partial_object import LargeObject
from gearworkers.fetch.priority_pool import Urgency
from gearworkers.fetch.source import Chunk, checked_layout
from gearworkers.util.open_file import File

_log = structlog.get_logger(__name__)

_AGAIN_S = 10.0
"""After a failure: the remote may be away, the disk full, or a chunk wrong for good."""

Opened = LargeObject | File | GearError | None
OpenDone = Callable[[Opened], None]
"""Called once: with the object, arriving or here; with None if it does not come in chunks; or with what went wrong."""


class ChunkedObjects:
    """Those that are on their way; all methods from any thread; only `adopt_layout` and `forget_unwanted` block.

    A layout that made up another object is never asked for again; such an object comes whole.
    """

    def __init__(self, context: FetchContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._large: dict[bytes, LargeObject] = {}
        self._opening: dict[bytes, list[OpenDone]] = {}
        self._opening_now: set[bytes] = set()
        self._lied_about: set[bytes] = set()
        self._whole_waiters: dict[bytes, list[Done]] = {}
        self._index = ChunkIndex(context.staging.chunk_index, self._file)

    def prepare(self) -> None:
        """Make ready to find chunks; staging is prepared."""
        self._index.prepare()

    def close(self) -> None:
        """Chunks are found no more."""
        self._index.close()

    def __len__(self) -> int:
        """How many are on their way, those that are only held ready not counted."""
        return sum(large.last_read_s < math.inf for large in tuple(self._large.values()))

    def get(self, digest: bytes) -> LargeObject | None:
        """The object, if it is on its way."""
        return self._large.get(digest)

    def open(self, digest: bytes, size_bytes: int, urgency: Urgency, done: OpenDone) -> None:
        """Have an object ready to be read; *done* is told, now or later.

        Args:
            digest: SHA-256 of the whole.
            size_bytes: Its size.
            urgency: Of asking for its layout.
            done: Told.
        """
        with self._lock:
            large = self._large.get(digest)
            if large is not None:
                large.last_read_s = time.monotonic()
            else:
                waiters = self._opening.setdefault(digest, [])
                waiters.append(done)
                if len(waiters) == 1 or urgency is Urgency.ON_DEMAND:
                    asked_s = time.monotonic()
                    self._context.pool.submit(lambda: self._open(digest, size_bytes, asked_s), urgency)
        if large is not None:
            done(large)

    def adopt_layout(self, digest: bytes, size_bytes: int, layout: Sequence[Chunk]) -> None:
        """An object can be read from now on, by a layout that has come; nobody has asked for it yet."""
        with self._lock:
            if digest in self._large or digest in self._opening:
                return
            self._opening[digest] = []
            self._opening_now.add(digest)
        try:
            opened = self._opened(digest, size_bytes, lambda: checked_layout(layout, size_bytes))
        except BaseException as exc:
            self._ask_instead(digest, size_bytes)
            if isinstance(exc, IntegrityError):
                self._context.outcomes.note_corrupt(exc)
            elif isinstance(exc, GearError):
                _log.warning("a large object could not be prepared", error=str(exc))
            else:
                raise
        else:
            self._answer(digest, opened)

    def fill(self, digest: bytes, large: LargeObject, done: Done) -> None:
        """Have an object that `open` gave here as a whole; *done* is told when it is, or is not what it should be.

        While a chunk cannot be had it goes on waiting: `fill_idle` tries again.
        """
        with self._lock:
            is_coming = self._large.get(digest) is large
            if is_coming:
                self._whole_waiters.setdefault(digest, []).append(done)
        if is_coming:
            large.fill()
        else:
            done(large.broken)

    def fill_idle(self, idle_s: float) -> None:
        """Have the rest fetched of those that nobody has read for so long, later if a chunk was not to be had."""
        now_s = time.monotonic()
        with self._lock:
            idle = [
                large
                for large in self._large.values()
                if large.last_read_s <= now_s - idle_s and large.failed_s <= now_s - _AGAIN_S
            ]
        for large in idle:
            large.fill()

    def forget_unwanted(self, idle_s: float) -> None:
        """Let go of the parts of those that nobody has read for so long and nobody wants any more.

        One of which a stream still brings parts stays until the next time.

        Raises:
            IntegrityError: Another content stands at an object's name.
        """
        for digest in self._context.staging.kept():
            if not self._context.is_wanted(digest):
                self._let_go(digest, idle_s)
        kept = set(self._context.staging.kept())
        self._index.forget_gone(lambda digest: digest in kept or self._context.store.has(digest))

    def _let_go(self, digest: bytes, idle_s: float) -> None:
        with self._lock:
            large = self._large.get(digest)
            if digest in self._opening or (large is not None and not large.let_go(idle_s)):
                return
            self._large.pop(digest, None)
            self._context.staging.remove(digest)
            waiters = self._whole_waiters.pop(digest, [])
        for done in waiters:
            done(NotFound(f"object {digest.hex()}: no image wants it any more"))

    # -- opening

    def _ask_instead(self, digest: bytes, size_bytes: int) -> None:
        """A layout that came was none: who has begun to wait meanwhile has it asked for."""
        with self._lock:
            self._opening_now.discard(digest)
            if not self._opening[digest]:
                del self._opening[digest]
                return
        asked_s = time.monotonic()
        self._context.pool.submit(lambda: self._open(digest, size_bytes, asked_s), Urgency.ON_DEMAND)

    def _open(self, digest: bytes, size_bytes: int, asked_s: float) -> None:
        with self._lock:
            if digest not in self._opening or digest in self._opening_now:
                return  # another thread was first
            self._opening_now.add(digest)
        result: Opened
        try:
            result = self._opened(digest, size_bytes, lambda: self._context.asking.layout(digest, size_bytes, asked_s))
        except GearError as exc:
            self._context.outcomes.note(digest, exc)
            result = exc
        except BaseException as exc:
            self._answer(digest, GearError(f"object {digest.hex()}: {exc!r}"))
            raise
        self._answer(digest, result)

    def _answer(self, digest: bytes, result: Opened) -> None:
        with self._lock:
            self._opening_now.discard(digest)
            waiters = self._opening.pop(digest)
            if isinstance(result, LargeObject):
                self._large[digest] = result
                if waiters:
                    result.last_read_s = time.monotonic()
        for done in waiters:
            done(result)

    def _opened(
        self, digest: bytes, size_bytes: int, get_layout: Callable[[], Sequence[Chunk] | None]
    ) -> LargeObject | File | None:
        """
        Args:
            digest: SHA-256 of the whole.
            size_bytes: Its size.
            get_layout: Gives a checked one, or None if it does not come in chunks; asked if none was kept here.
        """
        if self._context.store.has(digest):
            return File(self._context.store.open(digest))
        if digest in self._lied_about:
            return None
        layout = self._context.staging.layout(digest, size_bytes) or get_layout()
        if layout is None:
            return None
        file = self._context.staging.keep(digest, size_bytes, layout)
        self._index.note(digest, layout)
        return LargeObject(
            file,
            layout,
            self._context.pool,
            self._context.patience,
            find_chunk=lambda chunk: self._found(chunk, digest),
            fetch_chunk=self._context.asking.chunk,
            whole=lambda: self._whole(digest, file),
            failed=lambda error: self._context.outcomes.note(digest, error),
        )

    def _found(self, chunk: Chunk, of: bytes) -> bytes | None:
        data = self._index.find(chunk, of)
        self._context.outcomes.reused_bytes += len(data or b"")
        return data

    def _file(self, digest: bytes) -> File | None:
        """Of an object that is here or on its way."""
        try:
            return File(self._context.store.open(digest))
        except NotFound:
            return self._context.staging.open(digest)

    def _whole(self, digest: bytes, file: File) -> None:
        """All chunks are here; whatever comes of it, all who wait are told."""
        try:
            self._publish(digest, file)
        except GearError as exc:
            self._end(digest, exc)
        except OSError as exc:
            self._end(digest, from_os_error(exc, f"verify object {digest.hex()}"))
        except BaseException as exc:
            self._end(digest, GearError(f"object {digest.hex()}: {exc!r}"))
            raise
        else:
            self._end(digest, None)

    def _end(self, digest: bytes, error: GearError | None) -> None:
        """It is on its way no longer: it is whole, or breaks off."""
        with self._lock:
            large = self._large.pop(digest)
            waiters = self._whole_waiters.pop(digest, [])
            if error is not None:
                large.break_off(error)
        self._context.outcomes.note(digest, error)
        for done in waiters:
            done(error)

    def _publish(self, digest: bytes, file: File) -> None:
        """Make the file an object, if it is what it should be, and still wanted."""
        staging = self._context.staging
        try:
            verify_file(file.fd, digest)
            if self._context.is_wanted(digest) and self._context.store.adopt(
                file.fd, staging.fd, staging.name(digest), digest
            ):
                self._context.outcomes.objects += 1
        except IntegrityError as exc:
            self._context.outcomes.note_corrupt(exc)
            self._lied_about.add(digest)
            staging.remove(digest)
            raise
        staging.remove(digest)
