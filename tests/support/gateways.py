"""A gateway in a thread, with a driver in memory and workers that are threads; the sockets are real."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import uvloop

from gearworkers.engine.mounts import LazyServerNeeded
from gearworkers.errors import AlreadyExists, NotFound, Unavailable
from gearworkers.layers.diff.changes import Change, ChangeKind
from gearworkers.layers.idmap import IDMap
from gearworkers.settings import Settings
from gearworkers.workers.claim import Stream, claimed
from gearworkers.workers.messages import Order
from plugin_gateway.dispatch.claims import Offer
from plugin_gateway.dispatch.dispatcher import Patience
from plugin_gateway.dispatch.task_queue import QueueState
from plugin_gateway.gateway import Gateway

Work = Callable[[Order, Stream], None]


@dataclass
class MemoryDriver:
    """Layers are names; what was called with what stands in `inits`."""

    settings: Settings
    layers: dict[str, str] = field(default_factory=dict)
    inits: list[tuple[Sequence[str], Sequence[IDMap]]] = field(default_factory=list)
    mounted: set[str] = field(default_factory=set)
    dedupable: set[str] = field(default_factory=set)
    is_prepared: bool = False
    is_released: bool = False
    broken: Exception | None = None
    """What every call of exists and status raises."""
    lazy_server: threading.Event = field(default_factory=threading.Event)
    """Whether layers whose name begins with "gear" can be mounted."""

    def prepare(self) -> None:
        self.settings.gear_root.mkdir(exist_ok=True)
        self.is_prepared = True

    def init(self, home: str, opts: Sequence[str], uid_maps: Sequence[IDMap], gid_maps: Sequence[IDMap]) -> None:
        self.inits.append((opts, uid_maps))
        for option in opts:
            if option.startswith("gear.broker="):
                self.settings = replace(self.settings, broker_url=option.partition("=")[2])

    def capabilities(self) -> dict[str, bool]:
        return {"ReproducesExactDiffs": True}

    def create(self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None) -> None:
        if id in self.layers:
            raise AlreadyExists(f"layer {id}: it is there")
        self.layers[id] = parent

    create_read_write = create

    def remove(self, id: str) -> None:
        self.layers.pop(id, None)

    def get(self, id: str, mount_label: str = "", *, may_wait: bool = True) -> str:
        if id not in self.layers:
            raise NotFound(f"layer {id}: there is none")
        if id.startswith("gear") and not may_wait:
            raise LazyServerNeeded
        if id.startswith("gear"):
            assert self.lazy_server.wait(60)
        self.mounted.add(id)
        return f"/merged/{id}"

    def put(self, id: str) -> None:
        self.mounted.discard(id)

    def exists(self, id: str) -> bool:
        if self.broken is not None:
            raise self.broken
        return id in self.layers

    def status(self) -> list[tuple[str, str]]:
        if self.broken is not None:
            raise self.broken
        return [("Layers", str(len(self.layers)))]

    def get_metadata(self, id: str) -> dict[str, str]:
        return {"MergedDir": self.get(id)}

    def cleanup(self) -> None:
        self.mounted.clear()

    def release(self) -> None:
        self.is_released = True

    def changes(self, id: str, parent: str) -> list[Change]:
        return [Change(b"/a", ChangeKind.ADD)]

    def diff_size(self, id: str, parent: str) -> int:
        return 42

    def can_dedupe(self, id: str) -> bool:
        return id in self.dedupable and id not in self.mounted


class ThreadQueue:
    """Instead of Redis and Celery: *workers* threads take orders and claim them at the gateway's socket."""

    def __init__(self, settings: Settings, workers: int, work: Work) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(workers) if workers else None
        self._work = work
        self.accepts = True
        """Whether orders can be published."""
        self.silent: frozenset[str] = frozenset()
        """Of the kinds of worker, those that do not answer."""
        self.orders: list[Order] = []

    async def publish(self, order: Order, *, heavy: bool, expires_s: float) -> None:
        if not self.accepts:
            raise Unavailable("Redis does not answer")
        self.orders.append(order)
        if self._threads is not None:
            self._threads.submit(self.take, order)

    def take(self, order: Order, by: str = "worker") -> bool:
        """Claim *order* and work; whether it was granted."""
        with claimed(self._settings.streams_socket, order.token, by, self._settings.stream_idle_s) as stream:
            if stream is not None:
                self._work(order, stream)
            return stream is not None

    async def state(self) -> QueueState:
        if not self.accepts:
            raise Unavailable("Redis does not answer")
        return QueueState(0, 0, self.silent)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False)


class ThreadPool:
    """Instead of the gateway's own processes: a thread that claims as they do."""

    def __init__(self, queue: ThreadQueue) -> None:
        self._queue = queue

    async def perform(self, offer: Offer) -> None:
        await asyncio.to_thread(self._queue.take, offer.order, "gateway")

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class Running:
    """A gateway that runs until stop."""

    gateway: Gateway
    driver: MemoryDriver
    queue: ThreadQueue
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.gateway.stop(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def run_gateway(settings: Settings, work: Work, *, workers: int = 1, patience: Patience | None = None) -> Running:
    """Start a gateway whose heavy calls and upkeep are done by *work*."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    driver = MemoryDriver(settings)
    queue = ThreadQueue(settings, workers, work)

    async def start() -> Gateway:
        gateway = Gateway(settings, driver, patience)
        dispatcher: Any = gateway._dispatcher
        dispatcher.queue.close()
        dispatcher.queue = queue
        dispatcher._pool = ThreadPool(queue)
        await gateway.start()
        return gateway

    try:
        gateway = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    except BaseException:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        raise
    return Running(gateway, driver, queue, loop, thread)
