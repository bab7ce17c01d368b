"""Apply the layers of an image ahead of their turn, in parallel.

containerd asks for one layer after the other. When a layer's turn comes, the other layers of its image are found
through the image's manifest. Each is applied on a free worker, into a layer of its own without a parent
(`ahead-<number>`), as soon as its blob is complete. In its turn it becomes hard links (`layers.copy_layer`), and the
layer of its own is removed.

Contents above a private layer must not become public objects. So a layer is applied ahead only after the beginnings of
all layers below it have been read, and none has the marker of private layers.

States of a blob: waiting (for its blob or a free core), running, done. All of this runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from gearworkers.engine.engine import Engine
from gearworkers.errors import GearError
from gearworkers.images.layer_reader import TarPreview
from gearworkers.layers.record import LayerKind
from gearworkers.tar.private_marker import starts_with_marker
from gearworkers.tar.reader import TarReader
from gearworkers.workers.messages import ApplyDiff, StoredBlob
from plugin_gateway.containerd.image_blobs import ImageBlob, ImageBlobs
from plugin_gateway.containerd.snapshot_table import AppliedBlob, ahead_name
from plugin_gateway.dispatch.dispatcher import Dispatcher

_log = structlog.stdlib.get_logger(__name__)

MIN_BLOB_BYTES = 64 << 10
"""Smaller layers are applied in their turn: copying one takes as long."""
_POLL_S = 0.2
_DOWNLOAD_S = 600.0
"""Seconds to wait for the next blob of an image that is being pulled."""
KEEP_S = 300.0
"""Seconds after which a layer whose turn does not come is removed."""
_SEEN_S = 60.0
"""Seconds in which the manifest of a blob is not searched again."""
_MAX_BLOBS = 256
"""Blobs that are waiting, running or done at one time."""


@dataclass(eq=False, slots=True)
class _Ahead:
    """One blob that is applied ahead."""

    digest: str
    is_running: bool = False
    is_taken: bool = False
    """Whether its turn has come, or it is dropped: it must not start any more."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    result: AppliedBlob | None = None
    """None if the apply failed; valid once it is done."""
    timer: asyncio.TimerHandle | None = None


class Cores:
    """Limits the applies ahead of their turn to the cores that applies in their turn leave free."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._busy = 0
        self._changed = asyncio.Condition()

    async def acquire(self) -> None:
        """Wait for a free core and occupy it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._busy < self._cores)
            self._busy += 1

    async def occupy(self) -> None:
        """Occupy a core without waiting: an apply in its turn goes first."""
        async with self._changed:
            self._busy += 1

    async def release(self) -> None:
        """Free a core."""
        async with self._changed:
            self._busy -= 1
            self._changed.notify_all()


class AheadApplies:
    """The blobs that are applied ahead of their turn.

    Args:
        engine: The root's engine.
        dispatcher: Runs the jobs.
        blobs: Finds the blobs of an image.
        is_known: Whether a layer that a blob has filled exists already.
        cores: The number of applies that may run at the same time.
    """

    def __init__(
        self,
        engine: Engine,
        dispatcher: Dispatcher,
        blobs: ImageBlobs,
        is_known: Callable[[str], bool],
        *,
        cores: int | None = None,
    ) -> None:
        self.cores = Cores(cores or os.cpu_count() or 1)
        self._engine = engine
        self._dispatcher = dispatcher
        self._blobs = blobs
        self._is_known = is_known
        self._numbers = itertools.count(1)
        self._ahead: dict[str, _Ahead] = {}
        self._images: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._seen_s: dict[tuple[str, str], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, digest: str, position: int, namespace: str) -> None:
        """Begin to apply the other layers of the image whose layer *digest* has its turn.

        Args:
            digest: The blob's digest.
            position: The number of layers below it.
            namespace: containerd's.
        """
        key, now_s = (namespace, digest), asyncio.get_running_loop().time()
        self._seen_s = {seen: time_s for seen, time_s in self._seen_s.items() if now_s - time_s < _SEEN_S}
        if key not in self._images and key not in self._seen_s:
            task = asyncio.get_running_loop().create_task(self._watch(digest, position, namespace))
            self._images[key] = task
            task.add_done_callback(lambda _: self._images.pop(key, None))

    async def take(self, digest: str) -> AppliedBlob | None:
        """Return the layer of *digest*, after its apply has ended; None if the caller must apply the blob.

        The caller copies the layer and then calls `remove`.
        """
        ahead = self._ahead.get(digest)
        if ahead is None or ahead.is_taken:
            return None
        ahead.is_taken = True
        if not ahead.is_running and not ahead.done.is_set():
            self._ahead.pop(digest, None)
            return None
        await ahead.done.wait()
        self._forget(ahead)
        return ahead.result

    async def remove(self, blob: AppliedBlob) -> None:
        """Remove the layer of a blob that was taken."""
        try:
            await asyncio.to_thread(self._engine.remove, blob.layer)
        except GearError as exc:
            _log.warning("cannot remove a layer", layer=blob.layer, error=str(exc))

    async def close(self) -> None:
        """Stop, and remove the layers that nobody has taken."""
        for task in (*self._images.values(), *self._tasks):
            task.cancel()
        await asyncio.gather(*self._images.values(), *self._tasks, return_exceptions=True)
        for ahead in list(self._ahead.values()):
            self._forget(ahead)
            if ahead.result is not None:
                await self.remove(ahead.result)

    async def _watch(self, digest: str, position: int, namespace: str) -> None:
        """Start the applies of an image's layers above *position*, in their order, as their blobs become complete."""
        try:
            blobs = await asyncio.to_thread(self._blobs.of_image, digest, position, namespace)
            now_s = asyncio.get_running_loop().time()
            self._seen_s.update({(namespace, blob.digest): now_s for blob in blobs})
            for number, blob in enumerate(blobs):
                if not await _is_complete(blob.path) or await asyncio.to_thread(_is_private, blob.path):
                    return
                if number and blob.size_bytes >= MIN_BLOB_BYTES and len(self._ahead) < _MAX_BLOBS:
                    self._start(blob)
        except GearError as exc:
            _log.info("no layers are applied ahead", blob=digest, reason=str(exc))

    def _start(self, blob: ImageBlob) -> None:
        if blob.digest in self._ahead or self._is_known(blob.digest):
            return
        ahead = self._ahead[blob.digest] = _Ahead(blob.digest)
        task = asyncio.get_running_loop().create_task(self._apply(ahead, blob))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _apply(self, ahead: _Ahead, blob: ImageBlob) -> None:
        await self.cores.acquire()
        try:
            if not ahead.is_taken:
                ahead.is_running = True
                ahead.result = await self._applied(blob)
        finally:
            ahead.done.set()
            await self.cores.release()
        if not ahead.is_taken:
            ahead.timer = asyncio.get_running_loop().call_later(KEEP_S, self._drop, ahead)

    async def _applied(self, blob: ImageBlob) -> AppliedBlob | None:
        """Apply the blob into a layer of its own; None after an error, which the apply in its turn will report."""
        id = ahead_name(next(self._numbers))
        root = str(self._engine.settings.gear_root)
        try:
            await asyncio.to_thread(self._engine.create, id, "", LayerKind.NEW)
            job = ApplyDiff(gear_root=root, id=id)
            result = (await self._dispatcher.run(job, StoredBlob(str(blob.path)))).result
        except GearError as exc:
            _log.info("a layer was not applied ahead", blob=blob.digest, error=str(exc))
            return None
        applied = AppliedBlob(blob.digest, id, result.digest, result.stream_bytes)
        if result.error:
            _log.info("a layer was not applied ahead", blob=blob.digest, error=result.error)
            await self.remove(applied)
            return None
        return applied

    def _drop(self, ahead: _Ahead) -> None:
        """Remove a layer whose turn did not come."""
        if ahead.is_taken:
            return
        ahead.is_taken = True
        self._forget(ahead)
        if ahead.result is not None:
            task = asyncio.get_running_loop().create_task(self.remove(ahead.result))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _forget(self, ahead: _Ahead) -> None:
        if ahead.timer is not None:
            ahead.timer.cancel()
        if self._ahead.get(ahead.digest) is ahead:
            del self._ahead[ahead.digest]


async def _is_complete(path: Path) -> bool:
    """Wait for a blob; return whether it has been downloaded in time."""
    deadline_s = asyncio.get_running_loop().time() + _DOWNLOAD_S
    while not path.exists():
        if asyncio.get_running_loop().time() > deadline_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True


def _is_private(path: Path) -> bool:
    """Whether the layer begins with the marker of private layers; also True for a blob that is not a layer."""
    try:
        with path.open("rb", buffering=0) as file:
            return starts_with_marker(TarReader(TarPreview(file)))
    except (OSError, GearError):
        return True
