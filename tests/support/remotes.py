"""Remotes for tests: a manager and an S3 server, each in a process."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gearworkers.manager.server import ManagerServer
from gearworkers.settings import Settings
from tests.support.ports import free_port
from tests.support.processes import Daemon

CREDENTIALS = "[default]\naws_access_key_id = test\naws_secret_access_key = test\n"


@dataclass(frozen=True)
class Service:
    """A process that serves HTTP on loopback."""

    url: str
    daemon: Daemon


@contextmanager
def s3_server(directory: Path) -> Iterator[Service]:
    """Run an empty S3 server (moto)."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, directory / "s3.log", {}, port) as service:
        yield service


def new_bucket(server: Service) -> str:
    """Make a bucket; return the URL, for GEAR_REMOTE, of a prefix in it."""
    name = f"bucket-{secrets.token_hex(6)}"
    request = urllib.request.Request(f"{server.url}/{name}", method="PUT")
    request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=test/20240101/us-east-1/s3/aws4_request")
    urllib.request.urlopen(request).close()
    return f"s3://{name}/some/prefix?endpoint={server.url}"


def credentials_file(directory: Path) -> Path:
    """Write a file of AWS credentials that moto accepts; return its path."""
    path = directory / "credentials"
    path.write_text(CREDENTIALS)
    return path


@contextmanager
def manager_server(directory: Path, environ: Mapping[str, str] | None = None) -> Iterator[Service]:
    """Run `gear manager` with its data below *directory*; *environ* overrides the settings."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    settings = {"GEAR_ROOT": str(directory), "GEAR_MANAGER_LISTEN": f"127.0.0.1:{port}", **(environ or {})}
    command = [sys.executable, "-c", "from gearworkers.cli.main import main; main()", "manager"]
    with _running(command, directory / "manager.log", settings, port) as service:
        yield service


def figures(server: Service) -> dict[str, float]:
    """Return the manager's metrics by name."""
    with urllib.request.urlopen(f"{server.url}/metrics") as page:
        lines = [line.rpartition(" ") for line in page.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def ask(server: Service, path: str) -> object:
    """Send a GET; return the decoded JSON answer."""
    with urllib.request.urlopen(server.url + path) as page:
        return json.load(page)


@contextmanager
def manager_thread(settings: Settings) -> Iterator[str]:
    """Run a manager in a thread, which starts faster than a process; yield its URL."""
    loop = asyncio.new_event_loop()
    server = ManagerServer(replace(settings, manager=replace(settings.manager, listen="127.0.0.1:0")))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _running(command: list[str], log: Path, environ: Mapping[str, str], port: int) -> Iterator[Service]:
    daemon = Daemon(command, log, {**os.environ, **environ}, cwd=Path(__file__).parents[2])
    daemon.start()
    try:
        daemon.wait_until(lambda: _listens(port), f"port {port}")
        yield Service(f"http://127.0.0.1:{port}", daemon)
    finally:
        daemon.stop()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
