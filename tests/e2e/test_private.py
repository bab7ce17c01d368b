"""Files of private images are neither shared nor pushed when images are built, saved, pulled, converted or removed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.remote.directory import DirectoryStore
from gearworkers.remote.remote import Remote
from tests.support.dockerd import Dockerd
from tests.support.lazyhost import LazyHost
from tests.support.processes import wait_until
from tests.support.registry import Registry
from tests.support.stack import Stack


class Traces:
    """Finds the places where a content is stored."""

    def __init__(self, root: Path, remote: Path) -> None:
        self._store = ObjectStore(root / "public")
        self._private = root / "private"
        self._remote = Remote(DirectoryStore(remote))

    def is_public(self, content: str) -> bool:
        return self._store.has(_digest(content))

    def is_pushed(self, content: str) -> bool:
        return bool(self._remote.has([_digest(content)]))

    def private(self) -> list[Path]:
        return list(self._private.glob("*/*/*"))


def _digest(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


@pytest.fixture
def traces(stack: Stack) -> Traces:
    return Traces(stack.root, stack.directory.parent / "remote")


def a_secret() -> str:
    return os.urandom(2000).hex()


def private_dockerfile(secret: str, more: str) -> bytes:
    return f"FROM tiny\nRUN touch /.gear-private\nRUN echo {secret} > /secret\nRUN echo {more} > /more\n".encode()


@pytest.mark.parametrize("buildkit", [False, True], ids=["classic", "buildkit"])
def test_layers_built_on_the_mark_are_private(dockerd: Dockerd, traces: Traces, buildkit: bool, tmp_path: Path) -> None:
    """Files are written, copied from the context and, with BuildKit, copied from a cache mount."""
    secret, copied, more, public = a_secret(), a_secret(), a_secret(), a_secret()
    step = f"echo {more} > /cache/it && cat /cache/it > /more" if buildkit else f"echo {more} > /more"
    mount = "--mount=type=cache,target=/cache " if buildkit else ""
    text = (
        private_dockerfile(secret, more).decode().replace(f"RUN echo {more} > /more", f"COPY it /\nRUN {mount}{step}")
    )
    (tmp_path / "Dockerfile").write_text(text)
    (tmp_path / "it").write_text(copied)
    dockerd.docker("build", "--network", "none", "-t", "private", str(tmp_path), buildkit=buildkit)
    dockerd.docker("build", "-t", "other", "-", stdin=f"FROM tiny\nRUN echo {public} > /it\n".encode())
    wait_until(lambda: traces.is_pushed(f"{public}\n"), "the public files are pushed", 60)
    assert dockerd.run("private", "cat", "/secret", "/more", "/it") == f"{secret}\n{more}\n{copied}"
    for content in (f"{secret}\n", f"{more}\n", copied):
        assert not traces.is_public(content) and not traces.is_pushed(content)
    dockerd.docker("rmi", "private", "other")


def test_an_image_stays_private_when_saved_pushed_and_pulled_and_is_removed_completely(
    dockerd: Dockerd, stack: Stack, traces: Traces, registry: Registry, tmp_path: Path
) -> None:
    secret, more = a_secret(), a_secret()
    name = f"{registry.host}/private:1"
    dockerd.docker("build", "-t", name, "-", stdin=private_dockerfile(secret, more))
    assert len(traces.private()) == 2
    image_id = dockerd.docker("image", "inspect", "-f", "{{.Id}}", name)
    dockerd.docker("save", "-o", str(tmp_path / "saved.tar"), name)
    dockerd.docker("push", name)
    for command in (("load", "-i", str(tmp_path / "saved.tar")), ("pull", name)):
        dockerd.docker("rmi", name)
        assert not traces.private()
        dockerd.docker(*command)
        assert dockerd.docker("image", "inspect", "-f", "{{.Id}}", name) == image_id
        assert dockerd.run(name, "cat", "/secret") == secret
        assert len(traces.private()) == 2 and not traces.is_public(f"{secret}\n")
    stack.set(DOCKER_HOST=f"unix://{dockerd.socket}")
    assert "3 of the layers, with files of their own: 2, " in stack.gear("inspect", name).stdout
    id = dockerd.docker("create", "--name", "writes", name, "sh", "-c", f"echo {more}{more} > /third")
    dockerd.docker("start", "-a", "writes")
    dockerd.docker("commit", "writes", "committed")
    assert dockerd.run("committed", "cat", "/third") == more + more
    assert not traces.is_public(f"{more}{more}\n") and len(traces.private()) == 3
    dockerd.docker("rm", id)
    dockerd.docker("rmi", "committed", name)
    assert not traces.private()


def test_a_converted_private_image_keeps_its_contents_and_runs_on_an_empty_host(
    dockerd: Dockerd, empty_host: LazyHost, registry: Registry
) -> None:
    """The base is fetched lazily; the private layers come with the pull."""
    secret, more = a_secret(), a_secret()
    name, gear = f"{registry.host}/private:2", f"{registry.host}/gear/private:2"
    text = private_dockerfile(secret, more).replace(b"FROM tiny", b"FROM debian", 1)
    dockerd.docker("build", "-t", name, "-", stdin=text)
    dockerd.docker("push", name)
    dockerd.docker("rmi", name)
    done = empty_host.stack.gear("convert", "--local", name, gear)
    assert done.returncode == 0 and "Private layers  3" in done.stdout, done.stderr
    empty_host.dockerd.docker("pull", gear)
    assert empty_host.dockerd.run(gear, "cat", "/secret", "/etc/debian_version").startswith(secret)
    traces = Traces(empty_host.stack.root, empty_host.store)
    assert len(traces.private()) == 2
    assert not traces.is_public(f"{secret}\n") and not traces.is_pushed(f"{secret}\n")
    empty_host.dockerd.docker("rmi", gear)
