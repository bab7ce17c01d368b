"""Fixtures of the conformance suite, which runs each test in process and over the plugin socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gearworkers.settings import Settings
from tests.conformance.drivers import Door, Driver, InProcess, OverSocket
from tests.conformance.snapshot_door import SnapshotDoor
from tests.conformance.snapshots import containerd_of, gateway
from tests.support.containerd import SnapshotClient, connected
from tests.support.fake_containerd import FakeContainerd
from tests.support.sandbox import scratch
from tests.support.stack import Stack


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return settings with a GEAR_ROOT for this test only."""
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test")


@pytest.fixture(params=["in process", "over the socket"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """Yield the driver under test after Init."""
    with _initialized(request) as driver:
        yield driver


@contextmanager
def _initialized(request: pytest.FixtureRequest) -> Iterator[Driver]:
    if request.param == "in process":
        driver: Driver = InProcess(request.getfixturevalue("settings"))
    else:
        driver = OverSocket(request.getfixturevalue("stack"))
    driver.init()
    yield driver
    driver.cleanup()


@pytest.fixture(params=["in process", "over the socket", "of containerd"])
def door(request: pytest.FixtureRequest) -> Iterator[Door]:
    """Yield the front door under test: Docker's in both ways, or containerd's."""
    if request.param != "of containerd":
        with _initialized(request) as driver:
            yield driver
        return
    stack, fake = request.getfixturevalue("stack"), request.getfixturevalue("fake_containerd")
    with connected(stack.containerd_socket) as client:
        door = SnapshotDoor(stack, client, fake)
        yield door
        door.close()


@pytest.fixture(scope="session")
def fake_containerd(stack: Stack) -> Iterator[FakeContainerd]:
    """Yield a content store for the shared stack."""
    with containerd_of(stack) as fake:
        yield fake


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Yield Redis, gateway and import worker, shared by all tests over the socket."""
    stack = Stack(scratch() / "conformance", name="conformance")
    stack.set(CONTAINERD_ADDRESS=str(stack.run_dir / "fake.sock"))
    stack.start("redis", "gateway", "import")
    try:
        yield stack
        check_logs(stack)
    finally:
        stack.stop("import", "gateway", "redis")


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[SnapshotClient]:
    """Yield containerd's client of a gateway process that the tests of one module share."""
    name = request.module.__name__.rpartition(".")[2]
    with gateway(name) as stack, connected(stack.containerd_socket) as client:
        yield client


def check_logs(stack: Stack) -> None:
    """Check that the import worker did the calls and survived, and that no log shows a bug."""
    assert stack.is_running("import")
    assert "gearworkers.apply_diff" in stack.check_log("import")
    stack.check_log("gateway")
