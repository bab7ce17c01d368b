"""What is done about start-up profiles when an image arrives and when a container starts or ends."""

from __future__ import annotations

from pathlib import Path

import msgspec
import structlog

from gearworkers.errors import GearError
from gearworkers.layers.record import Layer
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import ProfileStatus, report_image
from gearworkers.profiles.recordings import Recording, Recordings
from gearworkers.profiles.resolve import top_image_layer
from gearworkers.settings import Settings

_log = structlog.get_logger(__name__)


class ProfileHooks:
    """The starts of one node's containers; all methods from any thread, and none fails for want of a profile."""

    def __init__(self, settings: Settings, layers: LayerStore, recordings: Recordings) -> None:
        """
        Args:
            settings: Names the lazy file server's socket and the length of a start.
            layers: Of the node.
            recordings: Those under way.
        """
        self._settings = settings
        self._layers = layers
        self._recordings = recordings

    def layer_applied(self, id: str) -> None:
        """A layer was applied: if it is incomplete, the profile of the image that may end there is prefetched."""
        if not self._layers.is_complete(id):
            self._tell(id, starts=False)

    def container_mounted(self, layer: Layer, merged: Path) -> None:
        """A container is mounted and not started yet: it starts by its image's profile, or is recorded for one.

        Args:
            layer: The container's.
            merged: Where it is mounted.
        """
        if self._layers.is_complete(layer.id):
            return
        image = top_image_layer(self._layers, layer.id)
        known = self._tell(image, starts=True)
        if known is not ProfileStatus.FOUND and self._settings.profile_window_s and self._settings.remote.url:
            self._recordings.begin(layer.id, Recording(self._settings, image, merged))

    def container_unmounted(self, id: str) -> None:
        """The container is about to be unmounted, or was; what it opened is recorded."""
        self._recordings.end(id)

    def close(self) -> None:
        """End all recordings without a result."""
        self._recordings.close()

    def _tell(self, image: str, *, starts: bool) -> ProfileStatus:
        """Have the profile looked for and prefetched; who starts the container does not wait for that."""
        try:
            return report_image(self._settings.lazyfs_socket, image, starts=starts)
        except (GearError, msgspec.MsgspecError) as exc:
            _log.warning("no profile is looked for", image=image, error=str(exc))
            return ProfileStatus.UNKNOWN
