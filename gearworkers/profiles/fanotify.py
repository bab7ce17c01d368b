"""Which files of a mounted file system are opened, by whomever: fanotify.

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
    """More was opened than the kernel remembers: what follows is incomplete."""


def opened_files(group_fd: int) -> Iterator[tuple[int, bool]]:
    """Each file that was opened since the last call, in order: a descriptor, closed after its turn; if it was executed.

    Reading opens each file once more: it may wait for whoever serves it.

    Args:
        group_fd: As `sys.watch_opens` gives it.

    Raises:
        Overflow: The kernel lost some.
    """
    while True:
        try:
            events = os.read(group_fd, _BUFFER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            continue  # a file that cannot be opened again: that event is gone
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
