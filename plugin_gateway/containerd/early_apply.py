"""Apply the layers of an image before containerd asks for them, in parallel.

containerd asks for one layer after the other. At the first request, the other layers of the image are found through its
manifest. Each is applied on a free worker, to an early layer without a parent (`early-<number>`), as soon as its blob
is complete. When containerd asks for it, its layer becomes hard links to the early one (`layers.copy_layer`), which is
then removed.

Contents above a private layer must not become public objects. So a layer is applied early only after the beginnings of
all layers below it have been read, and none has the marker of private layers.

A layer is made from its index in the remote in the same way (`ready_layers`): the index is fetched, then applied.

States of a blob: waiting (for its blob or a free slot), running, done. All of this runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from gearworkers.engine.engine import Engine
from gearworkers.errors import GearError
from gearworkers.images.layer_reader import TarPreview
from gearworkers.layers.record import LayerKind
from gearworkers.lazyfs.client import LayerIndex
from gearworkers.tar.private_marker import starts_with_marker
from gearworkers.tar.reader import TarReader
from gearworkers.workers.messages import ApplyDiff, StoredBlob
from plugin_gateway.containerd.image_blobs import ImageBlobs
from plugin_gateway.containerd.layer_indexes import LayerIndexes
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
    source: Path | LayerIndex
    """The blob's file, or the index from which the layer is made."""
    is_running: bool = False
    is_taken: bool = False
    """Whether containerd has asked for it, or it was dropped."""
    is_dropped: bool = False
    """Whether it must not begin any more."""
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
        indexes: Fetches indexes.
        is_known: Whether a layer that a blob has filled exists already.
    """

    def __init__(
        self,
        engine: Engine,
        dispatcher: Dispatcher,
        blobs: ImageBlobs,
        indexes: LayerIndexes,
        is_known: Callable[[str], bool],
    ) -> None:
        self.slots = Slots(engine.settings.worker_processes)
        self._engine = engine
        self._dispatcher = dispatcher
        self._blobs = blobs
        self._indexes = indexes
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

    def begin_indexed(self, indexes: Mapping[str, LayerIndex]) -> None:
        """Begin to make layers from their indexes, given by the layers' digests."""
        for digest, index in indexes.items():
            self._start(digest, index)

    def drop(self, digest: str) -> None:
        """Remove the layer of *digest*, or stop making it: it is of no use."""
        if early := self._early.get(digest):
            self._drop(early)

    async def take(self, digest: str, *, indexed: bool = False) -> AppliedBlob | None:
        """Return the layer of *digest*, after its apply has ended; None if the caller must apply the blob.

        The caller copies the layer and then calls `remove`.

        Args:
            digest: The blob's.
            indexed: Whether to take a layer that is made from an index, and none that is made from the blob.
        """
        early = self._early.get(digest)
        if early is None or early.is_taken or isinstance(early.source, LayerIndex) is not indexed:
            return None
        early.is_taken = True
        if not indexed and not early.is_running and not early.done.is_set():
            early.is_dropped = True
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
                if number and blob.size_bytes >= MIN_BLOB_BYTES:
                    self._start(blob.digest, blob.path)
        except GearError as exc:
            _log.info("no layers are applied early", blob=digest, reason=str(exc))

    def _start(self, digest: str, source: Path | LayerIndex) -> None:
        if digest in self._early or len(self._early) >= _MAX_BLOBS or self._is_known(digest):
            return
        early = self._early[digest] = _EarlyApply(digest, source)
        task = asyncio.get_running_loop().create_task(self._apply(early))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _apply(self, early: _EarlyApply) -> None:
        try:
            with ExitStack() as stack:
                stream = await self._stream(early.source, stack)
                await self.slots.acquire()
                try:
                    if not early.is_dropped:
                        early.is_running = True
                        early.result = await self._applied(early, stream)
                finally:
                    await self.slots.release()
        except GearError as exc:
            _log.info("a layer was not applied early", blob=early.digest, error=str(exc))
        finally:
            early.done.set()
        if early.is_dropped and early.result is not None:
            await self.remove(early.result)
        elif not early.is_taken:
            early.timer = asyncio.get_running_loop().call_later(KEEP_S, self._drop, early)

    async def _stream(self, source: Path | LayerIndex, stack: ExitStack) -> StoredBlob:
        """Return the file to apply, which stays until the end of *stack*."""
        if isinstance(source, LayerIndex):
            path = await asyncio.to_thread(stack.enter_context, self._indexes.fetched(source))
            return StoredBlob(str(path), is_index=True)
        return StoredBlob(str(source))

    async def _applied(self, early: _EarlyApply, stream: StoredBlob) -> AppliedBlob:
        """Apply the file to an early layer.

        Raises:
            GearError: The file cannot be applied; a requested apply will report the same error.
        """
        id = early_name(next(self._numbers))
        await asyncio.to_thread(self._engine.create, id, "", LayerKind.NEW)
        applied = AppliedBlob(early.digest, id, "", 0)
        try:
            job = ApplyDiff(gear_root=str(self._engine.settings.gear_root), id=id)
            result = (await self._dispatcher.run(job, stream)).result
            if result.error:
                raise GearError(result.error)
        except GearError:
            await self.remove(applied)
            raise
        if isinstance(early.source, LayerIndex):
            return applied._replace(diff_id=early.source.diff_id, tar_bytes=early.source.tar_bytes)
        return applied._replace(diff_id=result.digest, tar_bytes=result.stream_bytes)

    def _drop(self, early: _EarlyApply) -> None:
        """Remove an early layer that containerd has not asked for."""
        if early.is_taken:
            return
        early.is_taken = early.is_dropped = True
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
