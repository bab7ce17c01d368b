"""The lazy file server of a node: `gear lazyfs`.

The server can be replaced while containers run, and containers only notice a pause. A keeper process holds the
descriptor of the FUSE connection, and the kernel sends the pending requests of a dead server to its successor again.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import structlog

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError, InvalidInput, NotFound
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.prefetch import Prefetcher
from gearworkers.fetch.priority_pool import PriorityPool
from gearworkers.fetch.source import ObjectSource
from gearworkers.layers.incomplete import IncompleteLayers
from gearworkers.layers.pins import Pins
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs import client
from gearworkers.lazyfs import fuse_connection as fuse
from gearworkers.lazyfs.arrivals import Arrivals
from gearworkers.lazyfs.companions import Companions
from gearworkers.lazyfs.contents import LazyContents
from gearworkers.lazyfs.control import ControlServer
from gearworkers.lazyfs.fd_keeper import FdKeeper
from gearworkers.lazyfs.fuse_connection import FuseConnection
from gearworkers.lazyfs.index_finder import IndexFinder
from gearworkers.lazyfs.passthrough import OpenNodes
from gearworkers.lazyfs.pin_fetch import PinFetcher
from gearworkers.lazyfs.tree import FAILED, FETCH, Tree, entry_of
from gearworkers.mounts import overlay
from gearworkers.mounts.mountinfo import is_data_layer, is_mount_point
from gearworkers.profiles.growth import ProfileGrowth
from gearworkers.profiles.prefetch import ProfilePrefetcher
from gearworkers.remote.encoding import LARGE_BYTES as CHUNKED_BYTES
from gearworkers.remote.factory import open_nfs, open_remote, uses_nfs
from gearworkers.remote.remote import Remote
from gearworkers.settings import Settings
from gearworkers.util.locks import sole_process
from gearworkers.util.process import notify_ready

_log = structlog.get_logger(__name__)

_SERVING_THREADS = 3
_MAINTENANCE_INTERVAL_S = 0.5
_CLEAN_UP_EVERY = 10
"""Maintenance turns between two clean-ups of arrivals and partial files."""
_LOCK_FILE = "lazyfs.lock"
_PASSED_NODES = "lazyfs-passed"


class LazyServer:
    """One node's lazy file system, from mount to unmount; `run` once."""

    def __init__(self, settings: Settings, sources: Sequence[ObjectSource]) -> None:
        self._settings = settings
        self._store = ObjectStore(settings.gear_public_cache_path)
        self._arrivals = Arrivals(settings.gear_arrivals_path, self._store)
        self._incomplete = IncompleteLayers(settings.gear_images_path)
        self._pool = PriorityPool(settings.remote.fetch_threads, for_background=settings.remote.fetch_threads // 2)
        served_bytes = settings.large_object_bytes
        large_bytes = min(served_bytes, CHUNKED_BYTES)
        layers = LayerStore(settings, self._store)
        pins = Pins(settings, layers, self._store)
        self._fetcher = Fetcher(
            self._store,
            settings.gear_fetching_path,
            sources,
            self._pool,
            large_bytes=large_bytes,
            is_referenced=lambda digest: self._incomplete.refer_to(digest) or pins.has(digest),
        )
        self._indexes = IndexFinder(self._document, self._content)
        remote = next((source for source in sources if isinstance(source, Remote)), None)
        self._sources = sources
        self._prefetcher = Prefetcher(
            self._fetcher, sources, self._pool, large_bytes=large_bytes, served_bytes=served_bytes
        )
        self._companions = Companions(layers, self._store, self._fetcher, self._prefetcher.fetch_soon)
        self._profiles = ProfilePrefetcher(layers, self._document, self._prefetcher.fetch_soon, self._without_profile)
        self._profile_growth = ProfileGrowth(
            layers,
            remote,
            lambda digest: self._contents.reads(digest),
            self._profiles.known,
            window_s=settings.profile_window_s,
        )
        self._contents = LazyContents(
            self._store,
            self._arrivals,
            self._incomplete,
            self._fetcher,
            self._missed,
            served_bytes=served_bytes,
        )
        self._pins = PinFetcher(pins, self._fetcher.is_here, self._pool, self._prefetcher.fetch_all)
        self._stop = threading.Event()

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop`.

        While an overlay uses the file system, it stays mounted for a successor.

        Raises:
            FailedPrecondition: Another server of this root or run directory runs.
            GearError: The server cannot be set up.
        """
        with ExitStack() as stack:
            for directory in (self._settings.run_dir, self._settings.gear_root):
                stack.enter_context(sole_process(directory / _LOCK_FILE, "a lazy file server"))
            self._arrivals.prepare()
            self._fetcher.prepare()
            keeper = FdKeeper(self._settings.lazyfs_keeper_socket)
            connection = self._connect(keeper)
            for number in range(_SERVING_THREADS):
                threading.Thread(target=self._serve, args=(connection,), name=f"fuse-{number}", daemon=True).start()
            for name in (FETCH, FAILED):
                # The kernel caches the answer, so mounts need no server.
                os.stat(self._settings.lazy_mount_path / name)
            handlers = {
                "/prefetch": self._prefetch,
                "/image": self._image,
                "/reads": self._reads,
                "/indexes": self._find_indexes,
                "/fetch-index": self._fetch_index,
            }
            stack.enter_context(ControlServer(self._settings.lazyfs_socket, self._status, handlers))
            _log.info("serving the lazy file system", at=str(self._settings.lazy_mount_path))
            notify_ready(self._settings.notify_socket)
            self._maintain(connection, keeper)
            if not is_data_layer(self._settings.gear_arrivals_path):
                overlay.unmount(self._settings.lazy_mount_path)
        self._indexes.close()
        self._profiles.close()
        self._companions.close()
        self._pool.close()
        self._fetcher.close()

    def stop(self) -> None:
        """Make `run` return."""
        self._stop.set()

    def _connect(self, keeper: FdKeeper) -> FuseConnection:
        """Connect to the file system of a dead server, or to a new one."""
        target = self._settings.lazy_mount_path
        fuse_fd = keeper.take() if is_mount_point(target) else None
        is_new = fuse_fd is None
        if fuse_fd is None:
            overlay.unmount(target)  # without its descriptor, it cannot answer requests
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            fuse_fd = fuse.mount(target)
        open_nodes = OpenNodes(fuse_fd, self._settings.run_dir / _PASSED_NODES)
        open_nodes.prepare(is_new=is_new)
        if is_new:
            keeper.keep(fuse_fd)  # last: a successor relies on the list of passed nodes
        connection = FuseConnection(fuse_fd, Tree(self._contents, open_nodes).handle)
        if not is_new:
            connection.resume()
            _log.info("took over a mounted lazy file system")
        return connection

    def _serve(self, connection: FuseConnection) -> None:
        try:
            connection.serve()
        except Exception:
            _log.exception("cannot serve the lazy file system")
        self.stop()  # it was unmounted or is broken: the next start mounts a new one

    # -- maintenance

    def _maintain(self, connection: FuseConnection, keeper: FdKeeper) -> None:
        turn = 0
        while not self._stop.wait(_MAINTENANCE_INTERVAL_S):
            turn += 1
            with _logged_errors():
                connection.fail_killed()
            with _logged_errors():
                keeper = self._live_keeper(keeper, connection.fuse_fd)
            with _logged_errors():
                self._complete_layers()
                if turn % _CLEAN_UP_EVERY == 0:
                    self._clean_up()
                self._restore_or_forget_removed(connection)

    def _complete_layers(self) -> None:
        """Fetch the rest of idle large objects and the objects of pins; mark the layers that have become complete."""
        self._fetcher.fill_idle(self._settings.fill_delay_s)
        self._pins.check()
        for id in self._incomplete.newly_complete(self._store):
            if self._incomplete.mark_complete(id, self._store):
                _log.info("a layer is complete", layer=id)

    def _clean_up(self) -> None:
        """Remove arrivals that no overlay needs, and partial files of unreferenced objects."""
        if not is_data_layer(self._settings.gear_arrivals_path):
            self._arrivals.empty()
        self._fetcher.remove_unreferenced(self._settings.fill_delay_s)

    def _restore_or_forget_removed(self, connection: FuseConnection) -> None:
        for digest in self._contents.restore_removed():
            if not connection.pending:  # else in a later turn: `invalidate` waits until they are answered
                connection.invalidate(*entry_of(digest))

    def _live_keeper(self, keeper: FdKeeper, fuse_fd: int) -> FdKeeper:
        """Return the keeper, or a new one if it has died."""
        if not keeper.is_dead():
            return keeper
        _log.warning("the keeper of the lazy file system died; starting another one")
        successor = FdKeeper(self._settings.lazyfs_keeper_socket)
        successor.keep(fuse_fd)
        keeper.close()
        return successor

    def _without_profile(self, image: client.ImageEvent) -> None:
        self._companions.begin(image.layer, image.command)

    def _missed(self, digest: bytes, size_bytes: int) -> None:
        self._profile_growth.missed(digest, size_bytes)
        self._companions.missed(digest)

    # -- the control socket

    def _status(self) -> client.LazyStatus:
        stats = self._fetcher.stats
        return client.LazyStatus(
            incomplete_layers=len(self._incomplete.ids()),
            lookups=self._contents.lookups,
            arriving=self._fetcher.arriving,
            serving=self._contents.serving,
            fetched_objects=stats.objects,
            received_bytes=stats.received_bytes,
            reused_bytes=stats.reused_bytes,
            failed=stats.failed,
            corrupt=stats.corrupt,
            on_demand=self._pool.on_demand_calls,
            prefetched=self._prefetcher.stats.contents,
            prefetched_bytes=self._prefetcher.stats.size_bytes,
            profiles_found=self._profiles.counts.found,
            profiles_absent=self._profiles.counts.absent,
            failures={digest.hex(): error for digest, error in list(stats.failures.items())},
        )

    def _prefetch(self, body: bytes) -> client.PrefetchReply:
        """Fetch the layers' missing objects in the background, in the order of the lists."""
        ids = msgspec.json.decode(body, type=client.PrefetchRequest).layers
        missing = {record[0]: record for id in ids for record in self._incomplete.missing(id, self._store)}
        self._prefetcher.fetch_all(missing.values())
        return client.PrefetchReply(len(missing))

    def _image(self, body: bytes) -> client.ProfileStatus:
        event = msgspec.json.decode(body, type=client.ImageEvent)
        if event.starts:
            self._profile_growth.begin(event.layer)
        return self._profiles.notify(event)

    def _reads(self, body: bytes) -> client.ReadRanges:
        objects = msgspec.json.decode(body, type=client.ReadsRequest).objects
        return {digest: self._contents.reads(digest) for digest in objects}

    def _find_indexes(self, body: bytes) -> dict[str, client.LayerIndex]:
        return self._indexes.find(msgspec.json.decode(body, type=client.IndexesRequest).layers)

    def _fetch_index(self, body: bytes) -> None:
        request = msgspec.json.decode(body, type=client.FetchIndexRequest)
        target = Path(request.path)
        if target.parent.parent != self._settings.gear_build_path:
            raise InvalidInput(f"{target} is not in a directory of {self._settings.gear_build_path}")
        self._indexes.fetch(request.index, target)

    def _content(self, digest: bytes) -> Iterator[bytes]:
        """Yield the bytes of an object from the first source that has it."""
        for source in self._sources:
            try:
                yield from source.fetch(digest)
                return
            except NotFound:
                continue
        raise NotFound(f"no source has the object {digest.hex()}")

    def _document(self, name: str) -> bytes | None:
        """Return a document from the first source that has it."""
        return next((found for source in self._sources if (found := source.document(name)) is not None), None)


def serve(settings: Settings, sources: Sequence[ObjectSource]) -> None:
    """Run the lazy file server until SIGTERM or SIGINT."""
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))  # large objects stay open
    server = LazyServer(settings, sources)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()


def open_sources(settings: Settings) -> list[ObjectSource]:
    """Return the sources of this node: its remote behind nfs/, or nfs/ alone.

    Raises:
        InvalidInput: GEAR_REMOTE is not a valid remote.
    """
    if settings.remote.url:
        return [open_remote(settings)]
    return [open_nfs(settings)] if uses_nfs(settings) else []


@contextmanager
def _logged_errors() -> Iterator[None]:
    """Log an error and continue: the next turn tries again."""
    try:
        yield
    except (GearError, OSError) as exc:
        _log.error("maintenance of the lazy file system failed", error=str(exc))
