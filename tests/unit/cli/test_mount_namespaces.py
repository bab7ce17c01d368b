"""The check of `gear doctor` that containerd sees the gateway's mounts, between real mount namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gearworkers.cli.mount_namespaces import mount_namespace_check
from gearworkers.util.syscalls import umount2
from tests.support.processes import Daemon, listens, wait_until

_LISTEN = (
    "import signal, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); signal.pause()"
)


@pytest.fixture(params=["shared", "private"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on a mount with this propagation."""
    path = tmp_path / "gear"
    path.mkdir()
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", f"--make-{request.param}", path], check=True)
    yield path
    umount2(path)


@contextmanager
def listening(socket: Path, *prefix: str) -> Iterator[Daemon]:
    daemon = Daemon([*prefix, sys.executable, "-c", _LISTEN, str(socket)], socket.with_suffix(".log"), os.environ)
    daemon.start()
    try:
        wait_until(lambda: socket.exists() and listens(socket), "the process listens")
        yield daemon
    finally:
        daemon.stop()


def sees_mounts(daemon: Daemon, root: Path) -> bool:
    """Whether a mount that is made now below *root* appears in the daemon's mount namespace."""
    target = root / "probe"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "probe", target], check=True)
    try:
        return str(target) in Path(f"/proc/{daemon.pid}/mountinfo").read_text()
    finally:
        umount2(target)
        target.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("propagation", ["", "private", "slave", "shared", "unchanged"])
def test_the_check_agrees_with_the_kernel(root: Path, tmp_path: Path, propagation: str) -> None:
    prefix = ("unshare", "--mount", "--propagation", propagation) if propagation else ()
    ours, theirs = tmp_path / "gateway.sock", tmp_path / "containerd.sock"
    with listening(ours), listening(theirs, *prefix) as containerd:
        check = mount_namespace_check(root, ours, theirs)
        assert check.ok == sees_mounts(containerd, root), check
        assert check.ok or ("receives no mounts" in check.found and "rshared" in check.advice)


def test_a_containerd_that_does_not_run_is_named(tmp_path: Path) -> None:
    with listening(tmp_path / "gateway.sock"):
        check = mount_namespace_check(tmp_path, tmp_path / "gateway.sock", tmp_path / "missing.sock")
    assert not check.ok and not check.needed and "missing.sock" in check.found
