"""Docker keeps working without Redis or workers, and after a worker or the gateway is killed during a call."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from gearworkers.remote.directory import DirectoryStore
from gearworkers.remote.remote import Remote
from tests.support.dockerd import Dockerd
from tests.support.processes import wait_until
from tests.support.stack import Stack
from tests.support.tiny import tiny_tar


@dataclass
class HalfImport:
    """A `docker import` that has sent only the first half of its tar."""

    process: subprocess.Popen[bytes]
    rest: bytes

    def finish(self) -> int:
        """Send the rest; return docker's exit code."""
        try:
            self.process.communicate(self.rest, timeout=120)
        except BrokenPipeError:
            self.process.wait(timeout=120)
        return self.process.returncode


@pytest.fixture
def half(dockerd: Dockerd, stack: Stack) -> Iterator[HalfImport]:
    """Begin an import in a worker: the layer is in staging, and half of its bytes are sent."""
    while True:
        half = begin_import(dockerd, stack)
        if is_done_by_worker(dockerd):
            break
        abandon(dockerd, half)  # on a busy machine the gateway may do the call itself
    yield half
    abandon(dockerd, half)


def begin_import(dockerd: Dockerd, stack: Stack) -> HalfImport:
    """Begin an import; return when it is in staging."""
    big = tiny_tar({f"big/{n}": f"{n} {time.time_ns()} ".encode() * 10_000 for n in range(40)})
    process = dockerd.popen("import", "-", "half")
    assert process.stdin is not None
    process.stdin.write(big[: len(big) // 2])
    process.stdin.flush()
    build = stack.root / "build"
    wait_until(lambda: build.exists() and any(build.iterdir()), "the import began")
    return HalfImport(process, big[len(big) // 2 :])


def abandon(dockerd: Dockerd, half: HalfImport) -> None:
    """Kill the import if it runs; remove its image."""
    half.process.kill()
    half.process.communicate()
    dockerd.call("rmi", "half")


def is_done_by_worker(dockerd: Dockerd) -> bool:
    """Return whether a worker does the current call."""
    return "0 by gateway" in dockerd.docker("info")


def assert_imports_runs_and_commits(dockerd: Dockerd, name: str) -> None:
    """Check that import, run, commit and save work."""
    dockerd.docker("import", "-", name, stdin=tiny_tar({"etc/name": name.encode()}))
    assert dockerd.run(name, "cat", "/etc/name") == name
    dockerd.run(name, "sh", "-c", "echo b > /b", options=("--name", name))
    dockerd.docker("commit", name, f"{name}-2")
    dockerd.docker("rm", name)
    assert len(dockerd.call("save", f"{name}-2").stdout) > 10_000
    assert dockerd.run(f"{name}-2", "cat", "/b") == "b"
    dockerd.docker("rmi", f"{name}-2", name)


def test_docker_works_while_redis_is_stopped(dockerd: Dockerd, stack: Stack) -> None:
    stack.stop("redis")
    assert_imports_runs_and_commits(dockerd, "noredis")
    assert "redis does not answer" in degraded(dockerd)
    stack.start("redis")
    assert_imports_runs_and_commits(dockerd, "redisback")


def test_docker_works_while_no_worker_is_alive(dockerd: Dockerd, stack: Stack) -> None:
    stack.stop("import", "push")
    assert_imports_runs_and_commits(dockerd, "noworker")
    stack.start("import", "push")
    assert_imports_runs_and_commits(dockerd, "workerback")


def degraded(dockerd: Dockerd) -> str:
    """Return the line of `docker info` that shows the degraded state."""
    lines = dockerd.docker("info").splitlines()
    return next((line.strip().lower() for line in lines if "degraded" in line.lower()), "")


def test_an_import_fails_cleanly_when_its_worker_is_killed(dockerd: Dockerd, stack: Stack, half: HalfImport) -> None:
    stack.kill("import")
    assert half.finish() != 0
    assert dockerd.call("image", "inspect", "half").returncode != 0
    stack.start("import")
    assert_imports_runs_and_commits(dockerd, "afterkill")
    stack.stop("gateway")
    stack.start("gateway")
    stack.wait_until_idle()


def test_an_import_fails_cleanly_when_the_gateway_is_killed(dockerd: Dockerd, stack: Stack, half: HalfImport) -> None:
    stack.kill("gateway")
    stack.start("gateway")
    assert half.finish() != 0
    assert dockerd.call("image", "inspect", "half").returncode != 0
    assert_imports_runs_and_commits(dockerd, "aftergateway")
    stack.wait_until_idle()


def test_an_import_finishes_when_redis_is_killed(dockerd: Dockerd, stack: Stack, half: HalfImport) -> None:
    stack.kill("redis")
    assert half.finish() == 0
    assert dockerd.run("half", "cat", "/big/39").startswith("39 ")
    stack.start("redis")


def test_an_import_aborted_by_the_client_leaves_nothing(dockerd: Dockerd, stack: Stack, half: HalfImport) -> None:
    half.process.kill()
    half.process.communicate()
    stack.wait_until_idle()
    assert dockerd.call("image", "inspect", "half").returncode != 0


def test_a_commits_new_objects_reach_the_remote_in_the_background(dockerd: Dockerd, stack: Stack) -> None:
    remote = Remote(DirectoryStore(stack.directory.parent / "remote"))
    dockerd.run("tiny", "sh", "-c", "seq 100000 > /pushed", options=("--name", "topush"))
    dockerd.docker("commit", "topush", "topush")
    content = "".join(f"{n}\n" for n in range(1, 100_001)).encode()
    digest = hashlib.sha256(content).digest()
    wait_until(lambda: remote.has([digest]) == [digest], "the file is in the remote")
    assert b"".join(remote.fetch(digest)) == content
    dockerd.docker("rm", "topush")
    dockerd.docker("rmi", "topush")
