"""Private namespaces for everything that runs a dockerd, so that nothing stays mounted or running, whatever happens.

``python -m tests.support.sandbox COMMAND…`` runs COMMAND with its own processes, mounts, network (loopback only) and
IPC, its own empty /run/docker and /run/containerd, and a scratch directory. The process that was started stays
outside, hands signals in, and clears up behind; should it be killed, the kernel kills the inside with it
(PR_SET_PDEATHSIG, and the death of a PID namespace's first process), its mounts go with their namespace, and the
next sandbox sweeps the scratch directory and the cgroups.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

PREFIX = "gear-sandbox-"
MARK = Path("/run/docker/gear-sandbox")
"""Exists inside only; holds the scratch directory's path."""
CGROUPS = Path("/sys/fs/cgroup")
GRACE_S = 20.0
"""Seconds that COMMAND has after a signal before it is killed."""

_CLONE_NEWNS = 0x00020000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def is_inside() -> bool:
    """Whether this process runs in a sandbox."""
    return MARK.exists()


def scratch() -> Path:
    """The sandbox's own directory on the host's file system; removed at its end."""
    return Path(MARK.read_text())


def cgroup_parent() -> str:
    """The cgroup for all containers of this sandbox."""
    return f"/{scratch().name}"


def run(command: Sequence[str]) -> int:
    """Run *command* in a new sandbox; returns its exit code, or 128 + the signal that ended it."""
    if os.geteuid() != 0:
        sys.exit("root is needed: namespaces, mounts and a dockerd of its own")
    base = Path(os.environ.get("TMPDIR", "/var/tmp"))
    with _locked(base):  # nobody else's sweep finds the new directory before it is locked
        sweep(base)
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        lock = _opened(directory)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        return _supervise(_fork_inside(command, directory))
    finally:
        _remove(directory)
        os.close(lock)


def sweep(base: Path) -> None:
    """Remove the leftovers of killed sandboxes: scratch directories without a lock holder, and their cgroups."""
    for directory in base.glob(f"{PREFIX}*"):
        try:
            fd = _opened(directory)
        except FileNotFoundError:
            continue  # its sandbox has just ended
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            _remove(directory)
        finally:
            os.close(fd)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = _opened(directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _opened(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    for found in (*CGROUPS.glob(directory.name), *CGROUPS.glob(f"*/{directory.name}")):
        for path, _, _ in os.walk(found, topdown=False):
            Path(path).rmdir()


def _fork_inside(command: Sequence[str], directory: Path) -> int:
    """Start the first process of a new PID namespace; returns its pid outside."""
    _libc_call("unshare", _CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        try:
            _become_init(command, directory)
        except BaseException as exc:
            print(f"sandbox: {exc!r}", file=sys.stderr, flush=True)
        os._exit(125)
    return pid


def _supervise(pid: int) -> int:
    """Hand signals in and wait; a second signal, or none of the grace left, kills."""
    asked_at: list[float] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        os.kill(pid, signal.SIGKILL if asked_at else number)
        asked_at.append(time.monotonic())
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    for number in (*_FORWARDED, signal.SIGALRM):
        signal.signal(number, forward)
    _, status = os.waitpid(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _become_init(command: Sequence[str], directory: Path) -> NoReturn:
    """Lay out the namespaces, run *command*, reap orphans, exit with its exit code."""
    os.setsid()
    _libc_call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    _libc_call("unshare", _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC)
    _refuse_chroot()
    _lay_out(directory)
    child = subprocess.Popen(command)

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _refuse_chroot() -> None:
    """In a chroot `docker exec` would run in the root outside of it: runc enters a container's mounts by setns(2)."""
    root, here = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in ("/", "."))
    mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    _libc_call("setns", mounts, _CLONE_NEWNS)  # makes the root of all mounts this process's
    is_chroot = not os.path.samestat(os.fstat(root), os.stat("/"))
    os.fchdir(root)
    os.chroot(".")
    os.fchdir(here)
    for fd in (root, here, mounts):
        os.close(fd)
    if is_chroot:
        raise RuntimeError("this is a chroot, in which no container may run; use systemd-nspawn, or pivot_root")


def _lay_out(directory: Path) -> None:
    """Private mounts: /proc of this namespace, empty /run/docker and /run/containerd; loopback up."""
    for path in ("/run/docker", "/run/containerd"):
        Path(path).mkdir(parents=True, exist_ok=True)
    for arguments in (
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "proc", "proc", "/proc"],
        ["mount", "-t", "tmpfs", "tmpfs", "/run/docker"],
        ["mount", "-t", "tmpfs", "tmpfs", "/run/containerd"],
        ["ip", "link", "set", "lo", "up"],
    ):
        subprocess.run(arguments, check=True, stdin=subprocess.DEVNULL)
    MARK.write_text(str(directory))


def _libc_call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
