"""Apply the layers of an image before containerd asks for them, in parallel.

containerd asks for one layer after the other. At the first request, the other layers of the image are found through its
manifest. Each is applied on a free worker, to an early layer without a parent (`early-<number>`), as soon as its blob
is complete. When containerd asks for it, its layer becomes hard links to the early one (`layers.copy_layer`), which is
then removed.

Contents above a private layer must not become public objects. So a layer is applied early only after the beginnings of
all layers below it have been read, and none has the marker of private layers.

States of a blob: waiting (for its blob or a free slot), running, done. All of this runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
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
from plugin_gateway.containerd.snapshot_table import AppliedBlob, early_name
from plugin_gateway.dispatch.dispatcher import Dispatcher

_log = structlog.stdlib.get_logger(__name__)

MIN_BLOB_BYTES = 64 << 10
"""Smaller layers are applied on request: copying one takes as long."""
_POLL_S = 0.2
_DOWNLOAD_S = 600.0
"""Seconds to wait for the next blob of an image that is being pulled."""
KEEP_S = 300.0
"""Seconds after which an early layer is removed if containerd has not asked for it."""
_SEEN_S = 60.0
"""Seconds in which the manifest of a blob is not searched again."""
_MAX_BLOBS = 256
"""Blobs that are waiting, running or done at one time."""


@dataclass(eq=False, slots=True)
class _EarlyApply:
    """One blob that is applied early."""

    digest: str
    is_running: bool = False
    is_taken: bool = False
    """Whether containerd has asked for it, or it was dropped: it must not start any more."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    result: AppliedBlob | None = None
    """None if the apply failed; valid once it is done."""
    timer: asyncio.TimerHandle | None = None


class Slots:
    """Limits early applies to the worker processes that requested applies leave free."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._busy = 0
        self._changed = asyncio.Condition()

    async def acquire(self) -> None:
        """Wait for a free slot and occupy it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._busy < self._slots)
            self._busy += 1

    async def occupy(self) -> None:
        """Occupy a slot without waiting: a requested apply goes first."""
        async with self._changed:
            self._busy += 1

    async def release(self) -> None:
        """Free a slot."""
        async with self._changed:
            self._busy -= 1
            self._changed.notify_all()


class EarlyApplies:
    """The blobs that are applied early.

    Args:
        engine: The root's engine.
        dispatcher: Runs the jobs.
        blobs: Finds the blobs of an image.
        is_known: Whether a layer that a blob has filled exists already.
    """

    def __init__(
        self,
        engine: Engine,
        dispatcher: Dispatcher,
        blobs: ImageBlobs,
        is_known: Callable[[str], bool],
    ) -> None:
        self.slots = Slots(engine.settings.worker_processes)
        self._engine = engine
        self._dispatcher = dispatcher
        self._blobs = blobs
        self._is_known = is_known
        self._numbers = itertools.count(1)
        self._early: dict[str, _EarlyApply] = {}
        self._images: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._seen_s: dict[tuple[str, str], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, digest: str, position: int, namespace: str) -> None:
        """Begin to apply the layers of the image above its layer *digest*, which containerd asks for now.

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
        early = self._early.get(digest)
        if early is None or early.is_taken:
            return None
        early.is_taken = True
        if not early.is_running and not early.done.is_set():
            self._early.pop(digest, None)
            return None
        await early.done.wait()
        self._forget(early)
        return early.result

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
        for early in list(self._early.values()):
            self._forget(early)
            if early.result is not None:
                await self.remove(early.result)

    async def _watch(self, digest: str, position: int, namespace: str) -> None:
        """Start the applies of an image's layers above *position*, in their order, as their blobs become complete."""
        try:
            blobs = await asyncio.to_thread(self._blobs.of_image, digest, position, namespace)
            now_s = asyncio.get_running_loop().time()
            self._seen_s.update({(namespace, blob.digest): now_s for blob in blobs})
            for number, blob in enumerate(blobs):
                if not await _is_complete(blob.path) or await asyncio.to_thread(_is_private, blob.path):
                    return
                if number and blob.size_bytes >= MIN_BLOB_BYTES and len(self._early) < _MAX_BLOBS:
                    self._start(blob)
        except GearError as exc:
            _log.info("no layers are applied early", blob=digest, reason=str(exc))

    def _start(self, blob: ImageBlob) -> None:
        if blob.digest in self._early or self._is_known(blob.digest):
            return
        early = self._early[blob.digest] = _EarlyApply(blob.digest)
        task = asyncio.get_running_loop().create_task(self._apply(early, blob))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _apply(self, early: _EarlyApply, blob: ImageBlob) -> None:
        await self.slots.acquire()
        try:
            if not early.is_taken:
                early.is_running = True
                early.result = await self._applied(blob)
        finally:
            early.done.set()
            await self.slots.release()
        if not early.is_taken:
            early.timer = asyncio.get_running_loop().call_later(KEEP_S, self._drop, early)

    async def _applied(self, blob: ImageBlob) -> AppliedBlob | None:
        """Apply the blob to an early layer; None after an error, which the requested apply will report."""
        id = early_name(next(self._numbers))
        root = str(self._engine.settings.gear_root)
        try:
            await asyncio.to_thread(self._engine.create, id, "", LayerKind.NEW)
            job = ApplyDiff(gear_root=root, id=id)
            result = (await self._dispatcher.run(job, StoredBlob(str(blob.path)))).result
        except GearError as exc:
            _log.info("a layer was not applied early", blob=blob.digest, error=str(exc))
            return None
        applied = AppliedBlob(blob.digest, id, result.digest, result.stream_bytes)
        if result.error:
            _log.info("a layer was not applied early", blob=blob.digest, error=result.error)
            await self.remove(applied)
            return None
        return applied

    def _drop(self, early: _EarlyApply) -> None:
        """Remove an early layer that containerd has not asked for."""
        if early.is_taken:
            return
        early.is_taken = True
        self._forget(early)
        if early.result is not None:
            task = asyncio.get_running_loop().create_task(self.remove(early.result))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _forget(self, early: _EarlyApply) -> None:
        if early.timer is not None:
            early.timer.cancel()
        if self._early.get(early.digest) is early:
            del self._early[early.digest]


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
