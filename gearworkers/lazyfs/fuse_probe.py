"""What this kernel's FUSE offers, found by beginning a connection that nobody sees."""

from __future__ import annotations

import os
from pathlib import Path

from gearworkers.errors import GearError
from gearworkers.lazyfs import fuse_connection, fuse_protocol
from gearworkers.lazyfs.fuse_protocol import InitFlag
from gearworkers.mounts.probe import Check

_NAME = "FUSE"


def check_fuse(device: Path = fuse_connection.DEVICE) -> Check:
    """Whether the lazy file server can work, and survive its own death; mounts nothing."""
    try:
        agreed = _agreed(device)
    except GearError as exc:
        advice = f"load the module fuse, and give the container {device} if it runs in one; needed for Gear images only"
        return Check(_NAME, False, False, str(exc), advice)
    if InitFlag.HAS_RESEND not in agreed:
        advice = "boot Linux 6.9 or later: before, reads that are under way when `gear lazyfs` dies never end"
        return Check(_NAME, False, False, "a successor cannot ask for unanswered requests", advice)
    passes = InitFlag.PASSTHROUGH in agreed
    found = "unanswered requests come again" + (", whole files are read past the server" if passes else "")
    return Check(_NAME, True, False, found)


def _agreed(device: Path) -> InitFlag:
    """What kernel and program would agree on.

    Raises:
        GearError: The kernel has no FUSE, or refuses it.
    """
    fuse_fd, mount_fd = fuse_connection.begin(device)
    try:
        buffer = bytearray(fuse_protocol.REQUEST_BYTES)
        length = os.readv(fuse_fd, [buffer])
        return fuse_protocol.init_body(fuse_protocol.parse(memoryview(buffer)[:length]).body)[1]
    finally:
        os.close(fuse_fd)
        os.close(mount_fd)
