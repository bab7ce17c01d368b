"""What containers waited for though their image has a profile: it is added to the profile if it is much.

The first start of an image may have done little, such as telling its version; so a profile grows with its use.
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
    """Notes what is fetched on demand while containers start; all methods from any thread, and none blocks."""

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
            layers: Of the node.
            remote: Where profiles are; None to note nothing.
            reads: Which parts, as (offset, size in bytes), were read of an object, given in hex.
            known: The document's name and the profile of the image whose topmost layer it is given, if it has one.
            window_s: How long a start is; 0 to note nothing.
        """
        self._layers = layers
        self._remote = remote
        self._reads = reads
        self._known = known
        self._window_s = window_s
        self._lock = threading.Lock()
        self._starts: dict[str, dict[bytes, int]] = {}

    def begin(self, image: str) -> None:
        """A container starts of the image whose topmost layer this is."""
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
        """Somebody waits for this object, or reads it while it arrives."""
        with self._lock:
            for objects in self._starts.values():
                if len(objects) < document.MAX_OBJECTS:
                    objects.setdefault(digest, size_bytes)

    def _end(self, remote: Remote, image: str) -> None:
        with self._lock:
            objects = self._starts.pop(image)
        name, known = self._known(image)
        if known is None:
            return  # its first start is recorded
        try:
            lists = image_object_lists(self._layers, image)
            missed = Profile(
                tuple(
                    document.opened_object(digest, size_bytes, self._reads(digest.hex()))
                    for digest, size_bytes in objects.items()
                    if any(one.between(digest, digest) for one in lists)
                )
            )
            if document.is_worth_adding(known, missed):
                document.save_profile(remote, name, missed, again=True)
                _log.info("a profile was added to", image=image, objects=len(missed.objects))
        except GearError as exc:
            _log.warning("a profile cannot be added to", image=image, error=str(exc))
