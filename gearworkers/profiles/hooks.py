"""Handle start-up profiles when a layer is applied and when a container is mounted or unmounted."""

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
    """The profile actions of one node. Call from any thread; a missing profile is never an error."""

    def __init__(self, settings: Settings, layers: LayerStore, recordings: Recordings) -> None:
        """
        Args:
            settings: Has the lazy file server's socket and the length of a start.
            layers: The node's layers.
            recordings: Receives new recordings.
        """
        self._settings = settings
        self._layers = layers
        self._recordings = recordings

    def layer_applied(self, id: str, command: str = "") -> None:
        """Request the prefetch of the image's profile if the layer is incomplete; it may be the topmost layer.

        Args:
            id: The layer.
            command: The image's command, if the layer is the topmost and the command is known.
        """
        if not self._layers.is_complete(id):
            self._report(id, starts=False, command=command)

    def container_mounted(self, layer: Layer, merged: Path) -> None:
        """Request the prefetch of the image's profile, or begin to record a profile. Call before the start.

        Args:
            layer: The container's layer.
            merged: Its mount point.
        """
        if self._layers.is_complete(layer.id):
            return
        image = top_image_layer(self._layers, layer.id)
        status = self._report(image, starts=True)
        if status is not ProfileStatus.FOUND and self._settings.profile_window_s and self._settings.remote.url:
            self._recordings.begin(layer.id, Recording(self._settings, image, merged))

    def container_unmounted(self, id: str) -> None:
        """End the container's recording and save its result. Call before or after the unmount."""
        self._recordings.end(id)

    def close(self) -> None:
        """End all recordings without a result."""
        self._recordings.close()

    def _report(self, image: str, *, starts: bool, command: str = "") -> ProfileStatus:
        """Report the image to the lazy file server, which looks for its profile in the background."""
        try:
            return report_image(self._settings.lazyfs_socket, image, starts=starts, command=command)
        except (GearError, msgspec.MsgspecError) as exc:
            _log.warning("cannot ask the lazy file server for a profile", image=image, error=str(exc))
            return ProfileStatus.UNKNOWN
