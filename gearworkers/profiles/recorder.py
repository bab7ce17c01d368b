"""Record which objects a container opens while it starts, and save the profile in the remote.

Each recording has a process of its own: reading an event from the kernel opens the file again, which may wait for the
lazy file server. So neither that server nor the gateway may read events. The gateway starts this process with the
fanotify group on a descriptor, and with a `Recording` on standard input. The end of standard input means that the
container has ended.
"""

from __future__ import annotations

import os
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

LATE_S = 5.0
"""Seconds after the window in which queued events are still read; a busy container may open files endlessly."""
_MAX_SAVE_S = 60
_NICE = 10


def record(settings: Settings, image: str, merged: Path, group_fd: int, stop_fd: int, *, extend: bool) -> Profile:
    """Watch until the window is over or *stop_fd* ends, then save the profile.

    Args:
        settings: The node's settings.
        image: The topmost image layer.
        merged: The container's mount point.
        group_fd: From `syscalls.watch_opens`.
        stop_fd: The reading end of a pipe.
        extend: Whether to extend an existing profile. If not, a start without an executed program does not count.

    Raises:
        GearError: A layer was removed, or the remote refuses.
    """
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    name = profile_name(layers, image)
    with ObjectResolver(layers.lowers(image), image_object_lists(layers, image), merged) as resolver:
        objects = watch_objects(resolver, group_fd, stop_fd, settings.profile_window_s, must_run=not extend)
    large = [digest.hex() for digest, size_bytes in objects.items() if size_bytes >= settings.large_object_bytes]
    try:
        reads = read_ranges(settings.lazyfs_socket, large) if large else {}
    except Unavailable:
        reads = {}
    profile = Profile(
        tuple(
            document.opened_object(digest, size_bytes, reads.get(digest.hex(), ()))
            for digest, size_bytes in objects.items()
        )[: document.MAX_OBJECTS]
    )
    if profile.objects:
        remote = open_remote(settings)
        try:
            saved = document.save_profile(remote, name, profile, extend=extend)
        finally:
            remote.close()
        _log.info("a start was recorded", image=image, objects=len(profile.objects), saved=saved)
    return profile


def watch_objects(
    resolver: ObjectResolver, group_fd: int, stop_fd: int, window_s: float, *, must_run: bool
) -> dict[bytes, int]:
    """Return digest and size in bytes of the opened objects, in order; none if *must_run* and no file is executed."""
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
                found = resolver.resolve(fd)
                if found is not None:
                    objects.setdefault(*found)
                if len(objects) >= document.MAX_OBJECTS or time.monotonic() > end_s + LATE_S:
                    is_over = True
                    break
        except Overflow:
            _log.warning("the kernel's event queue was full; later opens are not recorded")
            break
    return objects if has_run or not must_run else {}


def main() -> None:
    """Run ``python -m gearworkers.profiles.recorder GROUP_FD``, with a `Recording` on standard input."""
    os.nice(_NICE)
    group_fd = int(sys.argv[1])
    size_bytes = int(sys.stdin.buffer.readline())
    recording = Recording.decode(sys.stdin.buffer.read(size_bytes))
    settings = recording.settings
    configure_logging(settings.log)
    signal.alarm(int(settings.profile_window_s) + _MAX_SAVE_S)
    try:
        record(settings, recording.image, recording.merged, group_fd, sys.stdin.fileno(), extend=False)
    except (GearError, OSError) as exc:
        _log.warning("cannot record a start", image=recording.image, error=str(exc))


if __name__ == "__main__":
    main()
