"""The gateway from start to stop: its sockets, calls in progress at the stop, and second gateways."""

from __future__ import annotations

import asyncio
import socket
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, InvalidInput
from gearworkers.settings import Settings
from plugin_gateway.dispatch.dispatcher import Dispatcher
from plugin_gateway.dispatch.task_queue import TaskQueue
from plugin_gateway.gateway import Gateway
from plugin_gateway.metrics import GatewayMetrics
from plugin_gateway.sockets import listen
from tests.support.gateway_jobs import BEGUN, LONG, Start, work
from tests.support.gateways import MemoryDriver, run_gateway
from tests.support.plugin import Plugin, read_metrics
from tests.support.processes import wait_until


def test_the_gateway_serves_metrics(start: Start, settings: Settings) -> None:
    _, plugin = start()
    plugin.call("Exists", ID="a")
    text = read_metrics(Path(settings.effective_metrics_listen))
    assert b'gear_calls_total{method="GraphDriver.Exists",outcome="ok"} 1.0' in text


def gateway_of(driver: MemoryDriver) -> Gateway:
    """Return a gateway as its process makes it."""
    metrics = GatewayMetrics()
    return Gateway(driver.settings, driver, metrics, Dispatcher(driver.settings, metrics))


@pytest.mark.parametrize("port", ["", "x", "65536", "²"])
def test_an_invalid_metrics_port_is_reported(settings: Settings, port: str) -> None:
    driver = MemoryDriver(replace(settings, metrics_listen=f"127.0.0.1:{port}"))
    with pytest.raises(InvalidInput, match="GEAR_METRICS_LISTEN=127"):
        asyncio.run(gateway_of(driver).serve())


def test_an_unusable_run_directory_is_reported(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    driver = MemoryDriver(replace(settings, run_dir=tmp_path / "file" / "run"))
    with pytest.raises(InvalidInput, match="GEAR_RUN_DIR"):
        asyncio.run(gateway_of(driver).serve())


def test_sockets_admit_root_only_and_are_removed_at_the_stop(start: Start, settings: Settings) -> None:
    running, _ = start()
    sockets = [settings.effective_plugin_socket, settings.streams_socket, Path(settings.effective_metrics_listen)]
    assert [stat.S_IMODE(path.stat().st_mode) for path in sockets] == [0o600] * 3
    running.stop()
    assert not any(path.exists() for path in sockets)


def test_a_gateway_without_dockers_door_reports_its_status(settings: Settings) -> None:
    running = run_gateway(replace(settings, plugin_socket="off"), work)
    try:
        assert not settings.effective_plugin_socket.exists()
        assert Plugin(settings.run_dir / "plugin.sock").status()["Degraded"] == "no"
    finally:
        running.stop()


def test_the_gateway_finishes_running_calls_before_it_stops(start: Start) -> None:
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


def test_a_hanging_call_does_not_keep_the_gateway_from_stopping(start: Start) -> None:
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


def test_stopping_the_gateway_ends_the_tasks_of_waiting_jobs(start: Start) -> None:
    async def end() -> list[str]:
        await running.gateway.stop()
        await asyncio.sleep(0)
        return [repr(task) for task in asyncio.all_tasks() - {asyncio.current_task()}]

    running, _ = start(workers=0)
    wait_until(lambda: bool(running.queue.jobs), "garbage collection is published")
    assert asyncio.run_coroutine_threadsafe(end(), running.loop).result(30) == []


def test_a_restarted_gateway_publishes_to_the_broker_of_the_running_dockerd(settings: Settings) -> None:
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


def test_a_gateway_replaces_the_socket_of_a_dead_gateway_and_rejects_a_second_one(
    start: Start, settings: Settings
) -> None:
    dead = listen_and_die(settings.effective_plugin_socket)
    assert dead.exists()
    start()
    with pytest.raises(FailedPrecondition, match="another gateway"):
        run_gateway(settings, work)


def test_a_gateway_with_a_full_backlog_counts_as_running(tmp_path: Path) -> None:
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
def test_a_rejected_gateway_does_not_touch_the_running_one(settings: Settings, tmp_path: Path, shared: str) -> None:
    settings = replace(settings, metrics_listen=str(tmp_path / "metrics.sock"))
    running = run_gateway(settings, work, timeouts=LONG)
    others = {name: tmp_path / f"other-{name}" for name in ("gear_root", "run_dir") if name != shared}
    plugin_socket = str(tmp_path / "other-plugin")
    second = MemoryDriver(replace(settings, plugin_socket=plugin_socket, **others))  # type: ignore[arg-type]
    try:
        with pytest.raises(FailedPrecondition, match="another gateway"):
            asyncio.run(gateway_of(second).serve())
        assert settings.streams_socket.exists() and Path(settings.effective_metrics_listen).exists()
        assert not second.settings.effective_plugin_socket.exists()
        assert second.is_prepared == second.is_released == (shared != "run_dir")
    finally:
        running.stop()


def listen_and_die(path: Path) -> Path:
    """Leave a socket file as a SIGKILL does."""
    listen(path).close()
    return path
