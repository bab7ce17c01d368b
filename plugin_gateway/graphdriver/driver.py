"""The Gear driver: implements the graphdriver protocol's calls with the engine of a GEAR_ROOT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from gearworkers.engine.engine import Engine, layer_call
from gearworkers.engine.root import save_root
from gearworkers.errors import InvalidInput
from gearworkers.layers.diff.changes import Change
from gearworkers.layers.diff.export import Writable
from gearworkers.layers.idmap import IdMaps, IdRange
from gearworkers.layers.index.probe import check_index
from gearworkers.layers.record import LayerKind
from gearworkers.layers.store import WORK
from gearworkers.mounts.probe import probe, require
from gearworkers.settings import Settings
from gearworkers.tar.reader import Readable
from plugin_gateway.engines import Engines
from plugin_gateway.graphdriver import options
from plugin_gateway.graphdriver.mount_counts import MountCounts

_INIT_SUFFIX = "-init"


@dataclass(frozen=True, slots=True)
class _Current:
    """The engine that new calls use, and the settings with dockerd's options."""

    engine: Engine
    settings: Settings


class GearDriver:
    """The driver of one dockerd: its GEAR_ROOT changes when dockerd names another one.

    Calls may run in many threads at the same time. Each ends on the root on which it began. Errors are GearError. An
    error leaves no partial result, except the target of an ApplyDiff, which can only be removed.
    """

    def __init__(self, settings: Settings, engines: Engines | None = None) -> None:
        """
        Args:
            settings: The node's settings.
            engines: The gateway's engines; None for engines of this driver alone.
        """
        self._node_settings = settings
        self._engines = engines or Engines()
        self._current = _Current(Engine.of(settings), settings)  # replaced as a whole; a call reads it once
        self._counts = MountCounts(settings.run_dir / "mounts")
        self._init_lock = Lock()

    @property
    def settings(self) -> Settings:
        """The settings with dockerd's options."""
        return self._current.settings

    @property
    def engine(self) -> Engine:
        """The engine that new calls use."""
        return self._current.engine

    # -- the daemon's life

    def prepare(self) -> None:
        """Create missing directories under GEAR_ROOT and repair the leftovers of a crash, at the gateway's start.

        A running dockerd does not repeat its options, so those of its `init` are read from the run directory.

        Raises:
            GearError: GEAR_ROOT cannot be used.
        """
        with self._init_lock:
            self._use(self._prepare_root(options.load(self._node_settings.run_dir)))

    def _prepare_root(self, opts: Sequence[str]) -> _Current:
        """Return the engine of the root that *opts* name, and their settings; repairs and locks a root once."""
        settings = options.with_options(self._node_settings, opts)
        engine = self._engines.open(settings)
        return _Current(engine, replace(settings, gear_root=engine.settings.gear_root))

    def _use(self, current: _Current) -> None:
        run_dir = self._node_settings.run_dir
        self._counts.prepare()
        save_root(run_dir, current.settings.gear_root)
        self._current = current

    def init(self, home: str, opts: Sequence[str], uid_maps: Sequence[IdRange], gid_maps: Sequence[IdRange]) -> None:
        """Start to serve a new dockerd: apply its options and id maps, and reset the mount counts.

        Args:
            home: The directory that dockerd suggests; GEAR_ROOT is used instead.
            opts: ``gear.root=PATH``, ``gear.broker=URL``.
            uid_maps: The user ids of --userns-remap; empty without it.
            gid_maps: The group ids of --userns-remap; empty without it.

        Raises:
            InvalidInput: An option is unknown or malformed.
            FailedPrecondition: The kernel or the file system lacks a feature, or another gateway uses gear.root.
        """
        with self._init_lock:
            current = self._prepare_root(opts)
            settings = current.engine.settings
            require(probe(settings.gear_root, check_index))
            maps = IdMaps(tuple(uid_maps), tuple(gid_maps))
            maps.save(settings.gear_root)
            for path in (settings.gear_root, settings.gear_images_path, settings.gear_containers_path):
                path.chmod(0o711 if maps.uids else 0o700)
            self._counts.prepare()
            self._counts.restart()
            options.save(settings.run_dir, opts)
            self._use(current)

    def capabilities(self) -> dict[str, bool]:
        """Announce that Diff returns exactly the tar that ApplyDiff received, so that dockerd keeps no tar-split."""
        return {"ReproducesExactDiffs": True}

    def cleanup(self) -> None:
        """Unmount everything, when dockerd ends."""
        engine = self.engine
        for id in self._counts.ids():
            with self._counts.locked(id), engine.mounts.unmounted(id):
                self._counts.forget(id)
        engine.mounts.unmount_indexes()

    def release(self) -> None:
        """Unmount everything except containers, when the gateway ends."""
        self.engine.close()  # even if it was never prepared
        self._engines.close()

    # -- layers

    @layer_call
    def create(self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None) -> None:
        """Create an empty layer that ApplyDiff or a mount fills.

        Raises:
            AlreadyExists, NotFound, InvalidInput: As `LayerStore.create`; or an option that only containers have.
        """
        if options.container_size(storage_opt) is not None:
            raise InvalidInput(f"layer {id}: --storage-opt size is for containers only")
        self.engine.create(id, parent, LayerKind.NEW, mount_label)

    @layer_call
    def create_read_write(
        self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None
    ) -> None:
        """Create the read-write layer of a container.

        The ``size`` in *storage_opt* limits the container; dockerd's ``-init`` layer has no limit.

        Raises:
            AlreadyExists, NotFound, InvalidInput: As `LayerStore.create`; or an option is unknown or malformed.
            FailedPrecondition: The file system cannot limit a container's size.
        """
        engine = self.engine
        size = options.container_size(storage_opt)
        if size is not None:
            engine.layers.quotas.require()
        limit = 0 if size is None or _is_init_layer(id) else size
        engine.create(id, parent, LayerKind.CONTAINER, mount_label, limit)

    @layer_call
    def remove(self, id: str) -> None:
        """Remove the layer, mounted or not; do nothing if it does not exist."""
        engine = self.engine
        with self._counts.locked(id), engine.mounts.unmounted(id):
            self._counts.forget(id)
            engine.layers.remove(id)

    def exists(self, id: str) -> bool:
        """Whether there is such a layer."""
        return self.engine.layers.exists(id)

    # -- mounts

    @layer_call
    def get(self, id: str, mount_label: str = "", *, may_wait: bool = True) -> str:
        """Mount the layer, or count one more user of its mount.

        Returns:
            The path of the merged tree; read-only for an image layer.

        Raises:
            NotFound: There is no such layer.
            FailedPrecondition, LazyServerNeeded: As `LayerMounts.mount`.
        """
        engine = self.engine
        with self._counts.locked(id):
            layer = engine.layers.get(id)  # read once: this call is hot

            def mount() -> Path:
                return engine.mounts.mount(layer, mount_label, volatile=_is_init_layer(id), may_wait=may_wait)

            target = engine.mounts.mount_point(layer)
            return str(self._counts.acquire(id, target, mount, lambda: engine.mounts.unmount(layer)))

    @layer_call
    def put(self, id: str) -> None:
        """Remove one user of the mount; unmount after the last. Accept an unmounted or unknown layer."""
        engine = self.engine
        with self._counts.locked(id):
            if engine.layers.exists(id):
                layer = engine.layers.get(id)
                self._counts.release(id, engine.mounts.mount_point(layer), lambda: engine.mounts.unmount(layer))

    # -- contents

    @layer_call
    def get_metadata(self, id: str) -> dict[str, str]:
        """Return LowerDir, UpperDir, WorkDir and MergedDir, as overlay2 names them."""
        engine = self.engine
        layer = engine.layers.get(id)
        metadata = {
            "UpperDir": str(engine.layers.lower(layer)),
            "WorkDir": str(engine.layers.directory(layer) / WORK),
            "MergedDir": str(engine.mounts.mount_point(layer)),
        }
        if layer.parent:
            metadata["LowerDir"] = ":".join(map(str, engine.layers.lowers(layer.parent)))
        return metadata

    def changes(self, id: str, parent: str) -> list[Change]:
        """As `Engine.changes`."""
        return self.engine.changes(id, parent)

    def diff_size(self, id: str, parent: str) -> int:
        """As `Engine.diff_size`."""
        return self.engine.diff_size(id, parent)

    def apply_diff(self, id: str, parent: str, source: Readable) -> int:
        """As `Engine.apply_diff`; dockerd's calls reach the engine of a worker instead."""
        return self.engine.apply_diff(id, parent, source)

    def diff(self, id: str, parent: str, sink: Writable) -> None:
        """As `Engine.diff`; dockerd's calls reach the engine of a worker instead."""
        self.engine.diff(id, parent, sink)

    def can_dedupe(self, id: str) -> bool:
        """As `Engine.can_dedupe`."""
        return self.engine.can_dedupe(id)

    def status(self) -> list[tuple[str, str]]:
        """As `Engine.status`, for `docker info`."""
        return self.engine.status()


def _is_init_layer(id: str) -> bool:
    """Return whether this is a container's ``-init`` layer, which need not survive a power cut.

    dockerd creates it together with the container's own layer.
    """
    return id.endswith(_INIT_SUFFIX)
