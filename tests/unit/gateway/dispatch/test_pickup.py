"""The choice between the workers and the gateway's own pool for each job, and the reports in status and metrics."""

from __future__ import annotations

import errno
import http.client
import os
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gearworkers.settings import Settings
from gearworkers.workers.claim import ClaimedJob
from gearworkers.workers.messages import ApplyDiff
from plugin_gateway.dispatch.pending_job import PendingJob
from tests.support.gateway_jobs import BEGUN, LONG, SHORT, Start, published, work
from tests.support.plugin import read_metrics
from tests.support.processes import wait_until

pytestmark = pytest.mark.slow


def test_the_gateway_does_the_jobs_and_reports_it_while_redis_does_not_answer(start: Start) -> None:
    running, plugin = start()
    assert plugin.status()["Degraded"] == "no"
    running.queue.accepts = False
    assert plugin.apply_diff("a", [b"abc"]) == (200, {"Size": 3})
    status = plugin.status()
    assert "Redis does not answer" in status["Degraded"] and status["Queue"] == "Redis does not answer"
    assert b'gear_orders_total{by="gateway",call="apply_diff"} 1.0' in running.metrics.text()
    assert b"gear_degraded 1.0" in running.metrics.text()
    running.queue.accepts = True
    assert plugin.apply_diff("a", [b"abc"]) == (200, {"Size": 3})
    assert "import" not in plugin.status()["Degraded"]


def test_status_and_metrics_report_missing_redis_and_workers_before_the_first_job(
    start: Start, settings: Settings
) -> None:
    running, plugin = start()
    metrics = partial(read_metrics, Path(settings.effective_metrics_listen))
    running.queue.accepts = False
    # The collection that the start has queued may be accepted just after the first check, which makes push available.
    both = "yes: import: Redis does not answer; push: Redis does not answer"
    wait_until(lambda: plugin.status()["Degraded"] == both, "both kinds of workers are reported")
    running.queue.accepts = True
    assert plugin.status()["Degraded"] == "no"
    running.queue.silent = frozenset({"import"})
    assert b"gear_degraded 1.0" in metrics()
    assert plugin.status()["Degraded"] == "yes: import: no worker answers"
    running.queue.silent = frozenset()
    assert b"gear_degraded 0.0" in metrics()


def test_the_gateway_does_a_job_that_no_worker_takes_and_waits_less_for_the_next_job(start: Start) -> None:
    _, plugin = start(workers=0)
    begun_s = time.monotonic()
    assert plugin.apply_diff("a", [b"abc"]) == (200, {"Size": 3})
    assert time.monotonic() - begun_s >= SHORT.idle_s
    assert "no worker takes tasks" in plugin.status()["Degraded"], "though the workers answer"

    def took_s() -> float:
        begun_s = time.monotonic()
        assert plugin.apply_diff("b", [b"abc"]) == (200, {"Size": 3})
        return time.monotonic() - begun_s

    wait_until(lambda: took_s() < SHORT.idle_s, "a call waits less")


class BrokenPool:
    """A pool that cannot start a process."""

    async def run(self, pending: PendingJob) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def close(self) -> None:
        """End nothing."""


def test_the_error_says_why_and_what_to_do_when_no_process_can_begin_the_call(start: Start) -> None:
    _, plugin = start(workers=0, pool=BrokenPool())
    status, answer = plugin.apply_diff("a", [b"abc"])
    assert status == 500 and answer["Err"].startswith("apply_diff a: no worker took it")
    assert "Resource temporarily unavailable" in answer["Err"] and answer["Err"].endswith("try again")


def test_a_late_claim_is_refused(start: Start) -> None:
    running, plugin = start(workers=0)
    assert plugin.apply_diff("a", [b"abc"]) == (200, {"Size": 3})
    (late,) = published(running, ApplyDiff)
    assert running.queue.take(late) is False


def test_a_call_waits_longer_for_a_busy_worker_than_for_an_absent_one(start: Start) -> None:
    go = threading.Event()

    def work_slowly(claimed: ClaimedJob) -> None:
        assert claimed.job.id != "slow" or go.wait(60)
        work(claimed)

    running, plugin = start(work_slowly, workers=1)
    slow = plugin.begin_apply("slow", BEGUN)
    wait_until(lambda: plugin.status()["At Work"].startswith("1 by worker"), "the worker is busy")
    running.dispatcher.timeouts = SHORT
    begun_s = time.monotonic()
    assert plugin.apply_diff("b", [b"abc"]) == (200, {"Size": 3})
    assert time.monotonic() - begun_s >= SHORT.busy_s
    assert "import" not in plugin.status()["Degraded"]
    assert b'gear_orders_total{by="gateway",call="apply_diff"} 1.0' in running.metrics.text()
    go.set()
    slow.sendall(b"0\r\n\r\n")
    assert slow.recv(100).startswith(b"HTTP/1.1 200")
    slow.close()


@pytest.mark.parametrize("call", ["apply_diff", "diff"])
@pytest.mark.slow
def test_the_pool_replaces_a_worker_at_once_when_its_caller_stalls(start: Start, call: str) -> None:
    running, plugin = start(workers=1)
    slow = plugin.begin_apply("slow", BEGUN) if call == "apply_diff" else plugin.begin("Diff", str(64 << 20))
    wait_until(lambda: "; 1 wait for their callers" in plugin.status()["At Work"], "the worker waits")
    assert b'gear_orders_stalled{by="worker"} 1.0' in running.metrics.text()
    running.dispatcher.timeouts = replace(LONG, degraded_s=SHORT.degraded_s)
    assert plugin.apply_diff("b", [b"abc"]) == (200, {"Size": 3})
    assert plugin.diff("1000") == (200, bytes(1000))
    assert "import" not in plugin.status()["Degraded"]
    assert b'gear_orders_total{by="gateway",call="apply_diff"} 1.0' in running.metrics.text()
    if call == "apply_diff":
        slow.sendall(b"0\r\n\r\n")
    answer = http.client.HTTPResponse(slow)
    answer.begin()
    assert answer.status == 200
    assert answer.read() == (b'{"Size":%d}' % len(BEGUN) if call == "apply_diff" else bytes(64 << 20))
    answer.close()
    slow.close()
    assert "wait" not in plugin.status()["At Work"]


def test_a_waiting_call_gets_the_next_free_worker(start: Start) -> None:
    running, plugin = start(workers=1)
    slow = plugin.begin_apply("slow", BEGUN)
    wait_until(lambda: plugin.status()["At Work"].startswith("1 by worker"), "the worker is busy")
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(plugin.apply_diff("b", [b"abc"])))
    waiting.start()
    wait_until(lambda: any(job.id == "b" for job in running.queue.jobs), "the second is published")
    slow.sendall(b"0\r\n\r\n")
    waiting.join()
    slow.close()
    assert answers == [(200, {"Size": 3})]
    assert b'gear_orders_total{by="worker",call="apply_diff"} 2.0' in running.metrics.text()
