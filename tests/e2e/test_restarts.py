"""Containers survive restarts and kills of all daemons."""

from __future__ import annotations

import itertools

import pytest

from tests.e2e.test_containers import started
from tests.support.dockerd import Dockerd
from tests.support.stack import Stack
from tests.support.tiny import tiny_tar


@pytest.fixture
def running(dockerd: Dockerd) -> str:
    """Start a container that has written /mine; return its id."""
    container = started(dockerd, "debian")
    dockerd.docker("exec", container, "sh", "-c", "echo mine > /mine")
    return container


def assert_works(dockerd: Dockerd, running: str) -> None:
    """Check that the running container can read its files, restart and be removed, and that a new one runs."""
    assert dockerd.docker("exec", running, "sh", "-c", "cat /mine; ls /usr/bin/git") == "mine\n/usr/bin/git"
    assert dockerd.docker("diff", running).splitlines() == ["A /mine"]
    dockerd.docker("restart", "-t", "0", running)
    assert dockerd.docker("exec", running, "cat", "/mine") == "mine"
    dockerd.docker("rm", "-f", running)
    assert dockerd.run("debian", "cat", "/etc/debian_version") != ""


def test_containers_survive_a_restart_of_dockerd(dockerd: Dockerd, running: str) -> None:
    dockerd.restart()
    assert_works(dockerd, running)


def test_containers_survive_a_killed_dockerd(dockerd: Dockerd, running: str) -> None:
    dockerd.kill()
    dockerd.start()
    assert_works(dockerd, running)


def test_containers_survive_a_killed_gateway(dockerd: Dockerd, stack: Stack, running: str) -> None:
    stack.kill("gateway")
    stack.start("gateway")
    assert_works(dockerd, running)


def test_docker_waits_for_a_gateway_that_restarts(dockerd: Dockerd, stack: Stack) -> None:
    stack.kill("gateway")
    waiting = dockerd.popen("run", "--rm", "--network", "none", "tiny", "echo", "came back")
    stack.start("gateway")
    output, _ = waiting.communicate(timeout=60)
    assert output.strip() == b"came back"


@pytest.mark.slow
@pytest.mark.parametrize("order", list(itertools.permutations(("gateway", "redis", "dockerd")))[::2], ids="-".join)
def test_an_image_runs_after_a_restart_of_everything_in_any_order(
    dockerd: Dockerd, stack: Stack, running: str, order: tuple[str, ...]
) -> None:
    dockerd.docker("import", "-", "fresh", stdin=tiny_tar({"etc/fresh": b"fresh\n"}))
    for name in order:
        if name == "dockerd":
            dockerd.restart()
        else:
            stack.stop(name)
            stack.start(name)
    stack.stop("import", "push")
    stack.start("import", "push")
    assert dockerd.run("fresh", "cat", "/etc/fresh") == "fresh"
    dockerd.docker("rmi", "fresh")
    assert_works(dockerd, running)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["dockerd", "import"])
def test_an_image_runs_after_a_full_stop_whichever_process_starts_first(
    dockerd: Dockerd, stack: Stack, first: str
) -> None:
    dockerd.docker("import", "-", "fresh", stdin=tiny_tar({"etc/fresh": b"fresh\n"}))
    dockerd.stop()
    stack.stop()
    daemons = {
        "dockerd": dockerd.daemon,
        **{name: stack.daemons[name] for name in ("import", "gateway", "redis", "push")},
    }
    daemons.pop(first).start()
    for daemon in daemons.values():
        daemon.start()
    dockerd.daemon.wait_until(dockerd.answers, "dockerd's API")
    assert dockerd.run("fresh", "cat", "/etc/fresh") == "fresh"
    dockerd.docker("rmi", "fresh")
    assert dockerd.run("debian", "cat", "/etc/debian_version") != ""
