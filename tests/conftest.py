"""Run all tests in a private sandbox (tests/support/sandbox.py); mounts and daemons end with it."""

from __future__ import annotations

import os
import sys

import pytest

from tests.support import sandbox


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--driver`, which runs the e2e tests on Docker's own driver to check the tests themselves."""
    parser.addoption("--driver", default="gear", choices=["gear", "overlay2"], help="storage driver of the e2e tests")


def pytest_configure(config: pytest.Config) -> None:
    """Re-execute pytest in a sandbox, which requires root; do nothing inside one or when tests are only collected."""
    if sandbox.is_inside() or config.option.collectonly:
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()
    arguments = [str(argument) for argument in config.invocation_params.args]
    os.chdir(config.invocation_params.dir)
    command = [sys.executable, "-m", "tests.support.sandbox", sys.executable, "-m", "pytest", *arguments]
    environ = os.environ | {"PYTHONPATH": str(config.rootpath)}
    os.execve(sys.executable, command, environ)
