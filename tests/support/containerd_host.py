"""A private containerd, and a Docker on its image store; only inside a sandbox."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gearworkers.containerd.config import Version, snippet
from tests.support import sandbox
from tests.support.newer_docker import containerd_version, programs
from tests.support.processes import Daemon, wait_until
from tests.support.stack import Stack

_PATHS = """\
root = "{directory}/root"
state = "{run_dir}/state"
disabled_plugins = {disabled}
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
"""
_CRI = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"]
"""The plugins that serve Kubernetes."""


@contextmanager
def stack_for_containerd(directory: Path, name: str, settings: Mapping[str, str] | None = None) -> Iterator[Stack]:
    """Run a stack for a `Containerd` that is started later.

    Args:
        directory: The stack's.
        name: The stack's; unique in the sandbox.
        settings: Further GEAR_… variables.
    """
    stack = Stack(directory, name, dict(settings or {}))
    stack.set(CONTAINERD_ADDRESS=str(_socket(name)))
    stack.start()
    try:
        yield stack
    finally:
        stack.stop()


def _socket(name: str) -> Path:
    """The API of the containerd with this name; a short path."""
    return Path("/run/docker/private") / f"{name}-ctr" / "containerd.sock"


@dataclass
class Containerd:
    """One containerd that uses a stack as its snapshotter and differ.

    Args:
        directory: Receives its root and log.
        stack: Its gateway serves this containerd; None for a containerd without gearworkers.
        cri: Whether it serves Kubernetes.
    """

    directory: Path
    stack: Stack | None
    cri: bool = False
    daemon: Daemon = field(init=False)

    def __post_init__(self) -> None:
        for path in (self.directory, self.run_dir):
            path.mkdir(parents=True, exist_ok=True)
        disabled = json.dumps([] if self.cri else _CRI)
        paths = _PATHS.format(directory=self.directory, run_dir=self.run_dir, socket=self.socket, disabled=disabled)
        head, rest = (self.snippet() if self.stack else "version = 2\n").split("\n", 1)
        self.config.write_text(f"{head}\n{paths}{rest}")
        command = [str(programs() / "containerd"), "--config", str(self.config)]
        self.daemon = Daemon(command, self.directory / "containerd.log", environ())

    @property
    def config(self) -> Path:
        """The configuration file; changes take effect at the next start."""
        return self.directory / "config.toml"

    def add_settings(self, header: str, *lines: str) -> None:
        """Add settings to the table *header* of the configuration file."""
        text, table = self.config.read_text(), f"\n[{header}]\n"
        if table not in text:
            text += table
        self.config.write_text(text.replace(table, table + "".join(f"  {line}\n" for line in lines)))

    @property
    def run_dir(self) -> Path:
        """Sockets and state; short paths."""
        return self.socket.parent

    @property
    def socket(self) -> Path:
        """containerd's API."""
        return _socket(self.stack.name if self.stack else self.directory.name)

    @cached_property
    def version(self) -> Version:
        """The version of the program."""
        return containerd_version()

    def snippet(self) -> str:
        """The text that `gear containerd-config` prints for this containerd."""
        assert self.stack is not None
        return snippet(self.version, self.stack.containerd_socket, self.stack.root, cri=self.cri)

    def start(self) -> None:
        """Start containerd and return when it answers."""
        self.daemon.start()
        self.daemon.wait_until(lambda: self.call("version").returncode == 0, "containerd's API")

    def stop(self) -> None:
        """End containerd in order; containers live on."""
        self.daemon.stop()

    def wait_for_gateway(self) -> None:
        """Return when containerd is connected to the gateway again, which may take some seconds after a restart."""
        gear = ("snapshots", "--snapshotter", "gear")
        wait_until(lambda: self.call(*gear, "prepare", "probe").returncode == 0, "containerd calls the gateway")
        self.ctr(*gear, "rm", "probe")

    def call(self, *arguments: str, namespace: str = "default") -> subprocess.CompletedProcess[bytes]:
        """Run `ctr` with these arguments; return the result whatever the outcome."""
        command = [str(programs() / "ctr"), "-a", str(self.socket), "-n", namespace, *arguments]
        return subprocess.run(command, env=environ(), capture_output=True, timeout=120)

    def ctr(self, *arguments: str, namespace: str = "default") -> str:
        """Run `ctr`; return its stdout, stripped.

        Raises:
            AssertionError: The command failed.
        """
        done = self.call(*arguments, namespace=namespace)
        output = (done.stdout + done.stderr).decode(errors="replace")
        assert done.returncode == 0, f"ctr {' '.join(arguments)}: {output}\n{self.daemon.log_tail()}"
        return done.stdout.decode(errors="replace").strip()

    def snapshots(self, namespace: str = "default") -> list[str]:
        """The names of all snapshots of gear."""
        lines = self.ctr("snapshots", "--snapshotter", "gear", "ls", namespace=namespace).splitlines()
        return [line.split()[0] for line in lines[1:]]

    def collect_garbage(self, namespace: str = "default") -> None:
        """End all leases, as time does within a day, and wait until containerd has collected its garbage.

        A snapshot is removed as well: containerd looks for lost snapshots only after the removal of another one.
        """
        for lease in self.ctr("leases", "ls", "-q", namespace=namespace).split():
            self.ctr("leases", "rm", lease, namespace=namespace)
        self.ctr("snapshots", "--snapshotter", "gear", "prepare", "probe", namespace=namespace)
        self.ctr("snapshots", "--snapshotter", "gear", "rm", "probe", namespace=namespace)
        self.ctr("leases", "create", "--id", "probe", namespace=namespace)
        self.ctr("leases", "rm", "--sync", "probe", namespace=namespace)


@dataclass
class ContainerdDocker:
    """One dockerd on the image store of a `Containerd`."""

    containerd: Containerd
    daemon: Daemon = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        plugins = self.directory / "config" / "cli-plugins"
        plugins.mkdir(parents=True, exist_ok=True)
        if not (plugins / "docker-buildx").exists():
            (plugins / "docker-buildx").symlink_to((programs() / "docker-buildx").resolve())
        settings = {
            "features": {"containerd-snapshotter": True},
            "storage-driver": "gear" if self.containerd.stack else "overlayfs",
            "containerd": str(self.containerd.socket),
            "data-root": str(self.directory / "data"),
            "exec-root": str(self.run_dir / "exec"),
            "pidfile": str(self.run_dir / "docker.pid"),
            "hosts": [f"unix://{self.socket}"],
            "cgroup-parent": sandbox.cgroup_parent(),
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "bridge": "none",
            "iptables": False,
            "live-restore": True,
            "insecure-registries": ["127.0.0.1", "192.0.2.0/24"],  # the second are those of benchmarks
        }
        (self.directory / "daemon.json").write_text(json.dumps(settings))
        command = [str(programs() / "dockerd"), "--config-file", str(self.directory / "daemon.json")]
        self.daemon = Daemon(command, self.directory / "dockerd.log", environ())

    @property
    def directory(self) -> Path:
        """Data root, configuration and log."""
        return self.containerd.directory / "docker"

    @property
    def run_dir(self) -> Path:
        """Sockets and pid file."""
        return self.containerd.run_dir / "docker"

    @property
    def socket(self) -> Path:
        """dockerd's API."""
        return self.run_dir / "docker.sock"

    def start(self) -> None:
        """Start dockerd and return when it answers."""
        self.begin_start()
        self.daemon.wait_until(lambda: self.call("version").returncode == 0, "dockerd's API")

    def begin_start(self) -> None:
        """Start dockerd and return at once."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "docker.pid").unlink(missing_ok=True)
        self.daemon.start()

    def stop(self) -> None:
        """End dockerd in order; containers live on."""
        self.daemon.stop()

    def call(
        self, *arguments: str, stdin: bytes | Path = b"", buildkit: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `docker` with these arguments; return the result whatever the outcome."""
        command, env = [str(programs() / "docker"), *arguments], self._environ(buildkit=buildkit)
        if isinstance(stdin, Path):
            with stdin.open("rb") as file:
                return subprocess.run(command, env=env, stdin=file, capture_output=True, timeout=300)
        return subprocess.run(command, env=env, input=stdin, capture_output=True, timeout=300)

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `docker` with these arguments."""
        pipe = subprocess.PIPE
        return subprocess.Popen([str(programs() / "docker"), *arguments], env=self._environ(), stdout=pipe, stderr=pipe)

    def _environ(self, *, buildkit: bool = True) -> dict[str, str]:
        return environ() | {
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_CONFIG": str(self.directory / "config"),
            "DOCKER_BUILDKIT": str(int(buildkit)),
        }

    def docker(self, *arguments: str, stdin: bytes | Path = b"", buildkit: bool = True) -> str:
        """Run `docker`; return its stdout, stripped.

        Raises:
            AssertionError: The command failed.
        """
        done = self.call(*arguments, stdin=stdin, buildkit=buildkit)
        output = (done.stdout + done.stderr).decode(errors="replace")
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {output}\n{self.daemon.log_tail()}"
        return done.stdout.decode(errors="replace").strip()

    def run(self, image: str, *command: str, options: tuple[str, ...] = ("--rm",)) -> str:
        """`docker run` without a network; return its output."""
        return self.docker("run", "--network", "none", *options, image, *command)

    def remove_everything(self) -> None:
        """Remove all containers, images and build caches."""
        if containers := self.docker("ps", "-aq").split():
            self.docker("rm", "-f", *containers)
        self.docker("system", "prune", "-af")
        self.docker("builder", "prune", "-af")


def environ() -> dict[str, str]:
    """The environment of the daemons: the programs first in PATH, for the shim."""
    path = os.pathsep.join([str(programs()), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    assert shutil.which("runc", path=path), "runc is missing"
    return {**os.environ, "PATH": path, "TMPDIR": str(sandbox.scratch())}
