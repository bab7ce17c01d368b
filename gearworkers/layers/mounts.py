"""The mounts of one node's layers: counted ones, that containers run on, and views that nobody else sees.

A container is one overlay: the indexes of its layers, then where their contents are looked up: what its private layers
have for themselves, the public cache, and in an incomplete chain the trap of the lazy file server (mounts.lazy.tree).
The public cache may hold half of what a private layer has whole: others store there in place (objects.inplace).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from gearworkers.errors import from_os_error
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.store import MERGED, UPPER, WORK, Kind, Layer, LayerStore, check_id
from gearworkers.lazyfs.tree import FAILED, FETCH
from gearworkers.mounts import overlay
from gearworkers.mounts.mountinfo import wait_until_mounted
from gearworkers.mounts.table import MountTable
from gearworkers.profiles.hooks import Starts
from gearworkers.settings import Settings
from gearworkers.util.fs import opened_directory

_EMPTY = "empty"
_LAZY_TIMEOUT_S = 10.0
"""At a start of all parts a container may be mounted before the lazy file server is up."""


class MustWait(Exception):
    """A mount that looks into the lazy file system waits for its server, with no limit if that hangs."""


class MountedLayers:
    """Counted mounts at `merged/` of each layer; from any thread of the one process of the node that mounts."""

    def __init__(self, settings: Settings, layers: LayerStore, starts: Starts) -> None:
        self._settings = settings
        self._layers = layers
        self._starts = starts
        self._table = MountTable(settings.run_dir / "mounts")
        self._old_numbers = settings.old_numbers_path
        self._watching = threading.Lock()

    def prepare(self) -> None:
        """Make what is missing.

        Raises:
            GearError: It cannot be made.
        """
        try:
            (self._settings.gear_root / _EMPTY).mkdir(mode=0o755, exist_ok=True)
            self._table.prepare()
            self._old_numbers.mkdir(mode=0o700, exist_ok=True)
            self._note_old_numbers()
        except OSError as exc:
            raise from_os_error(exc, "prepare the directories of mounts") from exc

    def restart(self) -> None:
        """The caller begins anew: what is mounted has one user."""
        self._table.restart()

    def get(self, id: str, mount_label: str, ids: IdMaps, *, volatile: bool, may_wait: bool = True) -> Path:
        """Mount the layer, or count one more user of its mount.

        Args:
            id: The layer's; a new one becomes a container layer.
            mount_label: SELinux label; empty for the layer's own.
            ids: Who owns what is made.
            volatile: It need not survive a power cut.
            may_wait: Whether the caller has time for the lazy file server.

        Returns:
            Where it is mounted.

        Raises:
            NotFound: No such layer.
            FailedPrecondition: It, or one below it, is unfinished; or the kernel refuses.
            MustWait: The layer is incomplete, not mounted, and *may_wait* is False; nothing has changed.
        """
        check_id(id)
        with self._table.locked(id):
            layer = self._layers.get(id)
            if layer.kind is Kind.NEW:
                layer = self._layers.promote(layer, ids)
            target = self._layers.directory(layer) / MERGED
            self._table.acquire(id, target, lambda: self._mount(layer, mount_label, target, volatile, may_wait))
            return target

    def put(self, id: str) -> None:
        """Count one user less; unmount after the last. One too many, or of no layer, is fine."""
        check_id(id)
        with self._table.locked(id):
            if not self._layers.exists(id):
                return
            directory = self._layers.directory(self._layers.get(id))
            if self._table.release(id, directory / MERGED):
                self._starts.end(id)
                (self._old_numbers / id).unlink(missing_ok=True)

    def remove(self, id: str) -> None:
        """Unmount the layer whatever its count is, and remove it; one that is not there is fine."""
        check_id(id)
        with self._table.locked(id):
            self._drop(id)
            self._layers.remove(id)

    def drop_all(self) -> None:
        """Unmount all that is mounted."""
        for id in self._table.mounted():
            with self._table.locked(id):
                self._drop(id)

    @contextmanager
    def view(self, id: str) -> Iterator[int | None]:
        """A descriptor of what the layer shows, None for the empty id: its mount if it has one, else one of its own."""
        if not id:
            yield None
            return
        layer = self._layers.get(id)
        merged = self._layers.directory(layer) / MERGED
        if layer.kind is Kind.CONTAINER:
            with opened_directory(merged) as fd:
                # Whether it is mounted is asked of what is open: it may be unmounted by now.
                if os.fstat(fd).st_dev != os.lstat(merged.parent).st_dev:
                    yield fd
                    return
        if layer.kind is Kind.NEW:
            self._layers.lower(layer)  # refuses one whose ApplyDiff did not finish
            with self.view(layer.parent) as parent_view:
                yield parent_view
        else:
            spec = overlay.OverlaySpec(self._layers.chain(id), self._data(id, self._layers.is_complete(id)))
            with overlay.detached(spec) as fd:
                yield fd

    def _mount(self, layer: Layer, mount_label: str, target: Path, volatile: bool, may_wait: bool) -> None:
        is_complete = self._layers.is_complete(layer.id)
        if not (is_complete or may_wait):
            raise MustWait
        if volatile:
            overlay.clear_volatile(target.parent / WORK)
        spec = self._spec(layer, mount_label, volatile, is_complete)
        with self._layers.quotas.lifted(layer.project, layer.size_limit_bytes) if layer.project else nullcontext():
            overlay.mount(spec, target)
        if layer.kind is Kind.CONTAINER and not layer.absorbable and not volatile:
            self._starts.begin(layer, target)

    def _note_old_numbers(self) -> None:
        """Note the mounts whose inode numbers a new mount would not have; `gear doctor` names them until they end."""
        for id in self._table.mounted():
            if self._layers.exists(id) and self._is_mounted(id) and self._layers.has_old_numbers(id):
                (self._old_numbers / id).touch(mode=0o600)

    def _is_mounted(self, id: str) -> bool:
        return overlay.is_mounted(self._layers.directory(self._layers.get(id)) / MERGED)

    def _drop(self, id: str) -> None:
        self._starts.end(id)
        (self._old_numbers / id).unlink(missing_ok=True)
        for parent in (self._settings.gear_containers_path, self._settings.gear_images_path):
            self._table.drop(id, parent / id / MERGED)

    def _spec(self, layer: Layer, mount_label: str, volatile: bool, is_complete: bool) -> overlay.OverlaySpec:
        data = self._data(layer.id, is_complete)
        label = mount_label or layer.mount_label
        xino = self._settings.xino
        if layer.kind is Kind.IMAGE:
            return overlay.OverlaySpec(self._layers.chain(layer.id), data, context=label, xino=xino)
        directory = self._layers.directory(layer)
        lowers = self._layers.chain(layer.parent) or (self._settings.gear_root / _EMPTY,)
        upper, work = directory / UPPER, directory / WORK
        return overlay.OverlaySpec(lowers, data, upper, work, context=label, volatile=volatile, xino=xino)

    def _data(self, id: str, is_complete: bool) -> tuple[Path, ...]:
        """Where contents are looked up, in this order."""
        settings = self._settings
        here = (*self._layers.private_caches(id), settings.gear_public_cache_path)
        if is_complete:
            return here
        self._wait_for_lazy()
        lazy = settings.lazy_mount_path
        return (*here, lazy / FETCH, settings.gear_arrivals_path, lazy / FAILED)

    def _wait_for_lazy(self) -> None:
        """One thread looks through all mounts at each change of them, the others wait for that thread."""
        deadline_s = time.monotonic() + _LAZY_TIMEOUT_S
        is_first = self._watching.acquire(timeout=_LAZY_TIMEOUT_S)
        try:
            wait_until_mounted(self._settings.lazy_mount_path, deadline_s - time.monotonic())
        finally:
            if is_first:
                self._watching.release()
