"""A private dockerd with its own socket, data root, exec root, containerd and cgroup; only inside a sandbox."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import sandbox
from tests.support.processes import PATIENCE_S, Daemon

CLIENT = "/usr/bin/docker"
FAR_NETWORK = "192.0.2.0/24"
"""The network of a benchmark's servers behind a slow link (RFC 5737: reserved for documentation)."""
NO_NETWORK = ("--network", "none")
"""Needed for each container: a sandbox has no bridge."""


class DockerError(AssertionError):
    """A docker command failed; the text contains the command and its output."""


@dataclass
class Dockerd:
    """One dockerd with one storage driver.

    Args:
        name: Unique among the daemons of one sandbox; short, since socket paths contain it.
        directory: Contains the data root and the log.
        driver: `gear` (any plugin's name) or `overlay2`.
        options: Further arguments for dockerd.
    """

    name: str
    directory: Path
    driver: str
    options: tuple[str, ...] = ()
    daemon: Daemon = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.daemon = Daemon(self._command(), self.directory / "dockerd.log", self.environ())

    @property
    def run_dir(self) -> Path:
        """Directory of sockets and pid files; on the sandbox's tmpfs, with a short path."""
        return Path("/run/docker/private") / self.name

    @property
    def socket(self) -> Path:
        """The API's Unix socket."""
        return self.run_dir / "docker.sock"

    @property
    def data_root(self) -> Path:
        """dockerd's --data-root."""
        return self.directory / "data"

    def environ(self) -> dict[str, str]:
        """Return the environment of dockerd and its clients, without the user's Docker configuration."""
        return {
            **os.environ,
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_CONFIG": str(self.run_dir / "config"),
            "DOCKERD_DEPRECATED_GRAPHDRIVER_PLUGINS": "1",
            "TMPDIR": str(sandbox.scratch()),
        }

    def _command(self) -> list[str]:
        return [
            "dockerd",
            "--experimental",
            f"--storage-driver={self.driver}",
            f"--host=unix://{self.socket}",
            f"--data-root={self.data_root}",
            f"--exec-root={self.run_dir}/exec",
            f"--pidfile={self.run_dir}/docker.pid",
            f"--cgroup-parent={sandbox.cgroup_parent()}",
            "--exec-opt=native.cgroupdriver=cgroupfs",
            "--bridge=none",
            "--iptables=false",
            "--live-restore",
            "--insecure-registry=127.0.0.1",
            f"--insecure-registry={FAR_NETWORK}",
            *self.options,
        ]

    def start(self, timeout_s: float = PATIENCE_S) -> None:
        """Start dockerd; return when it answers."""
        (self.run_dir / "docker.pid").unlink(missing_ok=True)
        self.daemon.start()
        self.daemon.wait_until(self.answers, "dockerd's API", timeout_s)

    def stop(self) -> None:
        """Stop dockerd with SIGTERM; containers keep running (--live-restore)."""
        self.daemon.stop()

    def kill(self) -> None:
        """Kill dockerd; containers and their containerd keep running."""
        self.daemon.kill()

    def restart(self) -> None:
        """Stop and start dockerd."""
        self.stop()
        self.start()

    def answers(self) -> bool:
        """Return whether the API answers."""
        return self.socket.exists() and self.call("version").returncode == 0

    def call(
        self, *arguments: str, stdin: Path | bytes | None = None, buildkit: bool = False, timeout_s: float = 300.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a docker command; return the completed process, even if it failed."""
        environ = self.environ() | {"DOCKER_BUILDKIT": str(int(buildkit))}
        command = [CLIENT, *arguments]
        if isinstance(stdin, Path):
            with stdin.open("rb") as file:
                return subprocess.run(command, env=environ, stdin=file, capture_output=True, timeout=timeout_s)
        return subprocess.run(command, env=environ, input=stdin or b"", capture_output=True, timeout=timeout_s)

    def docker(
        self, *arguments: str, stdin: Path | bytes | None = None, buildkit: bool = False, timeout_s: float = 300.0
    ) -> str:
        """Run a docker command; return its stdout, stripped.

        Raises:
            DockerError: The command failed.
        """
        done = self.call(*arguments, stdin=stdin, buildkit=buildkit, timeout_s=timeout_s)
        if done.returncode != 0:
            output = (done.stdout + done.stderr).decode(errors="replace")
            raise DockerError(
                f"docker {' '.join(arguments)}: exit {done.returncode}\n{output}\n{self.daemon.log_tail()}"
            )
        return done.stdout.decode(errors="replace").strip()

    def run(self, image: str, *command: str, options: tuple[str, ...] = ("--rm",)) -> str:
        """Run `docker run` without a network; return its output (the container's id if *options* has `-d`)."""
        return self.docker("run", *NO_NETWORK, *options, image, *command)

    def popen(self, *arguments: str, stdin: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        """Start a docker command and return at once; its output is piped."""
        return subprocess.Popen(
            [CLIENT, *arguments],
            env=self.environ() | {"DOCKER_BUILDKIT": "0"},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def remove_everything(self) -> None:
        """Remove all containers and images."""
        if containers := self.docker("ps", "-aq").split():
            self.docker("rm", "-f", *containers)
        self.docker("system", "prune", "-af")
