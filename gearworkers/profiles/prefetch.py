"""Look for the profiles of images on the node that uses them, and prefetch their objects."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from gearworkers.errors import GearError, IntegrityError
from gearworkers.fetch.prefetch import PrefetchObject
from gearworkers.layers.object_list import ObjectList
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import ImageEvent, ProfileStatus
from gearworkers.profiles import document
from gearworkers.profiles.document import Profile
from gearworkers.profiles.resolve import image_object_lists, profile_name

_log = structlog.get_logger(__name__)

SETTLE_S = 0.2
"""Seconds without a new layer after which a pull has ended or pauses; only its topmost layer is an image."""
_MAX_KNOWN = 100


@dataclass(slots=True)
class ProfileCounts:
    """Counters since the process began."""

    found: int = 0
    absent: int = 0


class ProfilePrefetcher:
    """Looks for profiles in a thread of its own, so that no caller waits for the remote."""

    def __init__(
        self,
        layers: LayerStore,
        document: Callable[[str], bytes | None],
        prefetch: Callable[[Sequence[PrefetchObject]], None],
        without_profile: Callable[[ImageEvent], None],
    ) -> None:
        """
        Args:
            layers: The node's layers.
            document: Returns a document of this name, or None; may take long or raise GearError.
            prefetch: Fetches parts of objects in the background, in order.
            without_profile: Called with an image that has no profile.
        """
        self._layers = layers
        self._document = document
        self._prefetch = prefetch
        self._without_profile = without_profile
        self._events: queue.SimpleQueue[ImageEvent | None] = queue.SimpleQueue()
        self._known: dict[str, tuple[str, Profile | None]] = {}
        self._started_without_profile: set[str] = set()  # ids of images
        self.counts = ProfileCounts()
        self._thread = threading.Thread(target=self._run, name="profiles", daemon=True)
        self._thread.start()

    def notify(self, event: ImageEvent) -> ProfileStatus:
        """Look for the profile of an image after a pull or at a start; return the state that is known now."""
        name, known = self.known(event.layer)
        if known is None or not event.starts:
            self._events.put(event)
        return ProfileStatus.FOUND if known is not None else ProfileStatus.ABSENT if name else ProfileStatus.UNKNOWN

    def known(self, layer: str) -> tuple[str, Profile | None]:
        """Return the name of the image's document, empty if it was not read yet, and the profile."""
        return self._known.get(layer, ("", None))

    def close(self) -> None:
        """Let the thread end after its current event."""
        self._events.put(None)

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            for image in self._settled(event):
                try:
                    self._look_for(image)
                except GearError as exc:
                    _log.warning("cannot read a profile", image=image.layer, error=str(exc))
                except Exception:
                    _log.exception("cannot use a profile", image=image.layer)

    def _settled(self, event: ImageEvent) -> list[ImageEvent]:
        """Return the images of one pull, by their topmost layers; an image that is known to be one, at once."""
        images = {event.layer: event}
        try:
            while not event.starts and not event.command:
                more = self._events.get(timeout=SETTLE_S)
                if more is None:
                    self._events.put(None)  # for `_run`
                    break
                images[more.layer] = event = more
        except queue.Empty:
            pass
        parents = {id: parent for id in images if (parent := self._parent(id)) is not None}
        return [image for id, image in images.items() if id in parents and (image.starts or id not in parents.values())]

    def _parent(self, id: str) -> str | None:
        """Return the layer's parent; None if the layer was removed, as an early layer of containerd is."""
        try:
            return self._layers.get(id).parent
        except GearError:
            return None

    def _look_for(self, image: ImageEvent) -> None:
        found = self.known(image.layer)[1] if image.starts else None
        found = found or self._read_profile(image.layer)
        if found is None:
            self._without_profile(image)
            if image.starts and image.layer not in self._started_without_profile:
                self._started_without_profile.add(image.layer)
                self.counts.absent += 1
            return
        self._started_without_profile.discard(image.layer)
        self.counts.found += 1
        parts = _parts(found, image_object_lists(self._layers, image.layer))
        _log.info("a profile is prefetched", image=image.layer, objects=len(parts), named=len(found.objects))
        self._prefetch(parts)

    def _read_profile(self, layer: str) -> Profile | None:
        name = profile_name(self._layers, layer)
        data = self._document(name)
        try:
            found = document.unpack(data) if data is not None else None
        except IntegrityError as exc:
            _log.warning("a profile is damaged", image=layer, error=str(exc))
            found = None
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[layer] = name, found
        return found


def _parts(found: Profile, lists: Sequence[ObjectList]) -> list[PrefetchObject]:
    """Return the parts of a profile that the image contains, with sizes from the image."""
    parts = []
    for opened in found.objects:
        digest = bytes.fromhex(opened.digest)
        sizes = [size_bytes for known in lists for _, size_bytes in known.between(digest, digest)]
        if sizes:
            ranges = tuple(
                (offset, min(size, sizes[0] - offset)) for offset, size in opened.ranges if offset < sizes[0]
            )
            parts.append(PrefetchObject(digest, sizes[0], ranges))
    return parts
