"""A host whose containerd and Docker use gearworkers with a remote, and a registry with an image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.cli.image_names import in_namespace
from gearworkers.cli.inspect_image import inspect
from gearworkers.engine.engine import Engine
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import RegistrySettings, Settings
from tests.support.containerd_host import Containerd, ContainerdDocker
from tests.support.registry import Registry
from tests.support.stack import Stack


@dataclass
class ContainerdHost:
    """A stack with a remote, its containerd and Docker, and an image in a registry."""

    stack: Stack
    containerd: Containerd
    docker: ContainerdDocker
    registry: Registry
    image: str
    """Name of the image."""

    def pull(self, namespace: str = "default") -> None:
        """Pull the image with ctr."""
        pull = ("images", "pull", "--plain-http", "--snapshotter", "gear", self.image)
        self.containerd.ctr(*pull, namespace=namespace)

    def run(self, container: str, *command: str, namespace: str = "default") -> str:
        """Run a command in a new container with ctr; return its output."""
        arguments = ("run", "--rm", "--snapshotter", "gear", self.image, container, *command)
        return self.containerd.ctr(*arguments, namespace=namespace)

    def remove(self, namespace: str = "default") -> None:
        """Remove the image from a namespace of containerd."""
        self.containerd.ctr("images", "rm", "--sync", self.image, namespace=namespace)

    def reset(self) -> None:
        """Remove all images and objects, and what the processes know of them."""
        self.docker.remove_everything()
        for namespace in ("default", "other"):
            for name in self.containerd.ctr("images", "ls", "-q", namespace=namespace).split():
                self.containerd.ctr("images", "rm", "--sync", name, namespace=namespace)
        self.stack.stop("lazyfs")
        self.collect_garbage()
        for link in (self.stack.root / "arrivals").glob("*/*"):
            link.unlink()
        self.stack.start("lazyfs")
        assert not self.objects()

    @property
    def settings(self) -> Settings:
        """The settings of the stack."""
        return Settings.from_environ(self.stack.environ())

    def collect_garbage(self) -> None:
        """Do what `gear gc` does."""
        Engine.of(self.settings).collect_garbage()

    def inspect(self, name: str, namespace: str = "") -> dict[str, str]:
        """Return what `gear inspect` prints."""
        return dict(inspect(*in_namespace(self.settings, name, namespace)))

    def objects(self) -> list[Path]:
        """Return the objects in the store."""
        return [path for path in (self.stack.root / "public").glob("*/*") if path.is_file()]

    def has(self, content: bytes) -> bool:
        """Whether the store has this content."""
        return ObjectStore(self.stack.root / "public").has(hashlib.sha256(content).digest())

    def gear(self, *arguments: str) -> dict[str, str]:
        """Run a `gear` command; return its output lines by key."""
        done = self.stack.gear(*arguments)
        assert done.returncode == 0, done.stderr
        return {line[:16].strip(): line[16:].strip() for line in done.stdout.splitlines()}

    def repository(self, name: str) -> Repository:
        """A repository of the registry."""
        return Repository.of(RegistrySettings(), Reference.parse(f"{self.registry.host}/{name}"))

    def profiles(self) -> list[Path]:
        """Return the profiles in the remote."""
        return list((Path(self.stack.settings["GEAR_REMOTE"]) / "documents" / "profiles").rglob("@*"))

    @property
    def remote(self) -> Path:
        """The remote, a directory."""
        return Path(self.stack.settings["GEAR_REMOTE"])


@contextmanager
def containerd_host(disk: Path, name: str, registry_port: int, image: str) -> Iterator[ContainerdHost]:
    """Run a host with an empty remote and an empty registry.

    Args:
        disk: Receives the data.
        name: The stack's; unique in the sandbox.
        registry_port: The registry's port; unique likewise.
        image: Name of the image in the registry, which the caller pushes.
    """
    remote, registry = disk / f"{name}-remote", Registry(disk / f"{name}-registry", registry_port)
    remote.mkdir()
    registry.start()
    stack = Stack(disk / f"{name}-stack", name, {"GEAR_REMOTE": str(remote)})
    containerd = Containerd(disk / f"{name}-containerd", stack)
    docker = ContainerdDocker(containerd)
    stack.set(CONTAINERD_ADDRESS=str(containerd.socket), DOCKER_HOST=f"unix://{docker.socket}")
    try:
        stack.start()
        containerd.start()
        docker.start()
        yield ContainerdHost(stack, containerd, docker, registry, f"{registry.host}/{image}")
    finally:
        docker.stop()
        containerd.stop()
        stack.stop()
        registry.stop()
    stack.check_log("gateway")
