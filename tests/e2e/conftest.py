"""One dockerd and one stack for all e2e tests, on a fresh ext4; each test gets them running and without containers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import rootfs, sandbox
from tests.support.disk import mount_fresh
from tests.support.dockerd import Dockerd
from tests.support.lazyhost import LazyHost, lazy_host
from tests.support.registry import Registry
from tests.support.stack import Stack
from tests.support.tiny import tiny_tar

DISK_BYTES = 24 << 30


ONLY_GEAR = {"stack", "session_host", "peers", "original"}
"""Fixtures of guarantees that Docker's own drivers do not give."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test here as dockerd; on Docker's own driver skip the tests of gearworkers' own guarantees."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.dockerd)
    if config.getoption("--driver") != "gear":
        left_out = [item for item in items if ONLY_GEAR.intersection(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def disk() -> Path:
    """The mounted ext4."""
    path = sandbox.scratch() / "disk"
    mount_fresh(sandbox.scratch() / "disk.img", path, DISK_BYTES)
    return path


@pytest.fixture(scope="session")
def session_stack(request: pytest.FixtureRequest, disk: Path) -> Iterator[Stack | None]:
    """The Procfile's processes; None when Docker's own driver is under test."""
    if request.config.getoption("--driver") != "gear":
        yield None
        return
    stack = Stack(disk / "stack", settings={"GEAR_REMOTE": str(disk / "remote")})
    (disk / "remote").mkdir()
    stack.start()
    yield stack
    stack.stop()


@pytest.fixture(scope="session")
def session_dockerd(request: pytest.FixtureRequest, disk: Path, session_stack: Stack | None) -> Iterator[Dockerd]:
    """The dockerd, with the images that tests begin from: `debian` and `tiny`."""
    dockerd = Dockerd("d", disk / "docker", request.config.getoption("--driver"))
    dockerd.start()
    dockerd.docker("import", "-", "debian", stdin=rootfs.debian())
    dockerd.docker("import", "-", "tiny", stdin=tiny_tar())
    yield dockerd
    dockerd.stop()


@pytest.fixture
def dockerd(session_dockerd: Dockerd, session_stack: Stack | None) -> Iterator[Dockerd]:
    """The dockerd, up, with its stack up; the test's containers are removed after it."""
    if session_stack is not None:
        session_stack.start()
    if not session_dockerd.answers():
        session_dockerd.start()
    yield session_dockerd
    if session_stack is not None:
        session_stack.start()
    if not session_dockerd.answers():
        session_dockerd.start()
    if containers := session_dockerd.docker("ps", "-aq").split():
        session_dockerd.docker("rm", "-f", *containers)


@pytest.fixture
def stack(dockerd: Dockerd, session_stack: Stack | None) -> Stack:
    """The stack, for gearworkers' own guarantees."""
    assert session_stack is not None
    return session_stack


@pytest.fixture(scope="session")
def registry(disk: Path) -> Iterator[Registry]:
    """A registry on loopback."""
    registry = Registry(disk / "registry")
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture(scope="session")
def session_host(disk: Path, registry: Registry) -> Iterator[LazyHost]:
    """A second host, for Gear images."""
    with lazy_host(disk / "lazy", registry) as host:
        yield host


@pytest.fixture
def empty_host(session_host: LazyHost) -> LazyHost:
    """The host, up, with nothing stored."""
    session_host.reset()
    return session_host


@pytest.fixture
def host(empty_host: LazyHost) -> LazyHost:
    """The host with the image's layers, and none of its files."""
    empty_host.pull()
    return empty_host
