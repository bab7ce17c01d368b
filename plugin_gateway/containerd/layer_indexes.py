"""The indexes of layers in the remote, as the lazy file server finds them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog

from gearworkers.errors import Unavailable
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import LayerIndex, fetch_index, find_indexes
from gearworkers.settings import Settings

_log = structlog.stdlib.get_logger(__name__)

_IMAGE_REF = "containerd.io/snapshot/cri.image-ref"
_KEEP_S = 60.0
"""Seconds for which an answer is remembered."""
_AWAY_S = 10.0
"""Seconds in which a lazy file server that did not answer is not asked again."""
_MAX_KNOWN = 10_000


class LayerIndexes:
    """Asks the lazy file server for indexes; any thread may call its methods.

    Args:
        settings: Socket, and GEAR_LAZY_PULL.
        layers: Provides directories for indexes that are being applied.
    """

    def __init__(self, settings: Settings, layers: LayerStore) -> None:
        self._layers = layers
        self._socket = settings.lazyfs_socket
        self._repositories = _repositories(settings.lazy_pull)
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, LayerIndex | None]] = {}
        self._ask_after_s = 0.0

    def allow(self, labels: Mapping[str, str]) -> bool:
        """Whether GEAR_LAZY_PULL allows indexes for the image that a snapshot's labels name."""
        if self._repositories is None:
            return True
        image = labels.get(_IMAGE_REF, "")
        return any(image == one or image.startswith((f"{one}/", f"{one}:", f"{one}@")) for one in self._repositories)

    def find(self, digests: Sequence[str]) -> dict[str, LayerIndex]:
        """Return the indexes of the layers that have one, by the layer's digest; none if nobody answers in time."""
        with self._lock:  # the layers of an image that are prepared meanwhile need the same answer
            now_s = time.monotonic()
            unknown = [digest for digest in digests if now_s - self._known.get(digest, (-_KEEP_S, None))[0] >= _KEEP_S]
            if unknown and now_s >= self._ask_after_s:
                self._ask(unknown, now_s)
            found = {digest: self._known[digest][1] for digest in digests if digest in self._known}
            return {digest: index for digest, index in found.items() if index is not None}

    @contextmanager
    def fetched(self, index: LayerIndex) -> Iterator[Path]:
        """Fetch an index; yield its file, which is removed at the end. Errors as `lazyfs.client.fetch_index`."""
        with self._layers.build_directory("index") as build:
            fetch_index(self._socket, index, build / "index")
            yield build / "index"

    def forget(self, digest: str) -> None:
        """Do not use the index of a layer for a while, since it was of no use."""
        with self._lock:
            self._known[digest] = time.monotonic(), None

    def _ask(self, digests: Sequence[str], now_s: float) -> None:
        try:
            found = find_indexes(self._socket, digests)
        except Unavailable as exc:
            self._ask_after_s = now_s + _AWAY_S
            _log.info("layers are downloaded as usual", reason=str(exc))
            return
        if len(self._known) + len(digests) > _MAX_KNOWN:
            self._known.clear()
        self._known.update({digest: (now_s, found.get(digest)) for digest in digests})


def _repositories(setting: str) -> tuple[str, ...] | None:
    """Return the repositories that GEAR_LAZY_PULL allows; None for all."""
    if setting == "on":
        return None
    return () if setting == "off" else tuple(one.strip().strip("/") for one in setting.split(",") if one.strip())
