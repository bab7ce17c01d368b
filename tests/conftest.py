"""Runs the tests of root in a sandbox of their own (tests/support/sandbox.py): mounts and daemons end with it."""

from __future__ import annotations

import os
import sys

import pytest

from tests.support import sandbox


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--driver` runs the e2e tests on Docker's own driver, to see that it is the tests that are right."""
    parser.addoption("--driver", default="gear", choices=["gear", "overlay2"], help="storage driver of the e2e tests")


def pytest_configure(config: pytest.Config) -> None:
    """Become `sandbox pytest …`, unless inside already or nothing may be run there."""
    if sandbox.is_inside() or os.geteuid() != 0 or config.option.collectonly:
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()
    arguments = [str(argument) for argument in config.invocation_params.args]
    os.chdir(config.invocation_params.dir)
    command = [sys.executable, "-m", "tests.support.sandbox", sys.executable, "-m", "pytest", *arguments]
    environ = os.environ | {"PYTHONPATH": str(config.rootpath)}
    os.execve(sys.executable, command, environ)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without root, what needs it is skipped and says so."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root") or item.get_closest_marker("dockerd"):
            item.add_marker(pytest.mark.skip(reason="mounts and owners need root; `make test` runs as root"))
