"""Every call over the real socket: responses, errors, and the processes that do the heavy calls."""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gearworkers.errors import FailedPrecondition, GearError, IntegrityError, InvalidInput
from gearworkers.settings import Settings
from gearworkers.util.unix_http import UnixHTTPConnection
from gearworkers.workers.claim import ClaimedJob
from gearworkers.workers.messages import CHUNKED, ApplyDiff, CollectGarbage, Dedupe, Diff, JobResult, Push
from plugin_gateway.dispatch.dispatcher import Dispatcher, PickupTimeouts
from plugin_gateway.dispatch.pending_job import PendingJob
from plugin_gateway.dispatch.task_queue import TaskQueue
from plugin_gateway.gateway import Gateway
from plugin_gateway.graphdriver.connection import DockerConnection, is_body_complete
from plugin_gateway.metrics import GatewayMetrics
from plugin_gateway.sockets import listen
from tests.support.gateways import MemoryDriver, Running, Work, run_gateway
from tests.support.plugin import TIMEOUT_S, Plugin, read_metrics
from tests.support.processes import wait_until

Start = Callable[..., tuple[Running, Plugin]]
LONG = PickupTimeouts(idle_s=60.0, degraded_s=60.0, busy_s=60.0, maintenance_s=60.0)
"""For workers that take every job, perhaps late on a busy machine."""
SHORT = PickupTimeouts(idle_s=0.3, degraded_s=0.05, busy_s=0.5, maintenance_s=0.3)
"""For tests without a free worker."""
BEGUN = bytes(64 << 10)
"""More bytes of a body than the gateway waits for."""


def work(claimed: ClaimedJob) -> None:
    """Do a job without layers: ApplyDiff counts bytes, Diff writes as many bytes as the id says."""
    try:
        claimed.finish(result_of(claimed))
    except GearError as exc:
        claimed.finish(JobResult(error=str(exc), retryable=exc.retryable))


def result_of(claimed: ClaimedJob) -> JobResult:
    job = claimed.job
    if isinstance(job, ApplyDiff):
        buffer, size_bytes = memoryview(bytearray(1 << 16)), 0
        body = claimed.request_body()
        while count := body.readinto(buffer):
            size_bytes += count
        return JobResult(size_bytes=size_bytes)
    if isinstance(job, Diff):
        response = claimed.response_body()
        response.write(bytes(int(job.id)))
        if job.parent == "damaged":
            raise IntegrityError("an object is damaged")
        response.finish()
    return JobResult()


Kind = TypeVar("Kind")


def published(running: Running, kind: type[Kind]) -> list[Kind]:
    """Return the published jobs of one kind."""
    return [job for job in running.queue.jobs if isinstance(job, kind)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        gear_root=tmp_path / "gear",
        run_dir=tmp_path / "run",
        plugin_socket=tmp_path / "plugins" / "gear.sock",
        node="n",
    )


@pytest.fixture
def start(settings: Settings) -> Iterator[Start]:
    started: list[Running] = []

    def begin(work: Work = work, *, workers: int = 1, **options: Any) -> tuple[Running, Plugin]:
        timeouts = LONG if workers else SHORT
        started.append(run_gateway(settings, work, workers=workers, timeouts=timeouts, **options))
        return started[-1], Plugin(settings.plugin_socket)

    yield begin
    for running in started:
        running.stop()


def test_the_plugin_is_a_graph_driver(start: Start) -> None:
    _, plugin = start()
    assert plugin.request("Plugin.Activate", b"") == (200, b'{"Implements":["GraphDriver"]}')


def test_the_light_calls_reach_the_driver(start: Start) -> None:
    running, plugin = start()
    assert plugin.call("Init", Home="/h", Opts=None, UIDMaps=[{"container_id": 0, "host_id": 9, "size": 1}]) == {}
    assert running.driver.inits[0][1][0].host_id == 9
    assert plugin.call("Capabilities") == {"Capabilities": {"ReproducesExactDiffs": True}}
    assert plugin.call("Create", ID="a", Parent="") == {}
    assert plugin.call("CreateReadWrite", ID="b", Parent="a") == {}
    assert plugin.call("Exists", ID="b") == {"Exists": True}
    assert plugin.call("Get", ID="b") == {"Dir": "/merged/b"}
    assert plugin.call("GetMetadata", ID="b") == {"Metadata": {"MergedDir": "/merged/b"}}
    assert plugin.call("Put", ID="b") == {}
    assert plugin.call("Changes", ID="b", Parent="a") == {"Changes": [{"Path": "/a", "Kind": 1}]}
    assert plugin.call("DiffSize", ID="b", Parent="a") == {"Size": 42}
    assert plugin.call("Remove", ID="b") == {}
    assert plugin.call("Exists", ID="b") == {}
    assert plugin.call("Cleanup") == {}
    assert plugin.status()["Layers"] == "1"


def test_errors_of_the_driver_become_err_without_a_traceback(start: Start) -> None:
    running, plugin = start()
    assert plugin.call("Get", ID="none") == {"Err": "layer none: there is none"}
    running.driver.broken = InvalidInput("a bad id")
    assert plugin.call("Exists", ID="x") == {"Err": "a bad id"}
    running.driver.broken = ZeroDivisionError("oops")
    answer = plugin.call("Status")["Err"]
    assert answer.startswith("internal error: ZeroDivisionError: oops") and "Traceback" not in answer
    running.driver.broken = OSError(28, "x")
    assert plugin.call("Exists", ID="x") == {"Err": "GraphDriver.Exists: No space left on device"}


def test_an_error_that_names_an_undecodable_file_is_reported(start: Start) -> None:
    def refuse(claimed: ClaimedJob) -> None:
        claimed.finish(JobResult(error="damaged: a\udcff"))

    running, plugin = start(refuse)
    running.driver.broken = IntegrityError("damaged: a\udcff")
    assert plugin.call("Exists", ID="x") == {"Err": "damaged: a?"}
    assert plugin.apply_diff("a", [b"abc"]) == (500, {"Err": "damaged: a?"})


@pytest.mark.parametrize("method", ["GraphDriver.Nope", "Nope", "GraphDriver.Get/x", "GraphDriver.DiffNope"])
def test_an_unknown_method_is_an_error(start: Start, method: str) -> None:
    _, plugin = start()
    status, body = plugin.request(method, b"{}")
    assert status == 404
    assert "no such call" in json.loads(body)["Err"]


@pytest.mark.parametrize("method", ["GraphDriver.Init", "GraphDriver.Get", "GraphDriver.Diff"])
def test_a_malformed_request_is_an_error(start: Start, method: str) -> None:
    _, plugin = start()
    status, body = plugin.request(method, b'{"ID": 7')
    assert status == 400
    assert "malformed request body" in json.loads(body)["Err"]


def test_a_worker_receives_the_body_and_returns_its_size(start: Start) -> None:
    running, plugin = start()
    assert plugin.apply_diff("a", [b"x" * 40_000] * 30) == (200, {"Size": 1_200_000})
    (job,) = published(running, ApplyDiff)
    assert (job.id, job.parent) == ("a", "")


def test_light_and_heavy_calls_share_a_connection_until_a_heavy_one_ends_it(start: Start) -> None:
    _, plugin = start()
    connection = UnixHTTPConnection(plugin.path, TIMEOUT_S)
    for _ in range(3):
        connection.request("POST", "/GraphDriver.Exists", b'{"ID":"a"}')
        assert connection.getresponse().read() == b"{}"
    assert connection.sock is not None
    first = connection.sock
    connection.request("POST", "/GraphDriver.Diff", b'{"ID":"100000"}')
    assert connection.sock is first
    answer = connection.getresponse()
    assert len(answer.read()) == 100_000 and answer.getheader("Connection") == "close"
    connection.close()


def test_a_request_that_arrives_byte_by_byte_is_the_same_request(start: Start) -> None:
    _, plugin = start()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(plugin.path))
        for request in (
            b'POST /GraphDriver.DiffSize HTTP/1.1\r\nHost: p\r\nContent-Length: 10\r\n\r\n{"ID":"a"}',
            b'POST /GraphDriver.Diff HTTP/1.1\r\nHost: p\r\nContent-Length: 10\r\n\r\n{"ID":"7"}',
        ):
            for at in range(len(request)):
                connection.sendall(request[at : at + 1])
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.read() in (b'{"Size":42}', bytes(7))
            answer.close()


def test_diff_returns_any_number_of_bytes(start: Start) -> None:
    _, plugin = start()
    for size in (0, 1, 65_535, 65_536, 5_000_000):
        assert plugin.diff(str(size)) == (200, bytes(size))


def test_an_error_of_diff_is_reported_before_the_first_byte_and_breaks_the_connection_after_it(start: Start) -> None:
    _, plugin = start()
    status, body = plugin.diff("10", "damaged")
    assert (status, json.loads(body)) == (500, {"Err": "an object is damaged"})
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        plugin.diff("1000000", "damaged")


def test_a_rejected_body_is_read_to_its_end_so_that_its_sender_sees_the_response(start: Start) -> None:
    def refuse(claimed: ClaimedJob) -> None:
        claimed.finish(JobResult(error="no"))

    _, plugin = start(refuse)
    assert plugin.apply_diff("a", [bytes(1 << 16)] * 200) == (500, {"Err": "no"})


def test_an_empty_body_is_a_body(start: Start) -> None:
    _, plugin = start()
    assert plugin.apply_diff("a", []) == (200, {})
    assert plugin.request("GraphDriver.ApplyDiff?id=a&parent=", b"") == (200, b"{}")


def test_a_failure_before_the_worker_is_reported_so_that_docker_does_not_send_the_rest_of_the_body(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: DockerConnection) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    _, plugin = start()
    monkeypatch.setattr(DockerConnection, "descriptor", fail)
    status, answer = plugin.apply_diff("a", [bytes(1 << 16)] * 20)
    assert status == 500 and "Too many open files" in answer["Err"]


def test_a_body_that_breaks_off_is_an_error_for_the_worker(start: Start) -> None:
    errors: list[str] = []

    def note(claimed: ClaimedJob) -> None:
        try:
            claimed.finish(result_of(claimed))
        except GearError as exc:
            errors.append(str(exc))

    _, plugin = start(note)
    plugin.begin_apply("a", BEGUN).close()
    wait_until(lambda: bool(errors), "the worker fails")
    assert "broke off" in errors[0]


def test_a_worker_that_dies_in_the_middle_is_an_error_for_docker(start: Start) -> None:
    def die(claimed: ClaimedJob) -> None:
        if isinstance(claimed.job, ApplyDiff):
            claimed.request_body().readinto(memoryview(bytearray(10)))

    _, plugin = start(die)
    status, answer = plugin.apply_diff("a", [bytes(1000)] * 100)
    assert status == 500 and "died" in answer["Err"] and str(os.getpid()) in answer["Err"]


def test_the_gateway_does_the_jobs_while_redis_does_not_answer_and_reports_it(start: Start) -> None:
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


def test_status_and_metrics_report_missing_redis_and_workers_before_any_call_needs_them(
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


def test_the_gateway_does_a_job_that_no_worker_takes_and_waits_less_the_next_time(start: Start) -> None:
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


def test_an_error_that_no_process_could_begin_the_call_says_why_and_what_to_do(start: Start) -> None:
    _, plugin = start(workers=0, pool=BrokenPool())
    status, answer = plugin.apply_diff("a", [b"abc"])
    assert status == 500 and answer["Err"].startswith("apply_diff a: no worker took it")
    assert "Resource temporarily unavailable" in answer["Err"] and answer["Err"].endswith("try again")


def test_a_worker_that_comes_too_late_is_refused(start: Start) -> None:
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
def test_a_worker_whose_caller_stalls_is_replaced_at_once(start: Start, call: str) -> None:
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


def test_a_caller_that_stalls_for_too_long_gets_an_error(settings: Settings) -> None:
    running = run_gateway(replace(settings, stream_idle_s=0.01), work, timeouts=LONG, stalled_s=0.01)
    plugin = Plugin(settings.plugin_socket)
    try:
        with plugin.begin_apply("a", BEGUN) as connection:
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, b"GEAR_STREAM_IDLE_S" in answer.read()) == (500, True)
        with plugin.begin("Diff", str(64 << 20)) as connection:
            wait_until(lambda: b'method="GraphDriver.Diff",outcome="error"' in running.metrics.text(), "its end")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                answer.read()
    finally:
        running.stop()


def test_a_body_that_has_hardly_begun_occupies_no_worker(start: Start) -> None:
    running, plugin = start(workers=1)
    stalled = [plugin.begin_apply(f"stalled{number}", b"x") for number in range(4)]
    assert plugin.apply_diff("b", [b"abc"]) == (200, {"Size": 3})
    assert [job.id for job in published(running, ApplyDiff)] == ["b"]
    for connection in stalled:
        connection.sendall(b"2\r\nyz\r\n0\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.read() == b'{"Size":3}'
        answer.close()
        connection.close()


@pytest.mark.parametrize(
    ("body", "is_whole"),
    [
        (b"", False),
        (b"3\r\nabc\r\n", False),
        (b"3\r\nabc\r\n0\r\n", False),
        (b"5\r\n0\r\n\r\n\r\n", False),
        (b"7\r\n\r\n0\r\n\r\n", False),
        (b"3\r\nabc\r\n0\r\n\r\n", True),
        (b"0\r\n\r\n", True),
        (b"3;a=b\r\nabc\r\n000\r\nX: y\r\n\r\n", True),
        (b"-7\r\n", True),
        (b"\r\n", True),
    ],
)
def test_the_end_of_a_short_body_is_recognized(body: bytes, is_whole: bool) -> None:
    """A malformed body counts as complete: a worker reports it."""
    assert is_body_complete(body, CHUNKED) is is_whole


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
def test_the_objects_of_a_push_are_counted(settings: Settings) -> None:
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


def test_calls_that_wait_for_the_lazy_file_server_or_for_their_layer_block_no_others(start: Start) -> None:
    """There are more of them than threads in any pool."""
    running, plugin = start()
    ids = [f"gear{number}" for number in range(200)]
    running.driver.layers |= dict.fromkeys([*ids, "plain"], "")
    waiting = [plugin.begin("Get", id) for id in ids]
    wait_until(lambda: len(running.driver.refused_gets) == len(ids), "each Get has its layer's lock")
    waiting += [plugin.begin("Remove", id) for id in ids]
    assert plugin.call("Exists", ID="plain") == {"Exists": True}
    assert plugin.call("Get", ID="plain") == {"Dir": "/merged/plain"}
    for method in ("Put", "Create", "GetMetadata", "Status", "Remove"):
        assert not plugin.call(method, ID={"Create": "new"}.get(method, "plain")).get("Err")
    assert not select.select(waiting, [], [], 0)[0]
    running.driver.lazy_server.set()
    for connection in waiting:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert "Err" not in json.loads(answer.read())
        answer.close()
        connection.close()
    assert set(running.driver.layers) == {"new"}


def test_metrics_are_served_beside_the_plugin(start: Start, settings: Settings) -> None:
    _, plugin = start()
    plugin.call("Exists", ID="a")
    text = read_metrics(Path(settings.effective_metrics_listen))
    assert b'gear_calls_total{method="GraphDriver.Exists",outcome="ok"} 1.0' in text


@pytest.mark.parametrize("port", ["", "x", "65536", "²"])
def test_an_invalid_port_is_reported(settings: Settings, port: str) -> None:
    driver = MemoryDriver(replace(settings, metrics_listen=f"127.0.0.1:{port}"))
    with pytest.raises(InvalidInput, match="GEAR_METRICS_LISTEN=127"):
        asyncio.run(gateway_of(driver).serve())


def test_an_impossible_run_directory_is_reported(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    driver = MemoryDriver(replace(settings, run_dir=tmp_path / "file" / "run"))
    with pytest.raises(InvalidInput, match="GEAR_RUN_DIR"):
        asyncio.run(gateway_of(driver).serve())


def test_the_sockets_are_for_root_alone_and_gone_at_the_end(start: Start, settings: Settings) -> None:
    running, _ = start()
    sockets = [settings.plugin_socket, settings.streams_socket, Path(settings.effective_metrics_listen)]
    assert [stat.S_IMODE(path.stat().st_mode) for path in sockets] == [0o600] * 3
    running.stop()
    assert not any(path.exists() for path in sockets)


def test_a_running_call_ends_before_the_gateway_does(start: Start) -> None:
    running, plugin = start()
    slow = plugin.begin_apply("slow", BEGUN)
    wait_until(lambda: plugin.status()["At Work"].startswith("1 by worker"), "the import runs")
    ending = threading.Thread(target=running.stop)
    ending.start()
    wait_until(lambda: not plugin.path.exists(), "no new connections are accepted")
    slow.sendall(b"0\r\n\r\n")
    assert slow.recv(100).startswith(b"HTTP/1.1 200")
    slow.close()
    ending.join()


def test_a_call_that_hangs_does_not_keep_the_gateway_from_ending(start: Start) -> None:
    running, plugin = start(light_grace_s=0.1)
    hung, over = threading.Event(), threading.Event()

    def hang(id: str) -> bool:
        hung.set()
        return over.wait(60)

    running.driver.exists = hang  # type: ignore[method-assign]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(plugin.path))
        connection.sendall(b'POST /GraphDriver.Exists HTTP/1.1\r\nHost: p\r\nContent-Length: 10\r\n\r\n{"ID":"a"}')
        assert hung.wait(60)
        running.stop()
    over.set()
    assert running.driver.is_released


def test_a_job_that_waits_for_a_worker_when_the_gateway_ends_leaves_no_task_behind(start: Start) -> None:
    async def end() -> list[str]:
        await running.gateway.stop()
        await asyncio.sleep(0)
        return [repr(task) for task in asyncio.all_tasks() - {asyncio.current_task()}]

    running, _ = start(workers=0)
    wait_until(lambda: bool(running.queue.jobs), "garbage collection is published")
    assert asyncio.run_coroutine_threadsafe(end(), running.loop).result(30) == []


def gateway_of(driver: MemoryDriver) -> Gateway:
    """Return a gateway as its process makes it."""
    metrics = GatewayMetrics()
    return Gateway(driver.settings, driver, metrics, Dispatcher(driver.settings, metrics))


def test_a_restarted_gateway_publishes_to_the_broker_that_dockerd_has_named(settings: Settings) -> None:
    class Resumed(MemoryDriver):
        def prepare(self) -> None:
            super().prepare()
            self.settings = replace(self.settings, broker_url="redis://elsewhere/0")

    brokers: list[str] = []

    def open_queue(settings: Settings) -> TaskQueue:
        brokers.append(settings.effective_broker_url)
        return TaskQueue(settings)

    async def start_and_stop() -> None:
        metrics = GatewayMetrics()
        dispatcher = Dispatcher(settings, metrics, open_queue=open_queue)
        gateway = Gateway(settings, Resumed(settings), metrics, dispatcher)
        await gateway.start()
        await gateway.stop()

    asyncio.run(start_and_stop())
    assert brokers == [settings.effective_broker_url, "redis://elsewhere/0"]


def test_a_second_gateway_is_rejected_and_the_socket_of_a_dead_one_replaced(start: Start, settings: Settings) -> None:
    dead = listen_and_die(settings.plugin_socket)
    assert dead.exists()
    start()
    with pytest.raises(FailedPrecondition, match="another gateway"):
        run_gateway(settings, work)


def test_a_gateway_that_listens_without_accepting_counts_as_another_gateway(tmp_path: Path) -> None:
    refused: list[Exception] = []

    def try_to_listen() -> None:
        try:
            listen(tmp_path / "socket").close()
        except FailedPrecondition as exc:
            refused.append(exc)

    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(tmp_path / "socket"))
        busy.listen(0)
        waiting.connect(str(tmp_path / "socket"))  # the backlog is full
        trying = threading.Thread(target=try_to_listen, daemon=True)
        trying.start()
        trying.join(60)
        assert refused


@pytest.mark.parametrize("shared", ["run_dir", "metrics_listen"])
def test_a_rejected_gateway_leaves_everything_to_the_running_one(
    settings: Settings, tmp_path: Path, shared: str
) -> None:
    settings = replace(settings, metrics_listen=str(tmp_path / "metrics.sock"))
    running = run_gateway(settings, work, timeouts=LONG)
    others = {name: tmp_path / f"other-{name}" for name in ("gear_root", "run_dir", "plugin_socket") if name != shared}
    second = MemoryDriver(replace(settings, **others))  # type: ignore[arg-type]
    try:
        with pytest.raises(FailedPrecondition, match="another gateway"):
            asyncio.run(gateway_of(second).serve())
        assert settings.streams_socket.exists() and Path(settings.effective_metrics_listen).exists()
        assert not second.settings.plugin_socket.exists()
        assert second.is_prepared == second.is_released == (shared != "run_dir")
    finally:
        running.stop()


def listen_and_die(path: Path) -> Path:
    """Leave a socket file as a SIGKILL does."""
    listen(path).close()
    return path
