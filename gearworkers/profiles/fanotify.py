"""Read the opens of files on a mounted file system from fanotify.

Source: fanotify(7), struct fanotify_event_metadata.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

_EVENT = struct.Struct("<IBBHQii")
_VERSION = 3
_EXECUTED = 0x1000
_OVERFLOW = 0x4000
_BUFFER_BYTES = 4096


class Overflow(Exception):
    """The kernel's event queue was full, so later events are missing."""


def opened_files(group_fd: int) -> Iterator[tuple[int, bool]]:
    """Yield each file opened since the last call, in order: a descriptor, and whether the file was executed.

    Each descriptor is valid until the next step. The kernel opens each file again for its event, so a read may wait for
    the server of the file system.

    Args:
        group_fd: From `syscalls.watch_opens`.

    Raises:
        Overflow: Events were lost.
    """
    while True:
        try:
            events = os.read(group_fd, _BUFFER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            continue  # the kernel could not open the file; this event is lost
        at = 0
        opened = []
        lost = False
        while at < len(events):
            length, version, _, _, mask, fd, _ = _EVENT.unpack_from(events, at)
            at += length
            lost = lost or bool(mask & _OVERFLOW) or version != _VERSION
            if fd >= 0:
                opened.append((fd, bool(mask & _EXECUTED)))
        try:
            yield from opened
        finally:
            for fd, _ in opened:
                os.close(fd)
        if lost:
            raise Overflow
