"""A minimal root file system, for tests that need only a few commands in a container."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

_VENV_BUSYBOX = Path(sys.executable).with_name("busybox")
BUSYBOX = _VENV_BUSYBOX if _VENV_BUSYBOX.exists() else Path("/usr/bin/busybox")
"""A static busybox; set-up puts it into .venv if the system has a dynamic one."""
APPLETS: tuple[str, ...] = ("sh", "true", "false", "cat", "echo", "sleep", "ls", "rm", "mkdir", "mv", "ln", "chmod")
APPLETS += ("chown", "touch", "dd", "tar", "find", "stat", "sort", "seq", "test", "cp", "head", "wc")


def tiny_tar(files: Mapping[str, bytes] | None = None) -> bytes:
    """Return a tar of busybox with symlinks for its applets, /tmp, /etc and *files*."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, mode in (("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777)):
            tar.addfile(_info(name, tarfile.DIRTYPE, mode))
        busybox = _info("bin/busybox", tarfile.REGTYPE, 0o755)
        content = BUSYBOX.read_bytes()
        busybox.size = len(content)
        tar.addfile(busybox, io.BytesIO(content))
        for applet in APPLETS:
            link = _info(f"bin/{applet}", tarfile.SYMTYPE, 0o777)
            link.linkname = "busybox"
            tar.addfile(link)
        _add(tar, files or {})
    return buffer.getvalue()


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """Return a tar of plain files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        _add(tar, files)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        info = _info(name, tarfile.REGTYPE, 0o644)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _info(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = kind, mode, 1_600_000_000
    return info
