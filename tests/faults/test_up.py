"""`make up` with real processes: it restarts killed ones and rejects a second stack in the same directories."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from gearworkers.util.locks import sole_process
from tests.support.plugin import Plugin
from tests.support.processes import listens, wait_until
from tests.support.stack import CHECKOUT, Stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"), name="up")
    stack.up()
    yield stack
    stack.make_up.stop()


@pytest.fixture
def other_environ(stack: Stack, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a stack that shares no directory with the running one."""
    paths = {"GEAR_ROOT": tmp_path / "gear", "GEAR_RUN_DIR": tmp_path / "run", "GEAR_PLUGIN_SOCKET": tmp_path / "sock"}
    return {**stack.environ(), **{name: str(path) for name, path in paths.items()}}


def processes(stack: Stack) -> dict[str, int]:
    """Return the pids of the main processes by a word of their commands."""
    listing = subprocess.run(
        ["pgrep", "-a", "-P", str(stack.make_up.pid)], capture_output=True, text=True, check=True
    ).stdout
    words = ("redis-server", "plugin_gateway", "import@", "push@", "convert@", "lazyfs")
    return {word: int(line.split()[0]) for line in listing.splitlines() for word in words if word in line}


def is_healthy(stack: Stack) -> bool:
    return listens(stack.plugin_socket) and Plugin(stack.plugin_socket).status()["Degraded"] == "no"


def test_killed_processes_are_restarted_and_the_others_keep_running(stack: Stack) -> None:
    wait_until(lambda: is_healthy(stack), "the workers answer")
    before = processes(stack)
    assert len(before) == 6
    killed = {"redis-server", "plugin_gateway", "import@"}
    for word in killed:
        os.kill(before[word], signal.SIGKILL)
    wait_until(
        lambda: processes(stack).keys() == before.keys(), "all processes run again", found=lambda: str(processes(stack))
    )
    stack.make_up.wait_until(lambda: is_healthy(stack), "the workers answer again")
    assert {word for word, pid in processes(stack).items() if pid != before[word]} == killed


@pytest.mark.parametrize("shared", ["GEAR_ROOT", "GEAR_RUN_DIR"])
@pytest.mark.parametrize("command", ["packaging/up.py", "packaging/redis.sh"])
def test_a_second_stack_with_a_shared_directory_is_rejected_and_the_first_keeps_running(
    stack: Stack, other_environ: dict[str, str], shared: str, command: str
) -> None:
    before = processes(stack)
    environ = {**other_environ, shared: stack.environ()[shared]}
    interpreter = [sys.executable] if command.endswith(".py") else []
    done = subprocess.run([*interpreter, command], env=environ, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"of this {shared} is already running" in done.stderr
    with Redis(unix_socket_path=str(stack.redis_socket)) as redis:
        assert redis.info("server")["process_id"] == before["redis-server"]
    assert processes(stack) == before
    assert Plugin(stack.plugin_socket).status()["Degraded"] == "no"


def test_make_up_is_rejected_while_another_gateway_runs(other_environ: dict[str, str]) -> None:
    with sole_process(Path(other_environ["GEAR_ROOT"], "gateway.lock"), "the gateway"):
        command = [sys.executable, "packaging/up.py"]
        done = subprocess.run(command, env=other_environ, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 1 and "a gateway of this GEAR_ROOT is already running" in done.stderr
