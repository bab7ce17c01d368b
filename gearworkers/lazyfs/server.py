"""The lazy file server of a node: `gear lazyfs`.

It keeps no state that a restart needs. A keeper process holds the descriptor of its FUSE connection: whatever a
dead server had read and not answered comes to its successor once more, so a container notices a pause.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec
import structlog

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.prefetch import Prefetcher
from gearworkers.fetch.priority_pool import WorkPool
from gearworkers.fetch.source import Source
from gearworkers.layers.incomplete import IncompleteLayers
from gearworkers.layers.pins import Pins
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs import client
from gearworkers.lazyfs import fuse_connection as fuse
from gearworkers.lazyfs.arrivals import Arrivals
from gearworkers.lazyfs.contents import LazyContents
from gearworkers.lazyfs.control import ControlServer
from gearworkers.lazyfs.fd_keeper import Keeper
from gearworkers.lazyfs.fuse_connection import Connection
from gearworkers.lazyfs.passthrough import Openings
from gearworkers.lazyfs.pin_fetch import PinKeeper
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
_UPKEEP_S = 0.5
_USERS_EVERY = 10
_LOCK_FILE = "lazyfs.lock"
_OPENINGS = "lazyfs-passed"


class LazyServer:
    """One node's lazy file system, from mount to unmount; `run` once."""

    def __init__(self, settings: Settings, sources: Sequence[Source]) -> None:
        self._settings = settings
        self._store = ObjectStore(settings.gear_public_cache_path)
        self._arrivals = Arrivals(settings.gear_arrivals_path, self._store)
        self._wanted = IncompleteLayers(settings.gear_images_path)
        self._pool = WorkPool(settings.fetch_threads, for_background=settings.fetch_threads // 2)
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
            is_wanted=lambda digest: self._wanted.has(digest) or pins.has(digest),
        )
        remote = next((source for source in sources if isinstance(source, Remote)), None)
        self._sources = sources
        self._prefetcher = Prefetcher(
            self._fetcher, sources, self._pool, large_bytes=large_bytes, served_bytes=served_bytes
        )
        self._profiles = ProfilePrefetcher(layers, self._document, self._prefetcher.soon)
        self._misses = ProfileGrowth(
            layers,
            remote,
            lambda object: self._contents.reads(object),
            self._profiles.known,
            window_s=settings.profile_window_s,
        )
        self._contents = LazyContents(
            self._store,
            self._arrivals,
            self._wanted,
            self._fetcher,
            self._misses.missed,
            large_bytes=large_bytes,
            served_bytes=served_bytes,
        )
        self._pins = PinKeeper(pins, self._fetcher.whole.is_here, self._pool, self._prefetcher.wholly)
        self._stop = threading.Event()

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop`.

        The file system stays mounted, for a successor, while an overlay looks into it.

        Raises:
            FailedPrecondition: Another server of this root, or run directory, runs.
            GearError: What could not be set up.
        """
        with ExitStack() as stack:
            for directory in (self._settings.run_dir, self._settings.gear_root):
                stack.enter_context(sole_process(directory / _LOCK_FILE, "a lazy file server"))
            self._arrivals.prepare()
            self._fetcher.prepare()
            keeper = Keeper(self._settings.lazyfs_keeper_socket)
            connection = self._connect(keeper)
            for number in range(_SERVING_THREADS):
                threading.Thread(target=self._serve, args=(connection,), name=f"fuse-{number}", daemon=True).start()
            for name in (FETCH, FAILED):
                os.stat(self._settings.lazy_mount_path / name)  # once asked, the kernel knows it while no server lives
            orders = {"/prefetch": self._prefetch, "/image": self._image, "/reads": self._reads}
            stack.enter_context(ControlServer(self._settings.lazyfs_socket, self._status, orders))
            _log.info("the lazy file system is served", at=str(self._settings.lazy_mount_path))
            notify_ready(self._settings.notify_socket)
            self._look_after(connection, keeper)
            if not is_data_layer(self._settings.gear_arrivals_path):
                overlay.unmount(self._settings.lazy_mount_path)
        self._profiles.close()
        self._pool.close()
        self._fetcher.close()

    def stop(self) -> None:
        """Let `run` return."""
        self._stop.set()

    def _connect(self, keeper: Keeper) -> Connection:
        """To the file system that a dead server has left, or to a new one."""
        target = self._settings.lazy_mount_path
        fuse_fd = keeper.take() if is_mount_point(target) else None
        is_new = fuse_fd is None
        if fuse_fd is None:
            overlay.unmount(target)  # one whose descriptor is lost answers nobody
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            fuse_fd = fuse.mount(target)
        openings = Openings(fuse_fd, self._settings.run_dir / _OPENINGS)
        openings.begin(is_new=is_new)
        if is_new:
            keeper.keep(fuse_fd)  # last: a successor believes the notes of what was passed
        connection = Connection(fuse_fd, Tree(self._contents, openings).handle)
        if not is_new:
            connection.resume()
            _log.info("took over a mounted lazy file system")
        return connection

    def _serve(self, connection: Connection) -> None:
        try:
            connection.serve()
        except Exception:
            _log.exception("the lazy file system cannot be served")
        self.stop()  # unmounted by somebody, or broken: the next start mounts it anew

    # -- upkeep

    def _look_after(self, connection: Connection, keeper: Keeper) -> None:
        turn = 0
        while not self._stop.wait(_UPKEEP_S):
            turn += 1
            with _tried_again():
                connection.give_up_killed()
            with _tried_again():
                keeper = self._revived(keeper, connection.fuse_fd)
            with _tried_again():
                self._upkeep(with_users=turn % _USERS_EVERY == 0)
                self._forget_collected(connection)

    def _upkeep(self, *, with_users: bool) -> None:
        self._fetcher.chunked.fill_idle(self._settings.fill_delay_s)
        self._pins.look()
        for id in self._wanted.completed(self._store):
            if self._wanted.complete(id, self._store):
                _log.info("a layer is complete", layer=id)
        if with_users and not is_data_layer(self._settings.gear_arrivals_path):
            self._arrivals.empty()
        if with_users:
            self._fetcher.chunked.forget_unwanted(self._settings.fill_delay_s)

    def _forget_collected(self, connection: Connection) -> None:
        for digest in self._contents.collected():
            if not connection.waiting:  # else later: it would wait for their answers
                connection.invalidate(*entry_of(digest))

    def _revived(self, keeper: Keeper, fuse_fd: int) -> Keeper:
        """The keeper, or a new one if it has died."""
        if not keeper.is_dead():
            return keeper
        _log.warning("the keeper of the lazy file system died; another one is started")
        successor = Keeper(self._settings.lazyfs_keeper_socket)
        successor.keep(fuse_fd)
        keeper.close()
        return successor

    # -- what others ask

    def _status(self) -> client.LazyStatus:
        counts = self._fetcher.outcomes
        return client.LazyStatus(
            incomplete_layers=len(self._wanted.layers()),
            lookups=self._contents.lookups,
            arriving=self._fetcher.arriving,
            serving=self._contents.serving,
            fetched_objects=counts.objects,
            received_bytes=counts.received_bytes,
            reused_bytes=counts.reused_bytes,
            failed=counts.failed,
            corrupt=counts.corrupt,
            on_demand=self._pool.urgent_calls,
            prefetched=self._prefetcher.counts.contents,
            prefetched_bytes=self._prefetcher.counts.size_bytes,
            profiles_found=self._profiles.counts.found,
            profiles_absent=self._profiles.counts.absent,
            failures={digest.hex(): why for digest, why in list(counts.failures.items())},
        )

    def _prefetch(self, body: bytes) -> client.Coming:
        """Have the named layers' missing objects fetched behind, in the order of the lists."""
        ids = msgspec.json.decode(body, type=client.Layers).layers
        wanted = {record[0]: record for id in ids for record in self._wanted.missing(id, self._store)}
        self._prefetcher.wholly(wanted.values())
        return client.Coming(len(wanted))

    def _image(self, body: bytes) -> client.Known:
        news = msgspec.json.decode(body, type=client.Image)
        if news.starts:
            self._misses.begin(news.layer)
        return self._profiles.notify(news)

    def _reads(self, body: bytes) -> client.Reads:
        objects = msgspec.json.decode(body, type=client.Objects).objects
        return {object: self._contents.reads(object) for object in objects}

    def _document(self, name: str) -> bytes | None:
        """From the first source that has it."""
        return next((found for source in self._sources if (found := source.document(name)) is not None), None)


def serve(settings: Settings, sources: Sequence[Source]) -> None:
    """Be the lazy file server until a signal says to end."""
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # large objects are held open
    server = LazyServer(settings, sources)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()


def sources_of(settings: Settings) -> list[Source]:
    """Where this node gets objects: its remote behind nfs/, or nfs/ alone.

    Raises:
        InvalidInput: GEAR_REMOTE is none that is known.
    """
    if settings.remote:
        return [open_remote(settings)]
    return [open_nfs(settings)] if uses_nfs(settings) else []


@contextmanager
def _tried_again() -> Iterator[None]:
    """What fails is told, and done again at the next turn: the server goes on."""
    try:
        yield
    except (GearError, OSError) as exc:
        _log.error("upkeep of the lazy file system failed", error=str(exc))
