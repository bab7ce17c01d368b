"""`make up` restarts the parts of the Procfile, and ends all of them when it ends, whatever the state of the output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import wait_until

pytestmark = pytest.mark.slow

UP = Path(__file__).resolve().parents[3] / "packaging" / "up.py"
RUN = """
import asyncio, json, runpy, sys
up = runpy.run_path(sys.argv[1])
sys.exit(0 if asyncio.run(up["run"](json.loads(sys.argv[2]))) else 1)
"""
LAST = "exec sleep 1000"
ABOVE_PIPE_CAPACITY_BYTES = 1 << 20


@dataclass
class Parts:
    """Shell commands that up.py keeps running; each first appends its pid to a file."""

    directory: Path
    process: subprocess.Popen[bytes]

    def pids(self, name: str) -> list[int]:
        """Return the pids of all processes that were started for *name*."""
        pid_file = self.directory / name
        return [int(line) for line in pid_file.read_text().splitlines()] if pid_file.exists() else []

    def assert_all_ended(self) -> None:
        pids = [pid for pid_file in self.directory.iterdir() for pid in self.pids(pid_file.name)]
        wait_until(lambda: not any(map(is_alive, pids)), "all parts have ended")


StartParts = Callable[..., Parts]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it ended before, or during, the read
        return False


@pytest.fixture
def start_parts(tmp_path: Path) -> Iterator[StartParts]:
    """Return a function that starts commands and waits until each has run once."""
    started: list[Parts] = []

    def start(stdout: int, **commands: str) -> Parts:
        with_pid_file = {name: f"echo $$ >>{tmp_path}/{name}; {command}" for name, command in commands.items()}
        process = subprocess.Popen([sys.executable, "-c", RUN, str(UP), json.dumps(with_pid_file)], stdout=stdout)
        parts = Parts(tmp_path, process)
        started.append(parts)
        wait_until(lambda: all(map(parts.pids, commands)), "all parts have begun")
        return parts

    yield start
    for parts in started:
        parts.process.kill()
        parts.process.wait()
        if parts.process.stdout:
            parts.process.stdout.close()
        parts.assert_all_ended()


def test_a_part_that_ends_is_restarted_and_the_others_keep_running(start_parts: StartParts) -> None:
    parts = start_parts(subprocess.PIPE, crashing="exit 3", killed=LAST, steady=LAST)
    os.kill(parts.pids("killed")[0], signal.SIGKILL)
    wait_until(lambda: min(len(parts.pids("crashing")), len(parts.pids("killed"))) > 1, "both parts have run again")
    parts.process.terminate()
    assert parts.process.wait(30) == 0
    assert parts.process.stdout is not None
    output = parts.process.stdout.read().decode()
    assert "crashing | has ended (exit status 3); the next start is in 0.5 s\n" in output
    assert "killed   | has ended (signal 9); the next start is in 0.5 s\n" in output
    assert "steady" not in output and len(parts.pids("steady")) == 1
    parts.assert_all_ended()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_parts_including_one_between_two_runs(
    start_parts: StartParts, number: signal.Signals
) -> None:
    parts = start_parts(subprocess.DEVNULL, crashing="exit 0", steady=LAST)
    parts.process.send_signal(number)
    assert parts.process.wait(30) == 0
    parts.assert_all_ended()


def test_all_parts_end_when_the_reader_closes_the_output(start_parts: StartParts) -> None:
    parts = start_parts(subprocess.PIPE, talking="while :; do echo a line; sleep 0.01; done", steady=LAST)
    assert parts.process.stdout is not None
    assert parts.process.stdout.readline().endswith(b"talking | a line\n")
    parts.process.stdout.close()
    assert parts.process.wait(30) == 1
    parts.assert_all_ended()


def test_a_signal_ends_all_parts_while_the_output_is_not_read(start_parts: StartParts, tmp_path: Path) -> None:
    done = tmp_path.with_suffix(".done")
    parts = start_parts(
        subprocess.PIPE, talking=f"seq -f %0100g {ABOVE_PIPE_CAPACITY_BYTES // 100}; touch {done}; {LAST}"
    )
    wait_until(done.exists, "the part has written all its output")
    parts.process.terminate()
    assert parts.process.wait(30) == 0
    parts.assert_all_ended()


def test_parts_keep_running_when_the_output_is_on_a_full_disk(start_parts: StartParts) -> None:
    with open("/dev/full", "wb") as full:
        parts = start_parts(full.fileno(), talking="echo lost; exit 0", steady=LAST)
        wait_until(lambda: len(parts.pids("talking")) > 1, "the part runs again")
        parts.process.terminate()
        assert parts.process.wait(30) == 0
    assert len(parts.pids("steady")) == 1


def test_all_parts_end_when_up_is_killed(start_parts: StartParts) -> None:
    parts = start_parts(subprocess.DEVNULL, steady=LAST)
    parts.process.kill()
    parts.process.wait()
    parts.assert_all_ended()
