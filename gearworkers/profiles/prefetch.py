"""Start-up profiles on the node that uses them: looked for when an image arrives, prefetched when there is one."""

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

_SETTLED_S = 0.2
"""A pull is over, or pauses, when no layer has come for so long; only the topmost one is an image then."""
_MAX_KNOWN = 100


@dataclass(slots=True)
class ProfileCounts:
    """Since the process began."""

    found: int = 0
    absent: int = 0


class ProfilePrefetcher:
    """Looks for profiles in a thread of its own, so that nobody waits for the remote."""

    def __init__(
        self,
        layers: LayerStore,
        document: Callable[[str], bytes | None],
        bring: Callable[[Sequence[PrefetchObject]], None],
    ) -> None:
        """
        Args:
            layers: Of the node.
            document: Gives a profile's document, or None; may take its time, or raise GearError.
            bring: Has parts of objects prefetched, in order.
        """
        self._layers = layers
        self._document = document
        self._bring = bring
        self._news: queue.SimpleQueue[ImageEvent | None] = queue.SimpleQueue()
        self._known: dict[str, tuple[str, Profile | None]] = {}
        self._without: set[str] = set()  # images that have started without a profile
        self.counts = ProfileCounts()
        self._thread = threading.Thread(target=self._run, name="profiles", daemon=True)
        self._thread.start()

    def notify(self, news: ImageEvent) -> ProfileStatus:
        """A layer is here, or a container starts; what is known by now of the profile of the image that ends there."""
        name, known = self.known(news.layer)
        if known is None or not news.starts:
            self._news.put(news)
        return ProfileStatus.FOUND if known is not None else ProfileStatus.ABSENT if name else ProfileStatus.UNKNOWN

    def known(self, layer: str) -> tuple[str, Profile | None]:
        """The document's name, empty if nobody has asked for it yet, and the profile of the image that ends there."""
        return self._known.get(layer, ("", None))

    def close(self) -> None:
        """Let the thread end after what it is at."""
        self._news.put(None)

    def _run(self) -> None:
        while (news := self._news.get()) is not None:
            for image in self._settled(news):
                try:
                    self._look_for(image)
                except GearError as exc:
                    _log.warning("a profile cannot be had", image=image.layer, error=str(exc))
                except Exception:
                    _log.exception("a profile cannot be used", image=image.layer)

    def _settled(self, news: ImageEvent) -> list[ImageEvent]:
        """What came in one pull, without the layers that others lie upon; a start at once."""
        images = {news.layer: news}
        try:
            while not news.starts:
                more = self._news.get(timeout=_SETTLED_S)
                if more is None:
                    self._news.put(None)  # for `_run`
                    break
                images[more.layer] = news = more
        except queue.Empty:
            pass
        parents = set()
        for id in images:
            try:
                parents.add(self._layers.get(id).parent)
            except GearError:
                continue  # it was removed
        return [image for id, image in images.items() if image.starts or id not in parents]

    def _look_for(self, image: ImageEvent) -> None:
        found = self.known(image.layer)[1] if image.starts else None
        found = found or self._asked_for(image.layer)
        if found is None:
            if image.starts and image.layer not in self._without:
                self._without.add(image.layer)
                self.counts.absent += 1
            return
        self._without.discard(image.layer)
        self.counts.found += 1
        parts = _parts(found, image_object_lists(self._layers, image.layer))
        _log.info("a profile is prefetched", image=image.layer, objects=len(parts), named=len(found.objects))
        self._bring(parts)

    def _asked_for(self, layer: str) -> Profile | None:
        name = profile_name(self._layers, layer)
        data = self._document(name)
        try:
            found = document.unpack(data) if data is not None else None
        except IntegrityError as exc:
            _log.warning("a profile is not what it should be", image=layer, error=str(exc))
            found = None
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[layer] = name, found
        return found


def _parts(found: Profile, lists: Sequence[ObjectList]) -> list[PrefetchObject]:
    """What the image really has of it, with the sizes that the image says."""
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
