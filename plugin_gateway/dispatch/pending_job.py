"""The states of a job at the gateway. This module has all rules for the beginning of a job.

::

    OFFERED --claim--> CLAIMED --begin--> BEGUN --finish, lose--> DONE
       |  <--release--    |                 |
       |                  |                 |
       +-----------------withdraw-----------+---> WITHDRAWN
       +--give_up--> DONE

========= ================ =============================================================================
method    from             when
========= ================ =============================================================================
claim     OFFERED          A process presents the job's token.
release   CLAIMED          The process died, or did not receive the grant: another process may claim the job.
begin     CLAIMED          The process has the grant. No other process ever gets the job.
finish    BEGUN            The process reports a result.
lose      BEGUN            The process ends without a result: an error, and its layer is unfinished.
give_up   OFFERED          Neither a worker nor the gateway's own pool has begun the job: an error.
withdraw  any but DONE     The gateway stops waiting, and refuses later claims.
========= ================ =============================================================================

A method called in any other state changes nothing and returns False. So a job begins at most once, whatever the order
in which workers, the gateway's pool and the caller act.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable

from gearworkers.workers.messages import ByteStream, Claim, Claimant, HeavyJob, JobResult, Progress, WorkerJob


class JobState(enum.Enum):
    """A job's state; the module's docstring has the transitions."""

    OFFERED = enum.auto()
    CLAIMED = enum.auto()
    BEGUN = enum.auto()
    DONE = enum.auto()
    WITHDRAWN = enum.auto()


class PendingJob:
    """One job, from its offer to its end.

    Args:
        job: The work.
        stream: The bytes that it reads or writes.
        fd: The stream's descriptor, open until the job is done or withdrawn; None if it has none.
        changed: Called after each change.
    """

    def __init__(self, job: WorkerJob, stream: ByteStream, fd: int | None, changed: Callable[[], None]) -> None:
        self.job = job
        self.stream = stream
        self.fd = fd
        self.state = JobState.OFFERED
        self.progress = Progress()
        self.result = JobResult()
        """Valid once the job is DONE."""
        self._changed = changed
        self._claim: Claim | None = None
        self._done = asyncio.Event()

    # -- transitions

    def claim(self) -> bool:
        """Reserve the job for one process."""
        return self._move(JobState.OFFERED, JobState.CLAIMED)

    def release(self) -> bool:
        """Offer the job again: the process that claimed it did not receive the grant."""
        return self._move(JobState.CLAIMED, JobState.OFFERED)

    def begin(self, claim: Claim) -> bool:
        """Record that the process with *claim* has the grant."""
        if self.state is JobState.CLAIMED:
            self._claim = claim
        return self._move(JobState.CLAIMED, JobState.BEGUN)

    def finish(self, result: JobResult) -> bool:
        """Record the result from the process that has begun the job."""
        return self._end(JobState.BEGUN, result)

    def lose(self) -> bool:
        """Record that the process that had begun the job ended without a result."""
        if self._claim is None:
            return False
        error = f"the {self._claim.by}'s process {self._claim.pid} died during the call; no partial result is visible"
        return self._end(JobState.BEGUN, JobResult(f"{self.name}: {error}; try again", retryable=True))

    def give_up(self, error: str) -> bool:
        """Record that no process has begun the job; *error* gives the reason."""
        return self._end(JobState.OFFERED, JobResult(f"{self.name}: {error}", retryable=True))

    def withdraw(self) -> bool:
        """Withdraw the job: no process may begin it any more."""
        ended = self.state in (JobState.DONE, JobState.WITHDRAWN)
        return not ended and self._move(self.state, JobState.WITHDRAWN)

    def _end(self, source: JobState, result: JobResult) -> bool:
        if self.state is source:
            self.result = result
            self._done.set()
        return self._move(source, JobState.DONE)

    def _move(self, source: JobState, target: JobState) -> bool:
        if self.state is not source:
            return False
        self.state = target
        self._changed()
        return True

    # -- views

    async def wait_done(self) -> None:
        """Return when the job is DONE."""
        await self._done.wait()

    @property
    def awaits_begin(self) -> bool:
        """Whether a process has yet to begin the job."""
        return self.state in (JobState.OFFERED, JobState.CLAIMED)

    @property
    def has_begun(self) -> bool:
        """Whether a process has begun the job."""
        return self._claim is not None

    @property
    def by(self) -> Claimant | None:
        """The kind of the process that has begun the job."""
        return self._claim.by if self._claim is not None else None

    @property
    def is_heavy(self) -> bool:
        """Whether a caller waits for the job."""
        return isinstance(self.job, HeavyJob)

    @property
    def name(self) -> str:
        """The call and its layer, for error messages."""
        return f"{self.job.call} {self.job.id}".rstrip()
