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


PARTS = ("redis-server", "plugin_gateway", "gearworkers.workers", "lazyfs")
WORKERS = ("gear-import", "gear-push", "gear-convert")


def processes(stack: Stack) -> dict[str, int]:
    """Return the pids of the main processes by a word of their commands, and of the workers by their names."""
    commands = children(stack.make_up.pid, "args")
    parts = {part: pid for pid, command in commands.items() for part in PARTS if part in command}
    workers = children(parts["gearworkers.workers"], "comm") if "gearworkers.workers" in parts else {}
    return parts | {name: pid for pid, name in workers.items() if name in WORKERS}


def children(pid: int, column: str) -> dict[int, str]:
    """Return this column of `ps` for the children of a process by their pids."""
    command = ["ps", "--ppid", str(pid), "-o", "pid=", "-o", f"{column}="]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return {int(line.split()[0]): line.split(maxsplit=1)[1].strip() for line in lines}


def is_healthy(stack: Stack) -> bool:
    return listens(stack.plugin_socket) and Plugin(stack.plugin_socket).status()["Degraded"] == "no"


def test_killed_processes_are_restarted_and_the_others_keep_running(stack: Stack) -> None:
    wait_until(lambda: is_healthy(stack), "the workers answer")
    before = processes(stack)
    assert before.keys() == {*PARTS, *WORKERS}
    killed = {"redis-server", "plugin_gateway", "gear-import"}
    for word in killed:
        os.kill(before[word], signal.SIGKILL)
    wait_until(
        lambda: processes(stack).keys() == before.keys(), "all processes run again", found=lambda: str(processes(stack))
    )
    stack.make_up.wait_until(lambda: is_healthy(stack), "the workers answer again")
    assert {word for word, pid in processes(stack).items() if pid != before[word]} == killed


def test_when_the_parent_of_the_workers_is_killed_they_end_and_all_start_again(stack: Stack) -> None:
    wait_until(lambda: is_healthy(stack), "the workers answer")
    before = processes(stack)
    os.kill(before["gearworkers.workers"], signal.SIGKILL)
    renewed = {"gearworkers.workers", *WORKERS}
    wait_until(
        lambda: (
            processes(stack).keys() == before.keys()
            and all(processes(stack).get(name) != before[name] for name in renewed)
        ),
        "the workers run again",
        found=lambda: str(processes(stack)),
    )
    assert not any(Path(f"/proc/{before[name]}").exists() for name in renewed)
    stack.make_up.wait_until(lambda: is_healthy(stack), "the workers answer again")


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
