"""Records which objects a container opens while it starts, and keeps the profile in the remote.

In a process of its own, which lives as long as one recording: taking an event from the kernel opens the file once
more, and that may wait for the lazy file server, so neither the server nor the gateway may do it. The gateway starts
it with the group on a descriptor and a `Recording` on its standard input, whose end tells that the container ended.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import time
from pathlib import Path

import structlog

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError, Unavailable
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import read_ranges
from gearworkers.profiles import document
from gearworkers.profiles.document import Profile
from gearworkers.profiles.fanotify import Overflow, opened_files
from gearworkers.profiles.recordings import Recording
from gearworkers.profiles.resolve import ObjectResolver, image_object_lists, profile_name
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from gearworkers.util.log import configure_logging

_log = structlog.get_logger(__name__)

_LATE_S = 5.0
"""So long after the window is taken what waits in the kernel; a container may open more than is taken meanwhile."""
_LONGEST_PUSH_S = 60
_NICE = 10


def record(settings: Settings, image: str, merged: Path, group_fd: int, stop_fd: int, *, again: bool) -> Profile:
    """Watch until the window is over or *stop_fd* ends, then keep what was opened.

    Args:
        settings: Of the node.
        image: The topmost image layer.
        merged: Where the container is mounted.
        group_fd: As `mounts.sys.watch_opens` gives it.
        stop_fd: A pipe.
        again: Whether to add to a profile that is there. If not, this is a start only if something is executed.

    Raises:
        GearError: The layers are gone, or what the remote says.
    """
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    name = profile_name(layers, image)
    with ObjectResolver(layers.lowers(image), image_object_lists(layers, image), merged) as known:
        objects = _watched(known, group_fd, stop_fd, settings.profile_window_s, must_run=not again)
    large = [digest.hex() for digest, size_bytes in objects.items() if size_bytes >= settings.large_object_bytes]
    try:
        reads = read_ranges(settings.lazyfs_socket, large) if large else {}
    except Unavailable:
        reads = {}
    found = Profile(
        tuple(
            document.opened_object(digest, size_bytes, reads.get(digest.hex(), ()))
            for digest, size_bytes in objects.items()
        )[: document.MAX_OBJECTS]
    )
    if found.objects:
        remote = open_remote(settings)
        try:
            kept = document.save_profile(remote, name, found, again=again)
        finally:
            remote.close()
        _log.info("a start was recorded", image=image, objects=len(found.objects), kept=kept)
    return found


def _watched(
    known: ObjectResolver, group_fd: int, stop_fd: int, window_s: float, *, must_run: bool
) -> dict[bytes, int]:
    """Digest and size in bytes of what is opened, in order; nothing if *must_run* and nothing is executed."""
    objects: dict[bytes, int] = {}
    has_run = False
    poll = select.poll()
    poll.register(group_fd, select.POLLIN)
    poll.register(stop_fd, select.POLLIN)
    end_s = time.monotonic() + window_s
    is_over = False
    while not is_over:
        ready = poll.poll(max(end_s - time.monotonic(), 0.0) * 1000)
        is_over = not ready or any(fd == stop_fd for fd, _ in ready)
        try:
            for fd, is_executed in opened_files(group_fd):
                has_run = has_run or is_executed
                found = known.resolve(fd)
                if found is not None:
                    objects.setdefault(*found)
                if len(objects) >= document.MAX_OBJECTS or time.monotonic() > end_s + _LATE_S:
                    is_over = True
                    break
        except Overflow:
            _log.warning("more was opened than the kernel could tell; what comes later is left out")
            break
    return objects if has_run or not must_run else {}


def main() -> None:
    """``python -m gearworkers.profiles.recorder GROUP_FD``, a pickled `Recording` on stdin."""
    os.nice(_NICE)
    group_fd = int(sys.argv[1])
    order: Recording = pickle.load(sys.stdin.buffer)
    configure_logging(order.settings.log)
    signal.alarm(int(order.settings.profile_window_s) + _LONGEST_PUSH_S)
    try:
        record(order.settings, order.image, order.merged, group_fd, sys.stdin.fileno(), again=False)
    except (GearError, OSError) as exc:
        _log.warning("a start could not be recorded", image=order.image, error=str(exc))


if __name__ == "__main__":
    main()
