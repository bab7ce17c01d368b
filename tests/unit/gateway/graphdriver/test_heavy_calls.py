"""ApplyDiff and Diff over the plugin's socket: the bytes, and errors of Docker, the worker and the gateway."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
from dataclasses import replace

import pytest

from gearworkers.errors import GearError
from gearworkers.settings import Settings
from gearworkers.util.unix_http import UnixHTTPConnection
from gearworkers.workers.claim import ClaimedJob
from gearworkers.workers.messages import CHUNKED, ApplyDiff, JobResult
from plugin_gateway.graphdriver.connection import DockerConnection, is_body_complete
from tests.support.gateway_jobs import BEGUN, LONG, Start, published, result_of, work
from tests.support.gateways import run_gateway
from tests.support.plugin import TIMEOUT_S, Plugin
from tests.support.processes import wait_until

pytestmark = pytest.mark.slow


def test_a_worker_receives_the_body_and_returns_its_size(start: Start) -> None:
    running, plugin = start()
    assert plugin.apply_diff("a", [b"x" * 40_000] * 30) == (200, {"Size": 1_200_000})
    (job,) = published(running, ApplyDiff)
    assert (job.id, job.parent) == ("a", "")


def test_light_and_heavy_calls_share_a_connection_until_a_heavy_call_ends_it(start: Start) -> None:
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


def test_requests_that_arrive_byte_by_byte_are_answered(start: Start) -> None:
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


def test_diff_returns_bodies_of_any_size(start: Start) -> None:
    _, plugin = start()
    for size in (0, 1, 65_535, 65_536, 5_000_000):
        assert plugin.diff(str(size)) == (200, bytes(size))


def test_a_diff_error_is_reported_before_the_first_byte_and_breaks_the_connection_after_it(start: Start) -> None:
    _, plugin = start()
    status, body = plugin.diff("10", "damaged")
    assert (status, json.loads(body)) == (500, {"Err": "an object is damaged"})
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        plugin.diff("1000000", "damaged")


def test_the_gateway_reads_a_rejected_body_to_its_end_so_that_the_sender_sees_the_response(start: Start) -> None:
    def refuse(claimed: ClaimedJob) -> None:
        claimed.finish(JobResult(error="no"))

    _, plugin = start(refuse)
    assert plugin.apply_diff("a", [bytes(1 << 16)] * 200) == (500, {"Err": "no"})


def test_apply_diff_accepts_an_empty_body(start: Start) -> None:
    _, plugin = start()
    assert plugin.apply_diff("a", []) == (200, {})
    assert plugin.request("GraphDriver.ApplyDiff?id=a&parent=", b"") == (200, b"{}")


def test_a_failure_before_dispatch_is_reported_without_breaking_the_connection(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: DockerConnection) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    _, plugin = start()
    monkeypatch.setattr(DockerConnection, "descriptor", fail)
    status, answer = plugin.apply_diff("a", [bytes(1 << 16)] * 20)
    assert status == 500 and "Too many open files" in answer["Err"]


def test_the_worker_gets_an_error_when_the_body_ends_early(start: Start) -> None:
    errors: list[str] = []

    def note(claimed: ClaimedJob) -> None:
        try:
            claimed.finish(result_of(claimed))
        except GearError as exc:
            errors.append(str(exc))

    _, plugin = start(note)
    plugin.begin_apply("a", BEGUN).close()
    wait_until(lambda: bool(errors), "the worker fails")
    assert "ended early" in errors[0]


def test_docker_gets_an_error_when_the_worker_dies_during_the_call(start: Start) -> None:
    def die(claimed: ClaimedJob) -> None:
        if isinstance(claimed.job, ApplyDiff):
            claimed.request_body().readinto(memoryview(bytearray(10)))

    _, plugin = start(die)
    status, answer = plugin.apply_diff("a", [bytes(1000)] * 100)
    assert status == 500 and "died" in answer["Err"] and str(os.getpid()) in answer["Err"]


def test_a_stalled_caller_gets_an_error_after_the_idle_limit(settings: Settings) -> None:
    running = run_gateway(replace(settings, stream_idle_s=0.01), work, timeouts=LONG, stalled_s=0.01)
    plugin = Plugin(settings.effective_plugin_socket)
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


def test_a_body_of_a_few_bytes_does_not_occupy_a_worker(start: Start) -> None:
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
