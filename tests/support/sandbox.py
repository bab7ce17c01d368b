"""A sandbox for tests: private namespaces, so that no mount or process outlives a run.

``python -m tests.support.sandbox COMMAND…`` runs COMMAND with its own processes, mounts, network (loopback only) and
IPC, an empty /run/docker and /run/containerd, and a scratch directory. The process outside forwards signals and removes
the scratch directory and the cgroups at the end. If it is killed, the kernel kills all processes inside
(PR_SET_PDEATHSIG, and the end of a PID namespace's first process), the mounts end with their namespace, and the next
sandbox removes the scratch directory and the cgroups.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

PREFIX = "gear-sandbox-"
MARKER = Path("/run/docker/gear-sandbox")
"""Exists only inside; contains the path of the scratch directory."""
CGROUPS = Path("/sys/fs/cgroup")
GRACE_S = 20.0
"""Time after a signal before COMMAND is killed."""

_CLONE_NEWNS = 0x00020000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def is_inside() -> bool:
    """Return whether this process runs in a sandbox."""
    return MARKER.exists()


def scratch() -> Path:
    """Return the sandbox's directory on the host's file system; removed when the sandbox ends."""
    return Path(MARKER.read_text())


def cgroup_parent() -> str:
    """Return the cgroup for all containers of this sandbox."""
    return f"/{scratch().name}"


def run(command: Sequence[str]) -> int:
    """Run *command* in a new sandbox; return its exit code, or 128 + the signal that ended it."""
    if os.geteuid() != 0:
        sys.exit("cannot make a sandbox: run as root")
    base = Path(os.environ.get("TMPDIR", "/var/tmp"))
    with _locked(base):  # no other sandbox's sweep finds the new directory before it is locked
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
    """Remove the leftovers of killed sandboxes: unlocked scratch directories, and their cgroups."""
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
    """Start the first process of a new PID namespace; return its pid outside."""
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
    """Forward signals and wait for the end; kill after a second signal or after GRACE_S.

    Returns:
        The exit code, or 128 + the signal that ended the process.
    """
    was_signalled = False

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal was_signalled
        os.kill(pid, signal.SIGKILL if was_signalled else number)
        was_signalled = True
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    for number in (*_FORWARDED, signal.SIGALRM):
        signal.signal(number, forward)
    _, status = os.waitpid(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _become_init(command: Sequence[str], directory: Path) -> NoReturn:
    """Set up the namespaces, run *command*, reap orphans, exit with the exit code of *command*."""
    os.setsid()
    _libc_call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    _libc_call("unshare", _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC)
    _reject_chroot()
    _set_up_mounts(directory)
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


def _reject_chroot() -> None:
    """Fail in a chroot: runc enters a container's mounts by setns(2), so `docker exec` would run outside the chroot."""
    root, here = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in ("/", "."))
    mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    _libc_call("setns", mounts, _CLONE_NEWNS)  # sets this process's root to the root of the mount namespace
    is_chroot = not os.path.samestat(os.fstat(root), os.stat("/"))
    os.fchdir(root)
    os.chroot(".")
    os.fchdir(here)
    for fd in (root, here, mounts):
        os.close(fd)
    if is_chroot:
        raise RuntimeError("cannot run containers in a chroot; use systemd-nspawn or pivot_root")


def _set_up_mounts(directory: Path) -> None:
    """Mount /proc, an empty /run/docker and /run/containerd; bring loopback up."""
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
    MARKER.write_text(str(directory))


def _libc_call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
