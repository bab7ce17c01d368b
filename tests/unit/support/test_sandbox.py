"""The sandbox ends its processes and mounts, and removes its files, when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import wait_until

# A mount and two processes with a distinct command line; one of them outlives its parent.
BUSY = 'mkdir "$0/m"; mount -t tmpfs tmpfs "$0/m"; touch "$0/f"; setsid tail -f "$0/f" & exec tail -f "$0/f"'


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    """Run BUSY in a sandbox inside the sandbox of the tests, with a mount on tmp_path/m."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "tests.support.sandbox", "sh", "-c", BUSY, str(tmp_path)]
    process = subprocess.Popen(command)
    wait_until(lambda: len(busy_processes(tmp_path)) == 2, "the sandbox's command")
    return process


def busy_processes(directory: Path) -> list[str]:
    """Return the processes of this PID namespace that BUSY started with *directory*."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == b"tail\0-f\0%s/f\0" % os.fsencode(directory):
                found.append(path.parent.name)
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_all_processes_and_mounts(
    busy: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals
) -> None:
    busy.send_signal(number)
    busy.wait()
    wait_until(lambda: not busy_processes(tmp_path), "the sandbox's processes end")
    assert not os.path.ismount(tmp_path / "m")


def test_scratch_directories_are_removed_including_one_left_by_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    left = tmp_path / "gear-sandbox-left"
    (left / "data").mkdir(parents=True)
    script = 'cat /run/docker/gear-sandbox; test -d "$(cat /run/docker/gear-sandbox)"'
    command = [sys.executable, "-m", "tests.support.sandbox", "sh", "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert Path(done.stdout).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_the_sandbox_returns_the_exit_code_of_its_command() -> None:
    assert subprocess.run([sys.executable, "-m", "tests.support.sandbox", "sh", "-c", "exit 7"]).returncode == 7
