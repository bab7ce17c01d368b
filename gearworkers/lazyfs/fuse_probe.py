"""Checks the FUSE features of this kernel with a connection that is mounted nowhere."""

from __future__ import annotations

import os
from pathlib import Path

from gearworkers.errors import GearError
from gearworkers.lazyfs import fuse_connection, fuse_protocol
from gearworkers.lazyfs.fuse_protocol import InitFlag
from gearworkers.util.check import Check

_NAME = "FUSE"


def check_fuse(device: Path = fuse_connection.DEVICE) -> Check:
    """Check whether the lazy file server can run, and be replaced after a crash; mount nothing."""
    try:
        return check_features(common_features(device))
    except GearError as exc:
        advice = (
            f"load the fuse module, and pass {device} to the container if this runs in one; only Gear images need it"
        )
        return Check(_NAME, False, False, str(exc), advice)


def check_features(features: InitFlag) -> Check:
    """Check whether these features are enough for the lazy file server."""
    if InitFlag.HAS_RESEND not in features:
        advice = "boot Linux 6.9 or later: on older kernels, pending reads never end after `gear lazyfs` dies"
        return Check(_NAME, False, False, "the kernel does not send unanswered requests again", advice)
    has_passthrough = InitFlag.PASSTHROUGH in features
    found = "unanswered requests are sent again"
    if has_passthrough:
        found += ", whole files are read without the server"
    return Check(_NAME, True, False, found)


def common_features(device: Path) -> InitFlag:
    """Return the features that both the kernel and this program have.

    Raises:
        GearError: The kernel has no FUSE, or refuses a connection.
    """
    fuse_fd, mount_fd = fuse_connection.create(device)
    try:
        buffer = bytearray(fuse_protocol.REQUEST_BYTES)
        length = os.readv(fuse_fd, [buffer])
        return fuse_protocol.init_body(fuse_protocol.parse(memoryview(buffer)[:length]).body)[1]
    finally:
        os.close(fuse_fd)
        os.close(mount_fd)
