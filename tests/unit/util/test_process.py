"""Notify systemd when a process is ready."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gearworkers.errors import NotFound
from gearworkers.util.process import notify_ready
from tests.support.processes import PATIENCE_S

pytestmark = pytest.mark.slow


@contextmanager
def listening_at(address: str | bytes) -> Iterator[socket.socket]:
    """Listen on systemd's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(PATIENCE_S)
        systemd.bind(address)
        yield systemd


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_is_notified_at_its_socket(tmp_path: Path, is_abstract: bool) -> None:
    path = str(tmp_path / "notify")
    with listening_at(b"\0" + path.encode() if is_abstract else path) as systemd:
        notify_ready("@" + path if is_abstract else path)
        assert systemd.recv(100) == b"READY=1"


def test_an_empty_socket_name_sends_no_notification() -> None:
    notify_ready("")


def test_a_failed_notification_is_reported(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"notify systemd at .*/none"):
        notify_ready(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("command", "answers_at"),
    [
        ((sys.executable, "-m", "plugin_gateway"), "plugin.sock"),
        ((str(Path(sys.executable).with_name("gear")), "lazyfs"), "run/lazyfs.sock"),
        ((str(Path(sys.executable).with_name("gear")), "manager"), ""),
    ],
    ids=["gateway", "lazyfs", "manager"],
)
def test_a_process_notifies_readiness_when_it_answers(
    tmp_path: Path, command: tuple[str, ...], answers_at: str
) -> None:
    environ = os.environ | {
        "GEAR_ROOT": str(tmp_path / "gear"),
        "GEAR_RUN_DIR": str(tmp_path / "run"),
        "GEAR_PLUGIN_SOCKET": str(tmp_path / "plugin.sock"),
        "GEAR_MANAGER_LISTEN": "127.0.0.1:0",
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
    }
    with listening_at(str(tmp_path / "notify")) as systemd, subprocess.Popen(command, env=environ) as process:
        try:
            assert systemd.recv(100) == b"READY=1"
            if answers_at:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(tmp_path / answers_at))
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
