"""The Procfile's processes are started again when they end, and all are ended, whatever becomes of their output."""

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

UP = Path(__file__).resolve().parents[3] / "packaging" / "up.py"
RUN = """
import asyncio, json, runpy, sys
up = runpy.run_path(sys.argv[1])
sys.exit(0 if asyncio.run(up["run"](json.loads(sys.argv[2]))) else 1)
"""
LAST = "exec sleep 1000"
MORE_THAN_A_PIPE_HOLDS = 1 << 20


@dataclass
class Parts:
    """Shell commands that are kept running; each first notes its pid."""

    directory: Path
    process: subprocess.Popen[bytes]

    def pids(self, name: str) -> list[int]:
        """The processes that were started for *name* so far."""
        noted = self.directory / name
        return [int(line) for line in noted.read_text().splitlines()] if noted.exists() else []

    def assert_all_ended(self) -> None:
        pids = [pid for noted in self.directory.iterdir() for pid in self.pids(noted.name)]
        wait_until(lambda: not any(map(is_alive, pids)), "all parts have ended")


Keep = Callable[..., Parts]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Keep]:
    """Starts commands, and waits until each has run once."""
    kept: list[Parts] = []

    def start(stdout: int, **commands: str) -> Parts:
        noting = {name: f"echo $$ >>{tmp_path}/{name}; {command}" for name, command in commands.items()}
        process = subprocess.Popen([sys.executable, "-c", RUN, str(UP), json.dumps(noting)], stdout=stdout)
        parts = Parts(tmp_path, process)
        kept.append(parts)
        wait_until(lambda: all(map(parts.pids, commands)), "all have begun")
        return parts

    yield start
    for parts in kept:
        parts.process.kill()
        parts.process.wait()
        if parts.process.stdout:
            parts.process.stdout.close()
        parts.assert_all_ended()


def test_a_part_that_ends_is_started_again_and_the_others_go_on(keep: Keep) -> None:
    parts = keep(subprocess.PIPE, crashing="exit 3", killed=LAST, steady=LAST)
    os.kill(parts.pids("killed")[0], signal.SIGKILL)
    wait_until(lambda: min(len(parts.pids("crashing")), len(parts.pids("killed"))) > 1, "both have run again")
    parts.process.terminate()
    assert parts.process.wait(30) == 0
    assert parts.process.stdout is not None
    said = parts.process.stdout.read().decode()
    assert "crashing | has ended (exit status 3); the next start is in 0.5 s\n" in said
    assert "killed   | has ended (signal 9); the next start is in 0.5 s\n" in said
    assert "steady" not in said and len(parts.pids("steady")) == 1
    parts.assert_all_ended()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_parts_also_one_between_two_runs(keep: Keep, number: signal.Signals) -> None:
    parts = keep(subprocess.DEVNULL, crashing="exit 0", steady=LAST)
    parts.process.send_signal(number)
    assert parts.process.wait(30) == 0
    parts.assert_all_ended()


def test_all_parts_end_when_nobody_reads_the_output_any_more(keep: Keep) -> None:
    parts = keep(subprocess.PIPE, talking="while :; do echo and so on; sleep 0.01; done", steady=LAST)
    assert parts.process.stdout is not None
    assert parts.process.stdout.readline().endswith(b"talking | and so on\n")
    parts.process.stdout.close()
    assert parts.process.wait(30) == 1
    parts.assert_all_ended()


def test_a_signal_ends_all_parts_while_the_reader_of_the_output_stands_still(keep: Keep, tmp_path: Path) -> None:
    done = tmp_path.with_suffix(".done")
    parts = keep(subprocess.PIPE, talking=f"seq -f %0100g {MORE_THAN_A_PIPE_HOLDS // 100}; touch {done}; {LAST}")
    wait_until(done.exists, "it has said all")
    parts.process.terminate()
    assert parts.process.wait(30) == 0
    parts.assert_all_ended()


def test_a_full_disk_below_the_output_disturbs_nothing(keep: Keep) -> None:
    with open("/dev/full", "wb") as full:
        parts = keep(full.fileno(), talking="echo lost; exit 0", steady=LAST)
        wait_until(lambda: len(parts.pids("talking")) > 1, "it has said so, and runs again")
        parts.process.terminate()
        assert parts.process.wait(30) == 0
    assert len(parts.pids("steady")) == 1


def test_parts_end_with_what_keeps_them_however_it_ends(keep: Keep) -> None:
    parts = keep(subprocess.DEVNULL, steady=LAST)
    parts.process.kill()
    parts.process.wait()
    parts.assert_all_ended()
