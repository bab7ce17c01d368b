"""The states of a job: it begins at most once, and each job ends with a result or is withdrawn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from gearworkers.workers.messages import ApplyDiff, Claim, JobResult
from plugin_gateway.dispatch.pending_job import JobState, PendingJob

CLAIM = Claim("token", "worker", 7)
RESULT = JobResult(size_bytes=3)
Transition: TypeAlias = Callable[[PendingJob], bool]
TRANSITIONS: dict[str, Transition] = {
    "claim": PendingJob.claim,
    "release": PendingJob.release,
    "begin": lambda pending: pending.begin(CLAIM),
    "finish": lambda pending: pending.finish(RESULT),
    "lose": PendingJob.lose,
    "give_up": lambda pending: pending.give_up("no worker took it"),
    "withdraw": PendingJob.withdraw,
}


def offered(changed: Callable[[], None] = lambda: None) -> PendingJob:
    return PendingJob(ApplyDiff(gear_root="/gear", token="token", id="a"), None, None, changed)


def after(*names: str) -> PendingJob:
    """Return a job after these transitions."""
    pending = offered()
    for name in names:
        assert TRANSITIONS[name](pending), name
    return pending


def allowed(pending: PendingJob) -> set[str]:
    """Return the names of the transitions that the state allows."""
    names = set()
    for name, transition in TRANSITIONS.items():
        copy = offered()
        copy.__dict__.update(pending.__dict__)
        if transition(copy):
            names.add(name)
    return names


def test_each_state_allows_its_transitions_and_no_others() -> None:
    assert allowed(after()) == {"claim", "give_up", "withdraw"}
    assert allowed(after("claim")) == {"release", "begin", "withdraw"}
    assert allowed(after("claim", "begin")) == {"finish", "lose", "withdraw"}
    for ended in (("give_up",), ("claim", "begin", "finish"), ("claim", "begin", "lose")):
        assert allowed(after(*ended)) == set()
    assert allowed(after("withdraw")) == set()


def test_a_released_job_can_be_claimed_by_another_process() -> None:
    pending = after("claim", "release", "claim", "begin", "finish")
    assert (pending.state, pending.by, pending.result) == (JobState.DONE, "worker", RESULT)


def test_a_process_that_dies_after_the_begin_leaves_a_retryable_error_that_names_it() -> None:
    result = after("claim", "begin", "lose").result
    assert result.retryable and "apply_diff a: the worker's process 7 died during the call" in result.error


def test_a_job_that_no_process_begins_ends_with_the_reason() -> None:
    result = after("give_up").result
    assert (result.error, result.retryable) == ("apply_diff a: no worker took it", True)


@given(st.lists(st.sampled_from(sorted(TRANSITIONS)), max_size=30))
def test_a_job_begins_and_ends_at_most_once_in_any_order_of_transitions(names: list[str]) -> None:
    changes: list[None] = []
    pending = offered(lambda: changes.append(None))
    done = [name for name in names if TRANSITIONS[name](pending)]
    assert done.count("begin") <= 1
    assert sum(name in ("finish", "lose", "give_up", "withdraw") for name in done) <= 1
    assert pending.has_begun == ("begin" in done)
    assert len(changes) == len(done)


def test_a_waiting_caller_wakes_with_the_result() -> None:
    async def wait() -> JobResult:
        pending = after("claim", "begin")
        asyncio.get_running_loop().call_soon(pending.finish, RESULT)
        await pending.wait_done()
        return pending.result

    assert asyncio.run(wait()) == RESULT
