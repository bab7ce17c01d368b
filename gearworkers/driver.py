"""The Gear driver: the graphdriver protocol's calls by their names, on one node's GEAR_ROOT.

The one module of the engine that knows that Docker is the caller. `Get`, `Put` and what else is light run in the
gateway; `ApplyDiff`, `Diff` and upkeep may run in any process of the node that shares its mounts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Concatenate, ParamSpec, TypeVar

from gearworkers import options
from gearworkers.cas.collector import GarbageReport
from gearworkers.engine import Engine
from gearworkers.errors import InvalidInput, from_os_error
from gearworkers.fsck.repair import Checker
from gearworkers.layers.apply import apply_tar
from gearworkers.layers.dedupe import absorb, settled
from gearworkers.layers.diff.changes import Change, tree_changes, upper_changes
from gearworkers.layers.diff.export import Writable, write_diff, write_tree_diff
from gearworkers.layers.diff.replay import replay
from gearworkers.layers.diff.size import changed_size, tree_size
from gearworkers.layers.idmap import IDMap, IdMaps
from gearworkers.layers.index.probe import check_index
from gearworkers.layers.recovery import collect_garbage
from gearworkers.layers.store import MERGED, WORK, Kind, image_layer, new_layer
from gearworkers.layers.usage import Usage
from gearworkers.mounts.probe import backing_fs_name, probe, require
from gearworkers.remote.factory import open_remote
from gearworkers.remote.push import PushReport, push_pending
from gearworkers.settings import Settings
from gearworkers.tar.reader import Readable
from gearworkers.util.fs import opened_directory
from gearworkers.util.process import alone

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_INIT_SUFFIX = "-init"


def _translated(
    call: Callable[Concatenate[GearDriver, str, _Arguments], _Result],
) -> Callable[Concatenate[GearDriver, str, _Arguments], _Result]:
    """A call about one layer, what the file system refuses told as GearError."""

    @wraps(call)
    def translated(self: GearDriver, id: str, /, *arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        try:
            return call(self, id, *arguments, **keywords)
        except OSError as exc:
            where = f": {os.fsdecode(exc.filename)}" if isinstance(exc.filename, str | bytes) else ""
            raise from_os_error(exc, f"{call.__name__} of layer {id}{where}") from exc

    return translated


class GearDriver:
    """One GEAR_ROOT, until dockerd names another; the gateway has one, and so has each worker.

    Calls may come at the same time from many threads. Each works to its end on the root that it began with. Errors
    are GearError; after one, nothing is half done but an ApplyDiff's target, which refuses until it is removed.
    """

    def __init__(self, settings: Settings, *, sole: bool = False) -> None:
        """
        Args:
            settings: Of the node.
            sole: From `prepare` on no other process may have such a driver of the same GEAR_ROOT: what one makes, the
                other would take for what a crash left.
        """
        self._given = settings
        self._sole = sole
        self._engine = Engine.of(settings)  # replaced as a whole; a call takes it once, at its start
        self._prepared: dict[Path, Engine] = {}  # one a root: calls may be under way where dockerd was before
        self._inits = Lock()
        self._locks = ExitStack()

    @property
    def settings(self) -> Settings:
        """As dockerd's options have changed them."""
        return self._engine.settings

    # -- the daemon's life

    def prepare(self) -> None:
        """Make what is missing under GEAR_ROOT and repair what a crash left; for the gateway, at its start.

        A dockerd that runs since before does not say its options again: they are as `init` was given them.

        Raises:
            GearError: GEAR_ROOT cannot be used.
        """
        with self._inits:
            self._engine = self._prepared_engine(options.saved(self._given.run_dir))

    def _prepared_engine(self, opts: Sequence[str]) -> Engine:
        """The engine of the root that *opts* name, with their settings; a root is repaired and locked once."""
        settings = options.with_options(self._given, opts)
        root = settings.gear_root.resolve()
        if root not in self._prepared:
            engine = Engine.of(settings)
            with ExitStack() as locks:
                if self._sole:
                    locks.enter_context(alone(settings.gateway_lock, "a gateway of this GEAR_ROOT"))
                engine.prepare()
                self._locks.enter_context(locks.pop_all())
            self._prepared[root] = engine
        known = self._prepared[root]
        return replace(known, settings=replace(settings, gear_root=known.settings.gear_root))

    def init(self, home: str, opts: Sequence[str], uid_maps: Sequence[IDMap], gid_maps: Sequence[IDMap]) -> None:
        """A dockerd has started: take its options and id maps, count mounts anew.

        Args:
            home: The directory dockerd would have the driver use; GEAR_ROOT is used instead.
            opts: ``gear.root=PATH``, ``gear.broker=URL``.
            uid_maps: Of --userns-remap; empty without it.
            gid_maps: Likewise.

        Raises:
            InvalidInput: An unknown or malformed option.
            FailedPrecondition: This kernel or file system cannot do it, or another gateway has gear.root.
        """
        with self._inits:
            engine = self._prepared_engine(opts)
            settings = engine.settings
            require(probe(settings.gear_root, check_index))
            maps = IdMaps(tuple(uid_maps), tuple(gid_maps))
            maps.save(settings.gear_root)
            for path in (settings.gear_root, settings.gear_images_path, settings.gear_containers_path):
                path.chmod(0o711 if maps.uids else 0o700)
            engine.mounts.restart()
            options.save(settings.run_dir, opts)
            self._engine = engine

    def capabilities(self) -> dict[str, bool]:
        """Diff returns the very tar that ApplyDiff was given, so dockerd keeps no tar-split."""
        return {"ReproducesExactDiffs": True}

    def cleanup(self) -> None:
        """dockerd ends: unmount what is still mounted."""
        engine = self._engine
        engine.mounts.drop_all()
        engine.layers.release()

    def release(self) -> None:
        """The gateway ends: keep only the mounts that containers have."""
        for engine in self._prepared.values() or (self._engine,):
            engine.starts.close()
            engine.layers.release()
        self._locks.close()
        self._prepared.clear()

    # -- layers

    @_translated
    def create(self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None) -> None:
        """Make a layer that is to be filled, by ApplyDiff or through a mount.

        Raises:
            AlreadyExists, NotFound, InvalidInput: As `LayerStore.create`; or an option that containers alone have.
        """
        if options.container_size(storage_opt) is not None:
            raise InvalidInput(f"layer {id}: --storage-opt size is for containers only")
        engine = self._engine
        engine.layers.create(new_layer(id, parent, Kind.NEW, mount_label), engine.id_maps())

    @_translated
    def create_read_write(
        self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None
    ) -> None:
        """Make a layer that a container writes.

        Args: *storage_opt* has ``size``, what it may write; dockerd's ``-init`` layer is not held to that.

        Raises:
            AlreadyExists, NotFound, InvalidInput: As `LayerStore.create`; or an option is unknown or malformed.
            FailedPrecondition: The file system cannot limit a container's size.
        """
        engine = self._engine
        size = options.container_size(storage_opt)
        if size is not None:
            engine.layers.quotas.require()
        limit = 0 if size is None or _is_init_layer(id) else size
        engine.layers.create(new_layer(id, parent, Kind.CONTAINER, mount_label, limit), engine.id_maps())

    @_translated
    def remove(self, id: str) -> None:
        """Remove the layer, mounted or not; one that is not there is fine."""
        self._engine.mounts.remove(id)

    def exists(self, id: str) -> bool:
        """Whether there is such a layer."""
        return self._engine.layers.exists(id)

    # -- mounts

    @_translated
    def get(self, id: str, mount_label: str = "", *, may_wait: bool = True) -> str:
        """Mount the layer, or count one more user of its mount.

        Returns:
            The path of the merged tree: read-only for an image layer.

        Raises:
            NotFound, FailedPrecondition, MustWait: As `MountedLayers.get`.
        """
        engine = self._engine
        volatile = _is_init_layer(id)
        return str(engine.mounts.get(id, mount_label, engine.id_maps(), volatile=volatile, may_wait=may_wait))

    @_translated
    def put(self, id: str) -> None:
        """Count one user less; unmount after the last. One too many, or of no layer, is fine."""
        self._engine.mounts.put(id)

    # -- what a layer holds

    @_translated
    def get_metadata(self, id: str) -> dict[str, str]:
        """LowerDir, UpperDir, WorkDir and MergedDir, as overlay2 names them."""
        engine = self._engine
        layer = engine.layers.get(id)
        directory = engine.layers.directory(layer)
        metadata = {
            "UpperDir": str(engine.layers.lower(layer)),
            "WorkDir": str(directory / WORK),
            "MergedDir": str(directory / MERGED),
        }
        if layer.parent:
            metadata["LowerDir"] = ":".join(map(str, engine.layers.chain(layer.parent)))
        return metadata

    @_translated
    def changes(self, id: str, parent: str) -> list[Change]:
        """What the layer has that *parent* has not; sorted by path."""
        engine = self._engine
        layer = engine.layers.get(id)
        if layer.kind is Kind.CONTAINER and layer.parent == parent:
            with engine.mounts.view(parent) as parent_fd, engine.mounts.view(id) as merged_fd:
                assert merged_fd is not None
                return upper_changes(engine.layers.lower(layer), merged_fd, parent_fd)
        with engine.mounts.view(parent) as parent_fd, engine.mounts.view(id) as own_fd:
            return tree_changes(own_fd, parent_fd)

    @_translated
    def diff_size(self, id: str, parent: str) -> int:
        """Bytes of the files that the layer has over *parent*, each inode once."""
        engine = self._engine
        layer = engine.layers.get(id)
        if layer.parent == parent and layer.kind is Kind.CONTAINER:
            with opened_directory(engine.layers.lower(layer)) as upper_fd:
                return tree_size(upper_fd)
        if layer.parent == parent:
            return layer.size_bytes
        with engine.mounts.view(parent) as parent_fd, engine.mounts.view(id) as own_fd:
            return 0 if own_fd is None else changed_size(own_fd, tree_changes(own_fd, parent_fd))

    @_translated
    def apply_diff(self, id: str, parent: str, source: Readable) -> int:
        """Fill an empty layer from a tar.

        Args:
            id: A layer that Create made.
            parent: What Create was told; empty for none.
            source: The tar; its `readinto` raises if it breaks off.

        Returns:
            The layer's size in bytes, as `diff_size`.

        Raises:
            FailedPrecondition: An earlier ApplyDiff into it did not finish.
            InvalidInput, IntegrityError: The tar, by entry and reason.
            ResourceExhausted: No space left.

        Crash: the layer is unfinished and refuses everything but Remove.
        """
        engine = self._engine
        layer = engine.layers.begin_apply(id, parent)
        spool = engine.spool if engine.settings.remote else None
        with engine.layers.building(id) as build:
            applied = apply_tar(
                source,
                build,
                engine.objects,
                engine.id_maps(),
                spool,
                engine.settings.gear_root,
                engine.layers.numbers,
                private=engine.layers.is_private(parent),
            )
            engine.layers.publish(build, image_layer(layer, applied))
        engine.starts.arrived(id)
        return applied.size_bytes

    @_translated
    def diff(self, id: str, parent: str, sink: Writable) -> None:
        """Write the layer's tar: what *parent* lacks or has otherwise.

        Raises:
            NotFound: No such layer, or an object is missing.
            IntegrityError: Something stored is damaged; a part may have been written.
        """
        engine = self._engine
        layer = engine.layers.get(id)
        ids = engine.id_maps()
        if layer.kind is Kind.IMAGE and layer.parent == parent:
            replay(engine.layers.directory(layer), engine.layers.contents(layer), sink)
        elif layer.kind is Kind.CONTAINER and layer.parent == parent:
            upper = engine.layers.lower(layer)
            with (
                settled(engine.layers.directory(layer), upper),
                engine.mounts.view(parent) as parent_fd,
                engine.mounts.view(id) as merged_fd,
            ):
                assert merged_fd is not None
                write_diff(upper, merged_fd, parent_fd, sink, ids)
        else:
            with engine.mounts.view(parent) as parent_fd, engine.mounts.view(id) as own_fd:
                write_tree_diff(own_fd, parent_fd, sink, ids)

    # -- upkeep

    def usage(self) -> Usage:
        """What is stored, and what it would take without sharing; at most a minute old."""
        return self._engine.usage.get()

    def status(self) -> list[tuple[str, str]]:
        """What `docker info` shows of the store."""
        engine = self._engine
        usage = engine.usage.get()
        root = engine.settings.gear_root
        return [
            ("Root Dir", str(root)),
            ("Backing Filesystem", backing_fs_name(root)),
            ("Kernel Mode", f"overlay with data-only layers, EROFS indexes {engine.index_mode.get()}"),
            ("Layers", f"{usage.image_layers} image, {usage.other_layers} read-write"),
            ("Objects", str(usage.objects)),
            ("Logical Bytes", str(usage.logical_bytes)),
            ("Stored Bytes", str(usage.stored_bytes)),
            ("Awaiting Push", str(sum(1 for _ in engine.spool.pending()))),
        ]

    def faults(
        self, *, read_data: bool, repair: bool, incomplete: Callable[[str], object] = lambda _: None
    ) -> Iterator[str]:
        """Check every object and layer; a line for each fault. Arguments as `Checker.faults`."""
        engine = self._engine
        checker = Checker(engine.settings, engine.layers, engine.objects, engine.spool)
        return checker.faults(read_data=read_data, repair=repair, incomplete=incomplete)

    def collect_garbage(self) -> GarbageReport:
        """Remove the objects that no layer refers to; safe beside imports."""
        engine = self._engine
        return collect_garbage(engine.settings, engine.objects)

    def is_absorbable(self, id: str) -> bool:
        """As `Engine.is_absorbable`."""
        return self._engine.is_absorbable(id)

    @_translated
    def absorb(self, id: str) -> int:
        """Move the contents of a finished read-write layer to the object store; how many files.

        Raises:
            NotFound: No such layer.
            Unavailable: A Diff of it is under way; try again later.
        """
        engine = self._engine
        if not engine.is_absorbable(id):
            return 0
        layer = engine.layers.get(id)
        spool = engine.spool if engine.settings.remote else None
        with engine.layers.building(id) as build:
            directory, upper = engine.layers.directory(layer), engine.layers.lower(layer)
            return absorb(directory, upper, build, engine.objects, spool, engine.settings.gear_root)

    def push_pending(self) -> PushReport:
        """Push what waits in the spool to the remote; an object that is damaged keeps no other from being pushed.

        Raises:
            FailedPrecondition: No remote is set.
            Unavailable: It does not answer; what is left stays in the spool.
        """
        engine = self._engine
        remote = open_remote(engine.settings)
        try:
            return push_pending(engine.spool, remote)
        finally:
            remote.close()


def _is_init_layer(id: str) -> bool:
    """dockerd makes a container's ``-init`` layer anew with the container: it need not survive a power cut alone."""
    return id.endswith(_INIT_SUFFIX)
