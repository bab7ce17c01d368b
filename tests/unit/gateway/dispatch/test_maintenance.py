"""Maintenance jobs that calls make due: garbage collection, deduplication and push."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gearworkers.settings import Settings
from gearworkers.workers.claim import ClaimedJob
from gearworkers.workers.messages import CollectGarbage, Dedupe, JobResult, Push
from tests.support.gateway_jobs import LONG, Start, published
from tests.support.gateways import run_gateway
from tests.support.processes import wait_until


def test_garbage_is_collected_at_the_start(start: Start) -> None:
    running, _ = start()
    wait_until(lambda: bool(published(running, CollectGarbage)), "garbage collection")


def test_a_finished_snapshot_is_deduplicated_after_its_diff_and_unmount(start: Start) -> None:
    running, plugin = start()
    running.driver.layers["5"] = ""
    running.driver.dedupable.add("5")
    plugin.call("Get", ID="5")
    assert plugin.diff("5") == (200, bytes(5))
    assert not published(running, Dedupe)
    plugin.call("Put", ID="5")
    wait_until(lambda: [job.id for job in published(running, Dedupe)] == ["5"], "deduplication")


@pytest.mark.slow
def test_metrics_count_the_objects_of_a_push(settings: Settings) -> None:
    def push(claimed: ClaimedJob) -> None:
        figures = {"pushed_objects": 3, "refused_objects": 1} if isinstance(claimed.job, Push) else {}
        claimed.finish(JobResult(figures=figures))

    running = run_gateway(
        replace(settings, remote=replace(settings.remote, url="/remote")), push, workers=1, timeouts=LONG
    )
    text = running.metrics.text
    figures = (b"gear_pushed_objects_total 3.0", b"gear_push_refused_objects 1.0")
    wait_until(lambda: all(figure in text() for figure in figures), "the push at the start")
    running.stop()
