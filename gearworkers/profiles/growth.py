"""Extend a profile with the objects that later containers of its image wait for.

The first start of an image may have done little, for example print a version. So a profile grows with the image's use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog

from gearworkers.errors import GearError
from gearworkers.layers.store import LayerStore
from gearworkers.profiles import document
from gearworkers.profiles.document import Profile
from gearworkers.profiles.resolve import image_object_lists
from gearworkers.remote.remote import Remote

_log = structlog.get_logger(__name__)

_MAX_STARTS = 8


class ProfileGrowth:
    """Collects the objects that are fetched on demand while containers start. Call from any thread; never blocks."""

    def __init__(
        self,
        layers: LayerStore,
        remote: Remote | None,
        reads: Callable[[str], Sequence[tuple[int, int]]],
        known: Callable[[str], tuple[str, Profile | None]],
        *,
        window_s: float,
    ) -> None:
        """
        Args:
            layers: The node's layers.
            remote: Stores profiles; None to collect nothing.
            reads: Returns the (offset, size in bytes) of the reads of an object, which is given in hex.
            known: Returns the document's name and the profile of an image, which is given by its topmost layer.
            window_s: Length of a start in seconds; 0 to collect nothing.
        """
        self._layers = layers
        self._remote = remote
        self._reads = reads
        self._known = known
        self._window_s = window_s
        self._lock = threading.Lock()
        self._starts: dict[str, dict[bytes, int]] = {}

    def begin(self, image: str) -> None:
        """Begin to collect objects for a start of the image with this topmost layer."""
        with self._lock:
            if self._remote is None or not self._window_s or image in self._starts:
                return
            if len(self._starts) >= _MAX_STARTS:
                return
            self._starts[image] = {}
        timer = threading.Timer(self._window_s, self._end, (self._remote, image))
        timer.daemon = True
        timer.start()

    def missed(self, digest: bytes, size_bytes: int) -> None:
        """Note an object that a container waits for or reads while it arrives."""
        with self._lock:
            for objects in self._starts.values():
                if len(objects) < document.MAX_OBJECTS:
                    objects.setdefault(digest, size_bytes)

    def _end(self, remote: Remote, image: str) -> None:
        with self._lock:
            objects = self._starts.pop(image)
        name, known = self._known(image)
        if known is None:
            return  # the first start is recorded
        try:
            lists = image_object_lists(self._layers, image)
            missed = Profile(
                tuple(
                    document.opened_object(digest, size_bytes, self._reads(digest.hex()))
                    for digest, size_bytes in objects.items()
                    if any(one.has(digest) for one in lists)
                )
            )
            if document.is_worth_adding(known, missed):
                document.save_profile(remote, name, missed, extend=True)
                _log.info("a profile was extended", image=image, objects=len(missed.objects))
        except GearError as exc:
            _log.warning("cannot extend a profile", image=image, error=str(exc))
