"""Run all tests in a private sandbox (tests/support/sandbox.py); mounts and daemons end with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support import sandbox
from tests.support.disk import mount_fresh

MEMORY_IMAGE = Path("/run/docker/memory.img")
MEMORY_BYTES = 8 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options; `--driver=overlay2` runs the e2e tests on Docker's own driver to check the tests themselves."""
    parser.addoption("--driver", default="gear", choices=["gear", "overlay2"], help="storage driver of the e2e tests")
    parser.addoption("--in-memory", action="store_true", help="tmp_path is on an ext4 in memory and ends with the run")


def pytest_configure(config: pytest.Config) -> None:
    """Re-execute pytest in a sandbox, which requires root, unless tests are only collected."""
    if config.option.collectonly:
        return
    if sandbox.is_inside():
        if config.option.in_memory and not hasattr(config, "workerinput"):  # xdist's workers use their parent's
            config.option.basetemp = _memory_disk() / "t"
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()
    arguments = [str(argument) for argument in config.invocation_params.args]
    os.chdir(config.invocation_params.dir)
    command = [sys.executable, "-m", "tests.support.sandbox", sys.executable, "-m", "pytest", *arguments]
    environ = os.environ | {"PYTHONPATH": str(config.rootpath)}
    os.execve(sys.executable, command, environ)


def _memory_disk() -> Path:
    """Mount an ext4 whose image is on the sandbox's tmpfs: a syncfs does not wait for the writes of other programs."""
    disk = sandbox.scratch() / "m"  # short: the path of a Unix socket has at most 107 bytes
    mount_fresh(MEMORY_IMAGE, disk, MEMORY_BYTES)
    return disk
