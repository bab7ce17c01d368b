"""Start and stop `gear manager`."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.manager_calls import LARGE, address, push
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.remotes import Service, manager_server

pytestmark = pytest.mark.slow


def test_the_command_reports_a_wrong_address_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from gearworkers.cli.main import main; main()", "manager"]
    for listen in ("0.0.0.0:2019", "nonsense", "127.0.0.1:99999"):
        environ = {"GEAR_ROOT": str(tmp_path), "GEAR_MANAGER_LISTEN": listen}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=Path(__file__).parents[3])
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert listen in done.stderr


def test_the_manager_finishes_its_requests_before_it_stops(tmp_path: Path) -> None:
    with manager_server(tmp_path) as server:
        content = LARGE * 8
        digest = push(server, content)
        with socket.create_connection(address(server)) as client:
            client.sendall(f"GET /v1/objects/{digest} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
            received = bytearray(client.recv(4096))
            ended = threading.Thread(target=server.daemon.stop, args=(PATIENCE_S,))
            ended.start()
            wait_until(lambda: not _accepts(server), "the manager accepts no more connections")
            while more := client.recv(65536):
                received += more
        ended.join()
        assert received.endswith(content)


def _accepts(server: Service) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address(server)) == 0
