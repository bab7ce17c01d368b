"""A machine that runs systemd: systemd-nspawn with this host's /usr, but its own /etc and /var.

It runs only inside a sandbox, in the sandbox's cgroup and network. The checkout is mounted at /opt/gearworkers.
containerd comes from `newer_docker`, since this host's may be too old for gearworkers. Docker is this host's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gearworkers.containerd.config import snippet
from tests.support import sandbox
from tests.support.newer_docker import containerd_version, programs
from tests.support.processes import Daemon
from tests.support.stack import CHECKOUT

HOME = Path("/opt/gearworkers")
CONTAINERD_CONFIG = "etc/containerd/config.toml"
"""The path in the machine's root. The file contains the output of `gear containerd-config`."""
UNITS = Path("etc/systemd/system")
USERS = "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n"
GROUPS = "root:x:0:\ndocker:x:999:\nnogroup:x:65534:\n"
_USR_LINKS = ("bin", "sbin", "lib", "lib64")
_DIRECTORIES = ("usr", "root", "run", "proc", "sys", "dev", "tmp", "opt", "var/lib", "var/log/journal")
_CONTAINERD_PROGRAMS = ("containerd", "ctr", "containerd-shim-runc-v2")
_CONTAINERD_SETTINGS = (Path("/run/gear/containerd.sock"), Path("/var/lib/gear"))
_POWER_OFF = signal.SIGRTMIN + 4  # systemd(1), "Signals"
_WRITABLE_CGROUPS = """[Service]
ExecStartPre=-/bin/mount -o remount,rw /sys/fs/cgroup
ExecStartPre=-/bin/sh -c 'for controller in /sys/fs/cgroup/*/; do mount -o remount,bind,rw $controller; done'
"""
"""nspawn mounts the controllers of cgroup v1 read-only."""

_VISIBLE_CHECKOUT = f"[Service]\nProtectHome=no\nBindReadOnlyPaths={CHECKOUT}\n"
"""The checkout's Python may be below /home, and the checkout below /tmp; DynamicUser= hides both."""


@dataclass(frozen=True)
class Machine:
    """A booted machine; `directory` is its root."""

    directory: Path
    nspawn: Daemon

    def call(self, *command: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a command in the machine; return the completed process, even if it failed."""
        return self._call_beside(self._init_pid(), command, stdin)

    def run(self, *command: str, stdin: bytes = b"") -> str:
        """Run a command in the machine; return its stdout, stripped.

        Raises:
            AssertionError: The command failed.
        """
        done = self.call(*command, stdin=stdin)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout + done.stderr!r}\n{self.journal()}"
        return done.stdout.decode().strip()

    def journal(self) -> str:
        """Return the end of the journal."""
        return self.call("journalctl", "--no-pager", "-o", "cat", "-n", "60").stdout.decode(errors="replace")

    def stopped_units(self) -> list[str]:
        """Return the units that systemd has stopped, in order; works on a machine that is off too."""
        command = ["journalctl", f"--directory={self.directory}/var/log/journal", "-o", "json", "JOB_TYPE=stop"]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        return [entry["UNIT"] for entry in map(json.loads, lines) if "JOB_RESULT" in entry]

    def is_up(self) -> bool:
        """Return whether the machine's dockerd answers."""
        # While nspawn starts, its children are short-lived.
        return any(self._call_beside(pid, ["docker", "version"]).returncode == 0 for pid in self._children())

    def power_off(self) -> None:
        """Make systemd shut the machine down; return when it is off."""
        os.kill(self._init_pid(), _POWER_OFF)
        assert self.nspawn.process is not None
        assert self.nspawn.process.wait(180) == 0, self.nspawn.log_tail()

    def _call_beside(self, pid: int, command: Sequence[str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        enter = ["nsenter", "--all", f"--target={pid}", f"--wd={os.sep}"]
        environ = {"PATH": "/usr/sbin:/usr/bin", "HOME": "/root"}
        return subprocess.run([*enter, *command], env=environ, input=stdin, capture_output=True, timeout=120)

    def _init_pid(self) -> int:
        return self._children()[0]

    def _children(self) -> list[int]:
        pid = self.nspawn.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def booted(directory: Path) -> Iterator[Machine]:
    """Boot a machine with the units of packaging/systemd, gear.target, and a dockerd and a containerd that use them.

    dockerd runs its containers in the same containerd, in the namespace moby. It stores its images by the graph driver.

    Args:
        directory: The machine's root, made here; on a file system that gearworkers can use.
    """
    _make_root(directory)
    _private_run_directory()
    machine = Machine(directory, Daemon(_command(directory), directory.with_suffix(".log"), _environ()))
    machine.nspawn.start()
    try:
        machine.nspawn.wait_until(machine.is_up, "the machine's dockerd")
        yield machine
    finally:
        if machine.nspawn.is_running():
            machine.nspawn.stop()


def _make_root(root: Path) -> None:
    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True)
    for name in _USR_LINKS:
        if Path("/", name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    settings = {"experimental": True, "storage-driver": "gear", "bridge": "none", "iptables": False}
    files = {
        "etc/machine-id": f"{uuid.uuid4().hex}\n",
        "etc/os-release": Path("/etc/os-release").read_text(),
        "etc/passwd": USERS,
        "etc/group": GROUPS,
        "etc/docker/daemon.json": json.dumps({**settings, "cgroup-parent": sandbox.cgroup_parent()}),
        CONTAINERD_CONFIG: snippet(containerd_version(), *_CONTAINERD_SETTINGS, cri=False),
        "etc/gearworkers/environment": (CHECKOUT / "packaging" / "systemd" / "environment").read_text(),
        f"{UNITS}/default.target": "[Unit]\nWants=docker.service\n",
        f"{UNITS}/docker.service.d/cgroups.conf": _WRITABLE_CGROUPS,
        f"{UNITS}/gear-manager.service.d/home.conf": _VISIBLE_CHECKOUT,
    }
    for unit in (CHECKOUT / "packaging" / "systemd").glob("gear*"):
        files[f"{UNITS}/{unit.name}"] = unit.read_text()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["systemctl", f"--root={root}", "enable", "-q", "gear.target"], check=True)


def _private_run_directory() -> None:
    """Mount a tmpfs on /run/systemd: nspawn leaves files there, which end with the sandbox."""
    run = Path("/run/systemd")
    run.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(run)], check=True)


def _command(root: Path) -> list[str]:
    """Return the command for nspawn in the sandbox's cgroups, without the host's systemd."""
    cgroups = [sandbox.CGROUPS] if (sandbox.CGROUPS / "cgroup.procs").exists() else list(sandbox.CGROUPS.glob("*/"))
    # A new cpuset of cgroup v1 accepts no process until it has processors; nspawn needs no cpuset of its own.
    own = [path / sandbox.scratch().name for path in cgroups if not (path / "cpuset.cpus").exists()]
    moves = [f"mkdir -p {path} && echo $$ > {path}/cgroup.procs" for path in own]
    binds = [f"--bind-ro={path}" for path in {"/usr", str(CHECKOUT), sys.base_prefix}]
    options = ["--boot", "--quiet", f"--directory={root}", "--machine=machine", "--register=no", "--keep-unit"]
    options += ["--capability=all", "--bind=/dev/fuse", "--resolv-conf=off", "--timezone=off", "--link-journal=no"]
    options += [f"--bind-ro={(programs() / name).resolve()}:/usr/bin/{name}" for name in _CONTAINERD_PROGRAMS]
    options += ["--console=pipe", *binds, f"--bind-ro={CHECKOUT}:{HOME}"]
    return ["sh", "-c", " && ".join([*moves, 'exec systemd-nspawn "$@"']), "nspawn", *options]


def _environ() -> dict[str, str]:
    """Return nspawn's environment: dockerd needs keys, /sys and /proc/sys, which nspawn forbids by default."""
    return {**os.environ, "SYSTEMD_SECCOMP": "0", "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "yes"}
