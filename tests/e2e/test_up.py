"""`make up` runs the whole stack in the foreground beside another stack and ends cleanly on one signal."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.dockerd import Dockerd
from tests.support.stack import Stack
from tests.support.tiny import tiny_tar


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_stack_starts_serves_a_dockerd_and_ends_cleanly(
    stack: Stack, disk: Path, number: signal.Signals
) -> None:
    second = Stack(disk / f"up-{number.name}", name="gear2")
    second.up()
    dockerd = Dockerd("d2", disk / f"docker-{number.name}", "gear2")
    dockerd.start()
    dockerd.docker("import", "-", "tiny", stdin=tiny_tar())
    assert dockerd.run("tiny", "echo", "up") == "up"
    dockerd.stop()
    process = second.make_up.process
    assert process is not None
    process.send_signal(number)
    assert process.wait(90) == 0
    assert "SIGKILL" not in second.make_up.log.read_text(), "each process ended in time"
    assert not second.plugin_socket.exists()
    assert not second.redis_socket.exists()
    assert stack.is_running("gateway")
