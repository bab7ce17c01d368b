"""Objects are brought here: verified, once however many wait, what is read before what is prefetched.

Crash: leaves files in staging, which `prepare` of the next process removes or goes on with.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from gearworkers.errors import GearError, IntegrityError, NotFound, ResourceExhausted, from_os_error
from gearworkers.objects.ahead import Patience
from gearworkers.objects.large import File, LargeObject, checked_layout, layout_path, load_layout, save_layout
from gearworkers.objects.sources import Chunk, Source
from gearworkers.objects.store import ObjectStore, verify_file
from gearworkers.objects.workpool import Urgency, WorkPool

_log = structlog.get_logger(__name__)

_MOST_FAILURES = 1000
_READ_WRITE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC

Done = Callable[[GearError | None], None]
Opened = LargeObject | File | GearError | None
OpenDone = Callable[[Opened], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an object could not be had the last time somebody wanted it."""

    why: str
    when_s: float
    """Since the epoch."""


@dataclass(slots=True)
class FetchCounts:
    """Since the process began."""

    objects: int = 0
    received_bytes: int = 0
    failed: int = 0
    corrupt: int = 0
    """Objects, chunks and layouts that were not what they should be, from any source."""


@dataclass(slots=True)
class Job:
    """An object on its way as a whole."""

    digest: bytes
    size_bytes: int
    waiters: list[Done] = field(default_factory=list)
    asked_s: float = field(default_factory=time.monotonic)
    started: bool = False
    streamed: bool = False
    """A request for many is to bring it."""


class Fetcher:
    """Brings objects of one store from its sources; all methods from any thread.

    A layout that made up another object is never asked for again; such an object comes whole.

    Sources are asked in order. One that lacks an object, does not answer or gives wrong bytes is followed by the next.
    """

    def __init__(
        self, store: ObjectStore, staging: Path, sources: Sequence[Source], pool: WorkPool, *, large_bytes: int
    ) -> None:
        """
        Args:
            store: Where objects go.
            staging: A directory of this process's own, on the store's file system.
            sources: The nearest first.
            pool: Where the work is done.
            large_bytes: From this size on an object comes by chunks, if its source keeps it so.
        """
        self._store = store
        self._staging = staging
        self._sources = sources
        self._pool = pool
        self._patience = Patience()
        self._large_bytes = large_bytes
        self._lock = threading.Lock()
        self._jobs: dict[bytes, Job] = {}
        self._large: dict[bytes, LargeObject] = {}
        self._opening: dict[bytes, list[OpenDone]] = {}
        self._opening_now: set[bytes] = set()
        self._lied_about: set[bytes] = set()
        self._whole_waiters: dict[bytes, list[Done]] = {}
        self._away: tuple[float, GearError] | None = None
        self._staging_fd = -1
        self.failures: dict[bytes, Failure] = {}
        self.counts = FetchCounts()

    def prepare(self) -> None:
        """Make staging; remove what a crash left there, but for large objects on their way.

        Raises:
            GearError: It cannot be used.
        """
        try:
            self._staging.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._staging.iterdir():
                if path.suffix != ".layout" and not layout_path(path).exists():
                    path.unlink()
            self._staging_fd = os.open(self._staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise from_os_error(exc, f"prepare {self._staging}") from exc

    # -- what is asked

    def fetch(self, digest: bytes, size_bytes: int, urgency: Urgency, done: Done) -> None:
        """Have the object in the store; *done* is called once, with None or what went wrong, now or later.

        Raises:
            IntegrityError: Another content stands at its name.
        """
        if self._store.has(digest):
            done(None)
        elif size_bytes >= self._large_bytes:
            job = Job(digest, size_bytes)
            self.open_large(digest, size_bytes, urgency, lambda opened: self._fill(job, opened, urgency, done))
        else:
            self.fetch_whole(digest, size_bytes, urgency, done)

    def open_large(self, digest: bytes, size_bytes: int, urgency: Urgency, done: OpenDone) -> None:
        """Have a large object ready to be read while it arrives.

        Args:
            digest: SHA-256 of the whole.
            size_bytes: Its size.
            urgency: Of asking for its layout.
            done: Called once, now or later: with the object, arriving or here; with None if no source keeps it in
                chunks; or with what went wrong.
        """
        with self._lock:
            large = self._large.get(digest)
            if large is None:
                waiters = self._opening.setdefault(digest, [])
                waiters.append(done)
                if len(waiters) == 1 or urgency is Urgency.ON_DEMAND:
                    self._pool.submit(lambda: self._open_large(digest, size_bytes), urgency)
        if large is not None:
            large.last_read_s = time.monotonic()
            done(large)

    def fill_idle(self, idle_s: float) -> None:
        """Have the rest fetched of the large objects that nobody has read for so long."""
        before_s = time.monotonic() - idle_s
        with self._lock:
            idle = [large for large in self._large.values() if large.last_read_s <= before_s]
        for large in idle:
            large.fill()

    @property
    def arriving(self) -> int:
        """How many objects are on their way, those that are only held ready not counted."""
        return len(self._jobs) + sum(large.last_read_s < math.inf for large in tuple(self._large.values()))

    def forget_unwanted(self, is_wanted: Callable[[bytes], bool]) -> None:
        """Let go of the parts of large objects that nobody reads and, given their digest, no image wants any more."""
        with self._lock:
            held = {digest.hex(): large for digest, large in self._large.items()}
            opening = {digest.hex() for digest in self._opening}
        for path in self._staging.glob(layout_path(Path("*")).name):
            name = path.stem
            large = held.get(name)
            if name in opening or (large is not None and large.last_read_s < math.inf):
                continue
            if not is_wanted(bytes.fromhex(name)):
                with self._lock:
                    self._large.pop(bytes.fromhex(name), None)
                path.with_suffix("").unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    # -- whole objects

    def fetch_whole(self, digest: bytes, size_bytes: int, urgency: Urgency, done: Done) -> None:
        """As `fetch`, in one piece however large it is."""
        with self._lock:
            job = self._jobs.get(digest)
            if job is None:
                job = self._jobs[digest] = Job(digest, size_bytes)
                self._pool.submit(partial(self._run, job), urgency)
            elif urgency is Urgency.ON_DEMAND and job.streamed:
                self._patience.then(lambda: self._hurry(job))
            elif urgency is Urgency.ON_DEMAND and not job.started:
                self._pool.submit(partial(self._run, job), urgency)
            job.waiters.append(done)

    def _hurry(self, job: Job) -> None:
        """Who waits for a stream has waited long enough."""
        with self._lock:
            if self._jobs.get(job.digest) is job and not job.started:
                self._pool.submit(partial(self._run, job), Urgency.ON_DEMAND)

    def _run(self, job: Job) -> None:
        if not self._start(job):
            return
        try:
            if not self._store.has(job.digest):
                self._give_up_if_away(job.asked_s)
                self._from_any(lambda source: self._store_pieces(job, source.fetch(job.digest)), job.digest)
        except GearError as exc:
            self._finish(job, exc)
        except BaseException as exc:
            self._finish(job, GearError(f"object {job.digest.hex()}: {exc!r}"))
            raise
        else:
            self._finish(job, None)

    def _start(self, job: Job) -> bool:
        """Whether it is the caller who does it."""
        with self._lock:
            if job.started:
                return False
            job.started = True
            return True

    def _store_pieces(self, job: Job, pieces: Iterable[bytes]) -> None:
        """Store what *pieces* bring, if it is what was asked for."""
        hasher = hashlib.sha256()
        received_bytes = 0
        with self._store.create(self._staging_fd) as pending:
            for piece in pieces:
                received_bytes += len(piece)
                if received_bytes > job.size_bytes:
                    break
                hasher.update(piece)
                pending.write(memoryview(piece))
            self.counts.received_bytes += received_bytes
            if received_bytes != job.size_bytes or hasher.digest() != job.digest:
                raise IntegrityError(
                    f"object {job.digest.hex()}: {received_bytes} bytes with SHA-256 {hasher.hexdigest()} came, "
                    f"{job.size_bytes} bytes were expected"
                )
            if pending.publish(job.digest):
                self.counts.objects += 1

    def _finish(self, job: Job, error: GearError | None) -> None:
        """The first to finish it tells; a stream and a fetch of its own may both bring it."""
        with self._lock:
            if self._jobs.get(job.digest) is not job:
                return
            del self._jobs[job.digest]
            waiters = job.waiters
        self._note(job.digest, error)
        for done in waiters:
            done(error)

    # -- what requests for many bring (`objects.prefetch`)

    def claim(self, digest: bytes, size_bytes: int) -> Job | None:
        """A job for who asks, if the object is neither here nor on its way; `stored` or `unclaim` follows."""
        if self.is_here(digest):
            return None
        with self._lock:
            if digest in self._jobs:
                return None
            job = self._jobs[digest] = Job(digest, size_bytes, streamed=True)
            return job

    def stored(self, job: Job, content: bytes) -> bool:
        """Whether *content* is what the job wants; then it is done, for all who wait.

        Raises:
            ResourceExhausted: There is no room.
        """
        try:
            self._store_pieces(job, (content,))
        except IntegrityError as exc:
            self._tell_corrupt(exc)
            return False
        except ResourceExhausted:
            raise
        except GearError as exc:
            self._finish(job, exc)
        else:
            self._finish(job, None)
        return True

    def unclaim(self, job: Job, *, must_come: bool) -> None:
        """It has not come; it is fetched alone if somebody waits for it, or if it must come."""
        with self._lock:
            job.streamed = False
            if self._jobs.get(job.digest) is not job or job.started:
                return
            if job.waiters or must_come:
                urgency = Urgency.ON_DEMAND if job.waiters else Urgency.BACKGROUND
                self._pool.submit(partial(self._run, job), urgency)
            else:
                del self._jobs[job.digest]

    def is_here(self, digest: bytes) -> bool:
        """Whether nothing is to be fetched; also true where something else stands at its name."""
        try:
            return self._store.has(digest)
        except GearError as exc:
            _log.error("an object cannot be looked at", error=str(exc))
            return True

    def large(self, digest: bytes) -> LargeObject | None:
        """The large object, if it is on its way."""
        return self._large.get(digest)

    def adopt_layout(self, digest: bytes, size_bytes: int, layout: Sequence[Chunk]) -> None:
        """A large object can be read from now on; nobody has asked for it yet."""
        with self._lock:
            if digest in self._large or digest in self._opening:
                return
        try:
            opened = self._opened(digest, size_bytes, checked_layout(layout, size_bytes))
        except IntegrityError as exc:
            self._tell_corrupt(exc)
        except GearError as exc:
            _log.warning("a large object could not be prepared", error=str(exc))
        else:
            if isinstance(opened, LargeObject):
                with self._lock:
                    self._large.setdefault(digest, opened)

    # -- large objects

    def _open_large(self, digest: bytes, size_bytes: int) -> None:
        with self._lock:
            if digest not in self._opening or digest in self._opening_now:
                return  # another thread was first
            self._opening_now.add(digest)
        result: Opened
        try:
            result = self._opened(digest, size_bytes)
        except GearError as exc:
            self._note(digest, exc)
            result = exc
        except BaseException as exc:
            self._answer_opening(digest, GearError(f"object {digest.hex()}: {exc!r}"))
            raise
        self._answer_opening(digest, result)

    def _answer_opening(self, digest: bytes, result: Opened) -> None:
        with self._lock:
            if isinstance(result, LargeObject):
                result = self._large.setdefault(digest, result)
                result.last_read_s = time.monotonic()
            self._opening_now.discard(digest)
            waiters = self._opening.pop(digest, [])
        for done in waiters:
            done(result)

    def _opened(
        self, digest: bytes, size_bytes: int, layout: Sequence[Chunk] | None = None
    ) -> LargeObject | File | None:
        """
        Args:
            layout: As it has come already.
        """
        if self._store.has(digest):
            return File(self._store.open(digest))
        if digest in self._lied_about:
            return None
        path = self._staging / digest.hex()
        layout = load_layout(path, size_bytes) or layout or self._layout(digest, size_bytes)
        if layout is None:
            return None
        try:
            save_layout(path, layout)
            file = File(os.open(path, _READ_WRITE, 0o400))
            os.ftruncate(file.fd, size_bytes)
        except OSError as exc:
            raise from_os_error(exc, f"keep object {digest.hex()}") from exc
        return LargeObject(file, layout, self._pool, self._patience, self._chunk, lambda: self._whole(digest, file))

    def _layout(self, digest: bytes, size_bytes: int) -> Sequence[Chunk] | None:
        """From the first source that has one."""
        unanswered: GearError | None = None
        for source in self._sources:
            try:
                layout = source.layout(digest)
                if layout is not None:
                    return checked_layout(layout, size_bytes)
            except IntegrityError as exc:
                self._tell_corrupt(exc)
            except GearError as exc:
                unanswered = exc
        if unanswered is not None:
            raise unanswered
        return None

    def _chunk(self, chunk: Chunk, asked_s: float) -> bytes:
        self._give_up_if_away(asked_s)

        def verified(source: Source) -> bytes:
            data = source.chunk(chunk.digest)
            self.counts.received_bytes += len(data)
            if len(data) != chunk.size_bytes or hashlib.sha256(data).digest() != chunk.digest:
                raise IntegrityError(f"chunk {chunk.digest.hex()}: {len(data)} bytes of another content came")
            return data

        return self._from_any(verified, chunk.digest)

    def _whole(self, digest: bytes, file: File) -> None:
        """All chunks are here: verify, publish."""
        error: GearError | None = None
        path = self._staging / digest.hex()
        try:
            verify_file(file.fd, digest)
            if not self._store.adopt(file.fd, self._staging_fd, os.fsencode(path.name), digest):
                path.unlink()
            self.counts.objects += 1
        except IntegrityError as exc:
            self._tell_corrupt(exc)
            error = exc
            self._lied_about.add(digest)
            path.unlink()
        except GearError as exc:
            error = exc
        layout_path(path).unlink(missing_ok=True)
        with self._lock:
            large = self._large.pop(digest, None)
            waiters = self._whole_waiters.pop(digest, [])
        if error is not None and large is not None:
            large.break_off(error)
        self._note(digest, error)
        for done in waiters:
            done(error)

    def _fill(self, job: Job, opened: Opened, urgency: Urgency, done: Done) -> None:
        """Go on with `fetch` of a large object, now that it is known how it comes."""
        if isinstance(opened, GearError):
            done(opened)
        elif isinstance(opened, File):
            done(None)
        elif opened is None:
            self.fetch_whole(job.digest, job.size_bytes, urgency, done)
        else:
            with self._lock:
                is_coming = self._large.get(job.digest) is opened
                if is_coming:
                    self._whole_waiters.setdefault(job.digest, []).append(done)
            if is_coming:
                opened.fill()
            else:
                done(None)

    # -- sources

    def _from_any(self, ask: Callable[[Source], T], digest: bytes) -> T:
        """What the first source gives that has it right."""
        errors: list[GearError] = []
        for source in self._sources:
            try:
                found = ask(source)
            except IntegrityError as exc:
                self._tell_corrupt(exc)
                errors.append(exc)
            except NotFound:
                continue
            except GearError as exc:
                errors.append(exc)
            else:
                self._away = None
                return found
        if not errors:
            raise NotFound(f"{digest.hex()}: none of the {len(self._sources)} sources has it")
        if errors[-1].retryable:
            self._away = (time.monotonic(), errors[-1])
        raise errors[-1]

    def _give_up_if_away(self, asked_s: float) -> None:
        """Fail at once if a source was found unavailable after this was asked for: one wait is enough for all.

        Without it a queue of readers would wait one after the other for a remote that is away.
        """
        away = self._away
        if away is not None and away[0] > asked_s:
            raise away[1]

    def _note(self, digest: bytes, error: GearError | None) -> None:
        """Keep for `gear status` what failed, until it works."""
        if error is None:
            self.failures.pop(digest, None)
            return
        self.counts.failed += 1
        _log.error("an object could not be fetched", object=digest.hex(), error=str(error))
        with self._lock:
            self.failures.pop(digest, None)
            if len(self.failures) >= _MOST_FAILURES:
                del self.failures[next(iter(self.failures))]
            self.failures[digest] = Failure(str(error), time.time())

    def _tell_corrupt(self, error: GearError) -> None:
        self.counts.corrupt += 1
        _log.error("a source gave wrong bytes", error=str(error))
