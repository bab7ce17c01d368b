"""Daemons leave out modules that only commands or few nodes need."""

from __future__ import annotations

import subprocess
import sys

import pytest

LEFT_OUT = {"rich", "pygments", "typer", "obstore"}


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["plugin_gateway", "gearworkers.workers", "gearworkers.lazyfs"])
def test_a_daemon_does_not_import_modules_of_commands(daemon: str) -> None:
    program = f"import sys, {daemon}.__main__; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not LEFT_OUT & set(done.stdout.split())
    assert "structlog" in done.stdout.split()
