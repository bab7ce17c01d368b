"""The control socket of the lazy file server, without a file system."""

from __future__ import annotations

import socket
import socketserver
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from gearworkers.errors import InvalidInput, NotFound
from gearworkers.lazyfs.client import LazyStatus, request_prefetch
from gearworkers.lazyfs.control import ControlServer


def no_status() -> LazyStatus:
    raise AssertionError("these tests request no status")


def accept_none(server: socketserver.UnixStreamServer) -> tuple[socket.socket, str]:
    time.sleep(0.01)
    raise BlockingIOError


def test_connections_that_wait_to_be_accepted_are_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socketserver.UnixStreamServer, "get_request", accept_none)
    with ControlServer(tmp_path / "socket", no_status, {}), ExitStack() as stack:
        for _ in range(50):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.settimeout(1.0)
            waiting.connect(str(tmp_path / "socket"))


def test_the_error_of_a_request_is_reported_to_its_caller(tmp_path: Path) -> None:
    def fail(body: bytes) -> None:
        raise NotFound("layer <a>: there is none")

    path = tmp_path / "socket"
    with ControlServer(path, no_status, {"/prefetch": fail}), pytest.raises(InvalidInput) as caught:
        request_prefetch(path, ["a"])
    assert str(caught.value) == "POST /prefetch: layer <a>: there is none"
