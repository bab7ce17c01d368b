"""Mounts of layers: at `merged/` of each layer for its users, and views without a mount point.

A container is one overlay of the indexes of its layers and the directories where their contents are looked up. These
are the private caches of its private layers, the public cache, and for an incomplete chain the fetch directory of the
lazy file server (lazyfs.tree). The private caches come first: imports store objects in place (cas.inplace), so the
public cache may hold a part of an object that a private layer has whole.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from gearworkers.errors import NotFound, from_os_error
from gearworkers.layers.idmap import NO_MAPS, IdMaps
from gearworkers.layers.record import Layer, LayerKind
from gearworkers.layers.store import MERGED, UPPER, WORK, LayerStore, check_id
from gearworkers.lazyfs.tree import FAILED, FETCH
from gearworkers.mounts import overlay
from gearworkers.mounts.mountinfo import wait_until_mounted
from gearworkers.profiles.hooks import ProfileHooks
from gearworkers.settings import NodeSettings
from gearworkers.util.fs import opened_directory
from gearworkers.util.keyed_locks import KeyedLocks
from gearworkers.util.locks import locked_file

_EMPTY = "empty"
_INDEX_LOCK = "indexes.lock"
LAZY_TIMEOUT_S = 10.0
"""When the whole stack starts, a container may be mounted before the lazy file server runs."""


class LazyServerNeeded(Exception):
    """The mount would wait for the lazy file server, and without limit if the server hangs."""


class LayerMounts:
    """Mounts layers at their `merged/`. Call from any thread; only one process of the node mounts layers."""

    def __init__(self, settings: NodeSettings, layers: LayerStore, profile_hooks: ProfileHooks) -> None:
        self._settings = settings
        self._layers = layers
        self._profile_hooks = profile_hooks
        self._old_numbers = settings.old_numbers_path
        self._index_lock = settings.gear_root / _INDEX_LOCK
        self._locks = KeyedLocks()
        self._watching = threading.Lock()

    def prepare(self) -> None:
        """Create missing directories.

        Raises:
            GearError: The file system refuses.
        """
        try:
            (self._settings.gear_root / _EMPTY).mkdir(mode=0o755, exist_ok=True)
            self._old_numbers.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._record_old_numbers()
        except OSError as exc:
            raise from_os_error(exc, "prepare the directories of mounts") from exc

    def mount_point(self, layer: Layer) -> Path:
        """Return the directory where the layer is mounted; the first mount of a new layer changes it."""
        return self._layers.directory(layer) / MERGED

    def mount(self, layer: Layer, mount_label: str = "", *, volatile: bool = False, may_wait: bool = True) -> Path:
        """Mount the layer unless it is mounted. A new layer becomes a read-write layer.

        Args:
            layer: As `LayerStore.get` returned it.
            mount_label: SELinux label; empty for the layer's own.
            volatile: The upper directory need not survive a power cut.
            may_wait: Whether the call may wait for the lazy file server.

        Returns:
            The mount point; read-only for an image layer.

        Raises:
            NotFound: There is no such layer.
            FailedPrecondition: The layer, or one below it, is unfinished; or the kernel refuses.
            LazyServerNeeded: The layer is incomplete and *may_wait* is False; nothing is mounted.
        """
        with self._locks.held(layer.id):
            if layer.kind is LayerKind.NEW:
                layer = self._promoted(layer.id)
            target = self.mount_point(layer)
            if not overlay.is_mounted(target):
                self._mount(layer, target, mount_label, volatile, may_wait)
            return target

    def mount_read_only(self, id: str, target: Path, ids: IdMaps) -> None:
        """Mount a read-only view of the layer at the directory *target* unless one is mounted there.

        The view shows a container's ids as *ids* maps them.

        Raises:
            NotFound: There is no such layer.
            FailedPrecondition: The layer, or one below it, is unfinished; or the kernel refuses.
        """
        with self._locks.held(id):
            if not overlay.is_mounted(target):
                data = self._data(id, self._layers.is_complete(id))
                with self._indexes_stay_mounted():
                    lowers = self._layers.mapped_lowers(id, ids) or (self._settings.gear_root / _EMPTY,)
                    overlay.mount(overlay.OverlaySpec(lowers, data, xino=self._settings.xino), target)

    def unmount_view(self, target: Path) -> None:
        """Unmount *target*; does nothing if it is not mounted."""
        _unmount_all(target)

    def unmount(self, layer: Layer) -> None:
        """Unmount the layer; do nothing if it is not mounted."""
        with self._locks.held(layer.id):
            self._unmount(layer.id, self.mount_point(layer))

    @contextmanager
    def unmounted(self, id: str) -> Iterator[None]:
        """Unmount a layer in any state, even with a damaged record; keep other threads from mounting it meanwhile."""
        check_id(id)
        with self._locks.held(id):
            parents = (self._settings.gear_containers_path, self._settings.gear_images_path)
            self._unmount(id, *(parent / id / MERGED for parent in parents))
            yield

    @contextmanager
    def view(self, id: str) -> Iterator[int | None]:
        """Yield a descriptor of the layer's tree, or of its mount if it is mounted; None for the empty id.

        The tree has the container's ids. So it is not the mount if that maps them.
        """
        if not id:
            yield None
            return
        layer = self._layers.get(id)
        merged = self._layers.directory(layer) / MERGED
        if layer.kind is LayerKind.CONTAINER and not layer.mount_ids:
            with opened_directory(merged) as fd:
                # Check the open descriptor, not the path: the layer may be unmounted by now.
                if os.fstat(fd).st_dev != os.lstat(merged.parent).st_dev:
                    yield fd
                    return
        if layer.kind is LayerKind.NEW:
            self._layers.lower(layer)  # rejects an unfinished layer
            with self.view(layer.parent) as parent_view:
                yield parent_view
        else:
            data = self._data(id, self._layers.is_complete(id))
            with ExitStack() as stack:
                with self._indexes_stay_mounted():
                    lowers = self._layers.mapped_lowers(id, NO_MAPS)
                    fd = stack.enter_context(overlay.detached(overlay.OverlaySpec(lowers, data)))
                yield fd

    def unmount_indexes(self) -> None:
        """Unmount all indexes; containers keep their mounts. Waits for mounts in progress, in all processes."""
        if self._settings.gear_root.exists():
            with locked_file(self._index_lock):
                self._layers.unmount_indexes()

    @contextmanager
    def _indexes_stay_mounted(self) -> Iterator[None]:
        """Keep indexes mounted while an overlay is made of them; else it would have an empty directory as a lower."""
        with locked_file(self._index_lock, fcntl.LOCK_SH):
            yield

    def _promoted(self, id: str) -> Layer:
        """Turn a new layer into a read-write layer, unless another thread has done so."""
        layer = self._layers.get(id)
        if layer.kind is not LayerKind.NEW:
            return layer
        return self._layers.promote(layer, IdMaps.load(self._settings.gear_root))

    def _unmount(self, id: str, *targets: Path) -> None:
        self._profile_hooks.container_unmounted(id)
        for target in targets:
            _unmount_all(target)
        (self._old_numbers / id).unlink(missing_ok=True)

    def _mount(self, layer: Layer, target: Path, mount_label: str, volatile: bool, may_wait: bool) -> None:
        is_complete = self._layers.is_complete(layer.id)
        if not (is_complete or may_wait):
            raise LazyServerNeeded
        if volatile:
            overlay.clear_volatile(target.parent / WORK)  # the last unmount may have been a crash
        data = self._data(layer.id, is_complete)
        quotas = self._layers.quotas
        limit = quotas.raised_limit(layer.project, layer.size_limit_bytes) if layer.project else nullcontext()
        with self._indexes_stay_mounted(), limit:
            overlay.mount(self._spec(layer, data, mount_label, volatile), target)
        if layer.kind is LayerKind.CONTAINER and not layer.dedupable and not volatile:
            self._profile_hooks.container_mounted(layer, target)

    def _record_old_numbers(self) -> None:
        """Record the mounts whose inode numbers a new mount would change; `gear doctor` lists them until they end."""
        for directory in (*self._settings.gear_containers_path.iterdir(), *self._settings.gear_images_path.iterdir()):
            with suppress(NotFound):  # a layer below it is lost: `gear fsck` reports it
                if overlay.is_mounted(directory / MERGED) and self._layers.has_shared_inode_numbers(directory.name):
                    (self._old_numbers / directory.name).touch(mode=0o600)

    def _spec(self, layer: Layer, data: tuple[Path, ...], mount_label: str, volatile: bool) -> overlay.OverlaySpec:
        label = mount_label or layer.mount_label
        xino = self._settings.xino
        if layer.kind is LayerKind.IMAGE:
            lowers = self._layers.mapped_lowers(layer.id, layer.mount_ids)
            return overlay.OverlaySpec(lowers, data, context=label, xino=xino)
        directory = self._layers.directory(layer)
        lowers = self._layers.mapped_lowers(layer.parent, layer.mount_ids) or (self._settings.gear_root / _EMPTY,)
        upper, work = directory / UPPER, directory / WORK
        return overlay.OverlaySpec(lowers, data, upper, work, context=label, volatile=volatile, xino=xino)

    def _data(self, id: str, is_complete: bool) -> tuple[Path, ...]:
        """Return the directories where contents are looked up, in order."""
        settings = self._settings
        local = (*self._layers.private_directories(id), settings.gear_public_cache_path)
        if is_complete:
            return local
        self._wait_for_lazy()
        lazy = settings.lazy_mount_path
        return (*local, lazy / FETCH, settings.gear_arrivals_path, lazy / FAILED)

    def _wait_for_lazy(self) -> None:
        """Wait until the lazy file system is mounted; one thread watches the mounts, the others wait for it."""
        deadline_s = time.monotonic() + LAZY_TIMEOUT_S
        is_first = self._watching.acquire(timeout=LAZY_TIMEOUT_S)
        try:
            wait_until_mounted(self._settings.lazy_mount_path, deadline_s - time.monotonic())
        finally:
            if is_first:
                self._watching.release()


def _unmount_all(target: Path) -> None:
    """Unmount every mount at *target*: gearworkers 0.1 may have mounted twice."""
    overlay.unmount(target)
    while overlay.is_mounted(target):
        overlay.unmount(target)
