"""The Gear driver: the graphdriver protocol's calls by their names, on one node's GEAR_ROOT.

The one module of the engine that knows that Docker is the caller. `Get`, `Put` and what else is light run in the
gateway; `ApplyDiff`, `Diff` and upkeep may run in any process of the node that shares its mounts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from gearworkers import options
from gearworkers.archive.reader import Readable
from gearworkers.errors import from_os_error
from gearworkers.files import opened_directory
from gearworkers.layers import trial
from gearworkers.layers.absorb import absorb, settled
from gearworkers.layers.apply import apply_tar
from gearworkers.layers.changes import Change, tree_changes, upper_changes
from gearworkers.layers.containerdiff import Writable, write_diff, write_tree_diff
from gearworkers.layers.idmap import IDMap, IdMaps
from gearworkers.layers.mounted import MountedLayers
from gearworkers.layers.recording import Recordings
from gearworkers.layers.recovery import collect_garbage, make_ready
from gearworkers.layers.repair import Checker
from gearworkers.layers.replay import replay
from gearworkers.layers.size import changed_size, tree_size
from gearworkers.layers.starts import Starts
from gearworkers.layers.store import MERGED, WORK, Kind, Layer, LayerStore, image_layer, new_layer
from gearworkers.layers.usage import Usage, UsageMeter
from gearworkers.mounts import overlay
from gearworkers.mounts.probe import backing_fs_name, probe, require
from gearworkers.objects.claims import OBJECTS_FILE
from gearworkers.objects.garbage import GarbageReport
from gearworkers.objects.remotes.opening import open_remote
from gearworkers.objects.remotes.push import PushReport, push_pending
from gearworkers.objects.spool import PushSpool
from gearworkers.objects.store import ObjectStore
from gearworkers.processes import alone
from gearworkers.settings import Settings

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_INIT_SUFFIX = "-init"
_LOCK_FILE = "gateway.lock"


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
    """One GEAR_ROOT; the gateway has one, and so has each worker.

    Calls may come at the same time from many threads. Errors are GearError; after one, nothing is half done
    but an ApplyDiff's target, which refuses until it is removed.
    """

    def __init__(self, settings: Settings, *, sole: bool = False) -> None:
        """
        Args:
            settings: Of the node.
            sole: From `prepare` on no other process may have such a driver of the same GEAR_ROOT: what one makes, the
                other would take for what a crash left.
        """
        self._given = settings
        self.settings = settings
        self._sole = sole
        self._own_roots: set[Path] = set()
        self._locks = ExitStack()
        self._index_mode = ""
        self._recordings = Recordings()
        self._open()

    def _open(self) -> None:
        settings = self.settings
        self._objects = ObjectStore(settings.gear_public_cache_path)
        self._layers = LayerStore(settings, self._objects)
        self._spool = PushSpool(settings.gear_push_path, self._objects)
        self._usage = UsageMeter(self._layers, self._objects)
        self._starts = Starts(settings, self._layers, self._recordings)
        self._mounts = MountedLayers(settings, self._layers, self._starts)

    # -- the daemon's life

    def prepare(self) -> None:
        """Make what is missing under GEAR_ROOT and repair what a crash left; for the gateway, at its start.

        A dockerd that runs since before does not say its options again: they are as `init` was given them.

        Raises:
            GearError: GEAR_ROOT cannot be used.
        """
        self._use(options.saved(self.settings.run_dir))

    def _use(self, opts: Sequence[str]) -> None:
        settings = options.with_options(self._given, opts)
        if self._sole and settings.gear_root not in self._own_roots:
            self._locks.enter_context(alone(settings.gear_root / _LOCK_FILE, "a gateway of this GEAR_ROOT"))
            self._own_roots.add(settings.gear_root)
        self.settings = settings
        self._open()
        make_ready(self.settings, self._objects, self._layers, self._spool)
        self._mounts.prepare()

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
        self._use(opts)
        checks = probe(self.settings.gear_root, trial.check_index)
        require(checks)
        self._index_mode = next(check.found for check in checks if check.name == trial.NAME)
        maps = IdMaps(tuple(uid_maps), tuple(gid_maps))
        maps.save(self.settings.gear_root)
        for path in (self.settings.gear_root, self.settings.gear_images_path, self.settings.gear_containers_path):
            path.chmod(0o711 if maps.uids else 0o700)
        self._mounts.restart()
        options.save(self.settings.run_dir, opts)

    def capabilities(self) -> dict[str, bool]:
        """Diff returns the very tar that ApplyDiff was given, so dockerd keeps no tar-split."""
        return {"ReproducesExactDiffs": True}

    def cleanup(self) -> None:
        """dockerd ends: unmount what is still mounted."""
        self._mounts.drop_all()
        self._layers.release()

    def release(self) -> None:
        """The gateway ends: keep only the mounts that containers have."""
        self._starts.close()
        self._layers.release()
        self._locks.close()
        self._own_roots.clear()

    # -- layers

    @_translated
    def create(self, id: str, parent: str, mount_label: str = "") -> None:
        """Make a layer that is to be filled, by ApplyDiff or through a mount.

        Raises:
            AlreadyExists, NotFound, InvalidInput: As `LayerStore.create`.
        """
        self._layers.create(new_layer(id, parent, Kind.NEW, mount_label), self._id_maps())

    @_translated
    def create_read_write(self, id: str, parent: str, mount_label: str = "") -> None:
        """Make a layer that a container writes."""
        self._layers.create(new_layer(id, parent, Kind.CONTAINER, mount_label), self._id_maps())

    @_translated
    def remove(self, id: str) -> None:
        """Remove the layer, mounted or not; one that is not there is fine."""
        self._mounts.remove(id)

    def exists(self, id: str) -> bool:
        """Whether there is such a layer."""
        return self._layers.exists(id)

    # -- mounts

    @_translated
    def get(self, id: str, mount_label: str = "", *, may_wait: bool = True) -> str:
        """Mount the layer, or count one more user of its mount.

        Returns:
            The path of the merged tree: read-only for an image layer.

        Raises:
            NotFound, FailedPrecondition, MustWait: As `MountedLayers.get`.
        """
        mounts = self._mounts
        return str(mounts.get(id, mount_label, self._id_maps(), volatile=_is_volatile(id), may_wait=may_wait))

    @_translated
    def put(self, id: str) -> None:
        """Count one user less; unmount after the last. One too many, or of no layer, is fine."""
        self._mounts.put(id, volatile=_is_volatile(id))

    # -- what a layer holds

    @_translated
    def get_metadata(self, id: str) -> dict[str, str]:
        """LowerDir, UpperDir, WorkDir and MergedDir, as overlay2 names them."""
        layer = self._layers.get(id)
        directory = self._layers.directory(layer)
        metadata = {
            "UpperDir": str(self._layers.lower(layer)),
            "WorkDir": str(directory / WORK),
            "MergedDir": str(directory / MERGED),
        }
        if layer.parent:
            metadata["LowerDir"] = ":".join(map(str, self._layers.chain(layer.parent)))
        return metadata

    @_translated
    def changes(self, id: str, parent: str) -> list[Change]:
        """What the layer has that *parent* has not; sorted by path."""
        layer = self._layers.get(id)
        if layer.kind is Kind.CONTAINER and layer.parent == parent:
            with self._mounts.view(parent) as parent_fd, self._mounts.view(id) as merged_fd:
                assert merged_fd is not None
                return upper_changes(self._layers.lower(layer), merged_fd, parent_fd)
        with self._mounts.view(parent) as parent_fd, self._mounts.view(id) as own_fd:
            return tree_changes(own_fd, parent_fd)

    @_translated
    def diff_size(self, id: str, parent: str) -> int:
        """Bytes of the files that the layer has over *parent*, each inode once."""
        layer = self._layers.get(id)
        if layer.parent == parent:
            return self._upper_size(layer) if layer.kind is Kind.CONTAINER else layer.size_bytes
        with self._mounts.view(parent) as parent_fd, self._mounts.view(id) as own_fd:
            return 0 if own_fd is None else changed_size(own_fd, tree_changes(own_fd, parent_fd))

    def _upper_size(self, layer: Layer) -> int:
        with opened_directory(self._layers.lower(layer)) as upper_fd:
            return tree_size(upper_fd)

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
        layer = self._layers.begin_apply(id, parent)
        spool = self._spool if self.settings.remote else None
        with self._layers.building(id) as build:
            applied = apply_tar(
                source,
                build,
                self._objects,
                self._id_maps(),
                spool,
                self.settings.gear_root,
                private=self._layers.is_private(parent),
            )
            self._layers.publish(build, image_layer(layer, applied))
        self._starts.arrived(id)
        return applied.size_bytes

    @_translated
    def diff(self, id: str, parent: str, sink: Writable) -> None:
        """Write the layer's tar: what *parent* lacks or has otherwise.

        Raises:
            NotFound: No such layer, or an object is missing.
            IntegrityError: Something stored is damaged; a part may have been written.
        """
        layer = self._layers.get(id)
        ids = self._id_maps()
        if layer.kind is Kind.IMAGE and layer.parent == parent:
            replay(self._layers.directory(layer), self._layers.contents(layer), sink)
        elif layer.kind is Kind.CONTAINER and layer.parent == parent:
            upper = self._layers.lower(layer)
            with (
                settled(self._layers.directory(layer), upper),
                self._mounts.view(parent) as parent_fd,
                self._mounts.view(id) as merged_fd,
            ):
                assert merged_fd is not None
                write_diff(upper, merged_fd, parent_fd, sink, ids)
        else:
            with self._mounts.view(parent) as parent_fd, self._mounts.view(id) as own_fd:
                write_tree_diff(own_fd, parent_fd, sink, ids)

    # -- upkeep

    def usage(self) -> Usage:
        """What is stored, and what it would take without sharing; at most a minute old."""
        return self._usage.get()

    def status(self) -> list[tuple[str, str]]:
        """What `docker info` shows of the store."""
        usage = self.usage()
        root = self.settings.gear_root
        return [
            ("Root Dir", str(root)),
            ("Backing Filesystem", backing_fs_name(root)),
            ("Kernel Mode", f"overlay with data-only layers, EROFS indexes {self._tried_index_mode()}"),
            ("Layers", f"{usage.image_layers} image, {usage.other_layers} read-write"),
            ("Objects", str(usage.objects)),
            ("Logical Bytes", str(usage.logical_bytes)),
            ("Stored Bytes", str(usage.stored_bytes)),
            ("Awaiting Push", str(sum(1 for _ in self._spool.pending()))),
        ]

    def _tried_index_mode(self) -> str:
        """How indexes are mounted; `init` has tried it, but not in a gateway that is started while dockerd runs."""
        if not self._index_mode:
            self._index_mode = trial.check_index(self.settings.gear_root).found
        return self._index_mode

    def faults(
        self, *, read_data: bool, repair: bool, incomplete: Callable[[str], object] = lambda _: None
    ) -> Iterator[str]:
        """Check every object and layer; a line for each fault. Arguments as `Checker.faults`."""
        checker = Checker(self.settings, self._layers, self._objects, self._spool)
        return checker.faults(read_data=read_data, repair=repair, incomplete=incomplete)

    def collect_garbage(self) -> GarbageReport:
        """Remove the objects that no layer refers to; safe beside imports."""
        return collect_garbage(self.settings, self._objects)

    def is_absorbable(self, id: str) -> bool:
        """Whether the layer, whose Diff was taken, still has its contents in itself, though it need not.

        Nobody writes it any more, and it is not private.
        """
        layer = self._layers.get(id)
        directory = self._layers.directory(layer)
        return (
            layer.kind is Kind.CONTAINER
            and layer.absorbable
            and not (directory / OBJECTS_FILE).exists()
            and not overlay.is_mounted(directory / MERGED)
            and not self._layers.is_private(id)
        )

    @_translated
    def absorb(self, id: str) -> int:
        """Move the contents of a finished read-write layer to the object store; how many files.

        Raises:
            NotFound: No such layer.
            Unavailable: A Diff of it is under way; try again later.
        """
        if not self.is_absorbable(id):
            return 0
        layer = self._layers.get(id)
        spool = self._spool if self.settings.remote else None
        with self._layers.building(id) as build:
            directory, upper = self._layers.directory(layer), self._layers.lower(layer)
            return absorb(directory, upper, build, self._objects, spool, self.settings.gear_root)

    def push_pending(self) -> PushReport:
        """Push what waits in the spool to the remote; an object that is damaged keeps no other from being pushed.

        Raises:
            FailedPrecondition: No remote is set.
            Unavailable: It does not answer; what is left stays in the spool.
        """
        remote = open_remote(self.settings)
        try:
            return push_pending(self._spool, remote)
        finally:
            remote.close()

    def _id_maps(self) -> IdMaps:
        return IdMaps.load(self.settings.gear_root)


def _is_volatile(id: str) -> bool:
    """dockerd makes a container's ``-init`` layer anew with the container: it need not survive a power cut alone."""
    return id.endswith(_INIT_SUFFIX)
