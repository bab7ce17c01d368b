"""Objects that come whole, each once however many wait for it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import structlog

from gearworkers.errors import GearError, IntegrityError, ResourceExhausted
from gearworkers.fetch.context import FetchContext
from gearworkers.fetch.priority_pool import Urgency

_log = structlog.get_logger(__name__)

Done = Callable[[GearError | None], None]
"""Called once, with None or what went wrong."""


@dataclass(slots=True)
class Job:
    """An object on its way."""

    digest: bytes
    size_bytes: int
    waiters: list[Done] = field(default_factory=list)
    asked_s: float = field(default_factory=time.monotonic)
    """When it was begun, or when somebody asked last who waits for it: what was away before may be back."""
    started: bool = False
    streamed: bool = False
    """A request for many is to bring it."""
    must_come: bool = False
    """It is fetched alone if that request does not bring it, also if nobody waits for it."""


class WholeObjects:
    """Brings them; all methods from any thread, and only `stored` blocks."""

    def __init__(self, context: FetchContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._jobs: dict[bytes, Job] = {}

    def __len__(self) -> int:
        """How many are on their way."""
        return len(self._jobs)

    def is_here(self, digest: bytes) -> bool:
        """Whether nothing is to be fetched; also true where something else stands at its name."""
        try:
            return self._context.store.has(digest)
        except GearError as exc:
            _log.error("an object cannot be looked at", error=str(exc))
            return True

    def fetch(self, digest: bytes, size_bytes: int, urgency: Urgency, done: Done) -> None:
        """Have the object in the store, in one piece however large it is; *done* is told, now or later."""
        with self._lock:
            job = self._jobs.get(digest)
            if job is None:
                job = self._jobs[digest] = Job(digest, size_bytes)
                self._context.pool.submit(partial(self._run, job), urgency)
            elif urgency is Urgency.ON_DEMAND and not job.started:
                job.asked_s = time.monotonic()
                if job.streamed:
                    self._context.patience.then(lambda: self._hurry(job))
                else:
                    self._context.pool.submit(partial(self._run, job), urgency)
            job.waiters.append(done)

    # -- what requests for many bring (`fetch.prefetch`)

    def claim(self, digest: bytes, size_bytes: int, *, must_come: bool) -> Job | None:
        """A job for who asks, if the object is neither here nor on its way; `stored` or `unclaim` follows.

        Args:
            digest: SHA-256 of the object.
            size_bytes: Its size.
            must_come: Whether it is fetched alone if no request for many brings it, whoever has claimed it.
        """
        if self.is_here(digest):
            return None
        with self._lock:
            job = self._jobs.get(digest)
            if job is not None:
                job.must_come = job.must_come or must_come
                return None
            job = self._jobs[digest] = Job(digest, size_bytes, streamed=True, must_come=must_come)
            return job

    def stored(self, job: Job, content: bytes) -> bool:
        """Whether *content* is what the job wants; then it is done, for all who wait.

        Raises:
            ResourceExhausted: There is no room.
        """
        try:
            self._store_pieces(job, (content,))
        except IntegrityError as exc:
            self._context.outcomes.note_corrupt(exc)
            return False
        except ResourceExhausted:
            raise
        except GearError as exc:
            self._finish(job, exc)
        else:
            self._finish(job, None)
        return True

    def unclaim(self, job: Job) -> None:
        """It has not come; it is fetched alone if somebody waits for it, or if it must come."""
        with self._lock:
            job.streamed = False
            if self._jobs.get(job.digest) is not job or job.started:
                return
            if job.waiters or job.must_come:
                urgency = Urgency.ON_DEMAND if job.waiters else Urgency.BACKGROUND
                self._context.pool.submit(partial(self._run, job), urgency)
            else:
                del self._jobs[job.digest]

    # -- one job

    def _hurry(self, job: Job) -> None:
        """Who waits for a stream has waited long enough."""
        with self._lock:
            if self._jobs.get(job.digest) is job and not job.started:
                self._context.pool.submit(partial(self._run, job), Urgency.ON_DEMAND)

    def _run(self, job: Job) -> None:
        if not self._start(job):
            return
        try:
            if not self._context.store.has(job.digest):
                self._context.asking.first(
                    lambda source: self._store_pieces(job, source.fetch(job.digest)), job.digest, job.asked_s
                )
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
        """Store what *pieces* bring, if it is what was asked for, and still wanted."""
        hasher = hashlib.sha256()
        received_bytes = 0
        with self._context.store.create(self._context.staging.fd) as pending:
            for piece in pieces:
                received_bytes += len(piece)
                if received_bytes > job.size_bytes:
                    break
                hasher.update(piece)
                pending.write(memoryview(piece))
            self._context.outcomes.received_bytes += received_bytes
            if received_bytes != job.size_bytes or hasher.digest() != job.digest:
                raise IntegrityError(
                    f"object {job.digest.hex()}: {received_bytes} bytes with SHA-256 {hasher.hexdigest()} came, "
                    f"{job.size_bytes} bytes were expected"
                )
            if self._context.is_wanted(job.digest) and pending.publish(job.digest):
                self._context.outcomes.objects += 1

    def _finish(self, job: Job, error: GearError | None) -> None:
        """The first to finish it tells; a stream and a fetch of its own may both bring it."""
        with self._lock:
            if self._jobs.get(job.digest) is not job:
                return
            del self._jobs[job.digest]
            waiters = job.waiters
        self._context.outcomes.note(job.digest, error)
        for done in waiters:
            done(error)
