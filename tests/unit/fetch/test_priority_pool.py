"""PriorityPool: threads that run calls by priority."""

from __future__ import annotations

import threading

import pytest

from gearworkers.fetch.priority_pool import Priority, PriorityPool


@pytest.mark.parametrize("for_background", [0, 1])
def test_a_pool_of_one_thread_runs_calls_of_every_priority(for_background: int) -> None:
    pool = PriorityPool(1, for_background=for_background)
    done = {priority: threading.Event() for priority in Priority}
    for priority, event in done.items():
        pool.submit(event.set, priority)
    assert all(event.wait(20) for event in done.values())
    pool.close()
