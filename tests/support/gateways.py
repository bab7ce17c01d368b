"""A gateway in a thread, with a driver in memory and threads as workers; the sockets are real."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import uvloop

from gearworkers.engine.mounts import LazyServerNeeded
from gearworkers.errors import AlreadyExists, NotFound, Unavailable
from gearworkers.layers.diff.changes import Change, ChangeKind
from gearworkers.layers.idmap import IdRange
from gearworkers.settings import Settings
from gearworkers.workers.claim import ClaimedJob, claim
from gearworkers.workers.http_body import STALLED_S
from gearworkers.workers.messages import Claimant, WorkerJob
from plugin_gateway.dispatch.dispatcher import Dispatcher, PickupTimeouts, Pool
from plugin_gateway.dispatch.pending_job import PendingJob
from plugin_gateway.dispatch.task_queue import QueueState
from plugin_gateway.gateway import Gateway
from plugin_gateway.graphdriver.calls import Driver
from plugin_gateway.metrics import GatewayMetrics

Work = Callable[[ClaimedJob], None]


@dataclass
class MemoryDriver:
    """A driver whose layers are names."""

    settings: Settings
    layers: dict[str, str] = field(default_factory=dict)
    inits: list[tuple[Sequence[str], Sequence[IdRange]]] = field(default_factory=list)
    """The options and user id maps of each Init."""
    mounted: set[str] = field(default_factory=set)
    dedupable: set[str] = field(default_factory=set)
    is_prepared: bool = False
    is_released: bool = False
    broken: Exception | None = None
    """The error that every call of exists and status raises."""
    lazy_server: threading.Event = field(default_factory=threading.Event)
    """Set once layers whose name begins with "gear" can be mounted."""
    refused_gets: list[str] = field(default_factory=list)
    """The ids of Gets that would have to wait and may not."""

    def prepare(self) -> None:
        self.settings.gear_root.mkdir(exist_ok=True)
        self.is_prepared = True

    def init(self, home: str, opts: Sequence[str], uid_maps: Sequence[IdRange], gid_maps: Sequence[IdRange]) -> None:
        self.inits.append((opts, uid_maps))
        for option in opts:
            if option.startswith("gear.broker="):
                self.settings = replace(self.settings, broker_url=option.partition("=")[2])

    def capabilities(self) -> dict[str, bool]:
        return {"ReproducesExactDiffs": True}

    def create(self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None) -> None:
        if id in self.layers:
            raise AlreadyExists(f"layer {id} exists already")
        self.layers[id] = parent

    create_read_write = create

    def remove(self, id: str) -> None:
        self.layers.pop(id, None)

    def get(self, id: str, mount_label: str = "", *, may_wait: bool = True) -> str:
        if id not in self.layers:
            raise NotFound(f"layer {id} does not exist")
        if id.startswith("gear") and not may_wait:
            self.refused_gets.append(id)
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
    """Replaces Redis and Celery: *workers* threads take jobs and claim them at the gateway's socket."""

    def __init__(self, settings: Settings, workers: int, work: Work, stalled_s: float = STALLED_S) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(workers) if workers else None
        self._work = work
        self._stalled_s = stalled_s
        self.accepts = True
        """Whether jobs can be published."""
        self.silent: frozenset[str] = frozenset()
        """The kinds of workers that do not answer."""
        self.jobs: list[WorkerJob] = []

    async def publish(self, job: WorkerJob, *, expires_s: float) -> None:
        if not self.accepts:
            raise Unavailable("Redis does not answer")
        self.jobs.append(job)
        if self._threads is not None:
            self._threads.submit(self.take, job)

    def take(self, job: WorkerJob, by: Claimant = "worker") -> bool:
        """Claim *job* and do it; return whether the gateway granted the claim."""
        with claim(
            self._settings.streams_socket,
            job.token,
            by,
            idle_s=self._settings.stream_idle_s,
            stalled_s=self._stalled_s,
        ) as claimed:
            if claimed is not None:
                self._work(claimed)
            return claimed is not None

    async def state(self) -> QueueState:
        if not self.accepts:
            raise Unavailable("Redis does not answer")
        return QueueState(0, 0, self.silent)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False)


class ThreadPool:
    """Replaces the gateway's own processes by threads."""

    def __init__(self, queue: ThreadQueue) -> None:
        self._queue = queue

    async def run(self, pending: PendingJob) -> None:
        await asyncio.to_thread(self._queue.take, pending.job, "gateway")

    def close(self) -> None:
        """Do nothing: the queue owns the threads."""


@dataclass
class Running:
    """A running gateway, until `stop`."""

    gateway: Gateway
    dispatcher: Dispatcher
    metrics: GatewayMetrics
    driver: MemoryDriver
    queue: ThreadQueue
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    is_stopped: bool = False

    def stop(self) -> None:
        """Stop the gateway; do nothing if it has stopped."""
        if self.is_stopped:
            return
        self.is_stopped = True
        asyncio.run_coroutine_threadsafe(self.gateway.stop(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def run_gateway(
    settings: Settings,
    work: Work,
    *,
    workers: int = 1,
    timeouts: PickupTimeouts | None = None,
    driver: Driver | None = None,
    pool: Pool | None = None,
    stalled_s: float = STALLED_S,
    light_grace_s: float = 10.0,
) -> Running:
    """Start a gateway whose jobs *work* does, in threads; *driver* replaces the driver in memory."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    memory_driver = MemoryDriver(settings)
    queue = ThreadQueue(settings, workers, work, stalled_s)
    metrics = GatewayMetrics()

    async def start() -> tuple[Gateway, Dispatcher]:
        dispatcher = Dispatcher(
            settings,
            metrics,
            timeouts or PickupTimeouts(),
            open_queue=lambda _: queue,
            open_pool=lambda *_: pool or ThreadPool(queue),
        )
        gateway = Gateway(settings, driver or memory_driver, metrics, dispatcher, light_grace_s=light_grace_s)
        await gateway.start()
        return gateway, dispatcher

    try:
        gateway, dispatcher = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    except BaseException:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        raise
    return Running(gateway, dispatcher, metrics, memory_driver, queue, loop, thread)
