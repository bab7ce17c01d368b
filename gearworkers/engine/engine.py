"""The Engine: the operations on one GEAR_ROOT."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from gearworkers.cas.collector import GarbageReport
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.store import ObjectStore
from gearworkers.engine.mounts import LayerMounts
from gearworkers.engine.recovery import collect_garbage, prepare_root
from gearworkers.errors import InvalidInput, from_os_error
from gearworkers.fsck.repair import StoreChecker
from gearworkers.layers.apply import apply_tar
from gearworkers.layers.copy_layer import copy_layer
from gearworkers.layers.dedupe import dedupe_layer, is_deduped, locked_for_diff
from gearworkers.layers.diff.changes import Change, tree_changes, upper_changes
from gearworkers.layers.diff.export import Writable, write_diff, write_tree_diff
from gearworkers.layers.diff.replay import replay
from gearworkers.layers.diff.size import changed_size, tree_size, tree_usage
from gearworkers.layers.idmap import NO_MAPS, IdMaps
from gearworkers.layers.index.probe import IndexMountMode
from gearworkers.layers.record import Layer, LayerKind, image_layer, new_layer
from gearworkers.layers.store import MERGED, LayerStore
from gearworkers.layers.usage import UsageMeter
from gearworkers.mounts.overlay import is_mounted
from gearworkers.mounts.probe import backing_fs_name
from gearworkers.profiles.hooks import ProfileHooks
from gearworkers.profiles.recordings import Recordings
from gearworkers.remote.factory import open_remote
from gearworkers.remote.push import PushReport, push_pending
from gearworkers.settings import Settings
from gearworkers.tar.reader import Readable
from gearworkers.util.fs import opened_directory

_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def layer_call(
    call: Callable[Concatenate[_Self, str, _Arguments], _Result],
) -> Callable[Concatenate[_Self, str, _Arguments], _Result]:
    """Decorate a method on one layer: OSError becomes a GearError that names the method and the layer."""

    @wraps(call)
    def translated(self: _Self, id: str, /, *arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        try:
            return call(self, id, *arguments, **keywords)
        except OSError as exc:
            where = f": {os.fsdecode(exc.filename)}" if isinstance(exc.filename, str | bytes) else ""
            raise from_os_error(exc, f"{call.__name__} of layer {id}{where}") from exc

    return translated


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of one GEAR_ROOT. They never change, so every call works on one root from start to end.

    Several processes of a node may each have an engine of the same root. A process should have only one engine per
    root, since its parts hold the locks between the process's threads. Methods may be called from many threads and
    raise GearError. An error leaves no partial result, except the target of an `apply_diff`, which can only be removed.
    """

    settings: Settings
    objects: ObjectStore
    layers: LayerStore
    push_queue: PushQueue
    usage: UsageMeter
    profile_hooks: ProfileHooks
    mounts: LayerMounts
    index_mode: IndexMountMode

    @classmethod
    def of(cls, settings: Settings) -> Engine:
        """Return the engine of the settings' root; does not access the disk."""
        objects = ObjectStore(settings.gear_public_cache_path)
        layers = LayerStore(settings, objects)
        profile_hooks = ProfileHooks(settings, layers, Recordings())
        return cls(
            settings,
            objects,
            layers,
            PushQueue(settings.gear_push_path, objects),
            UsageMeter(layers, objects),
            profile_hooks,
            LayerMounts(settings, layers, profile_hooks),
            IndexMountMode(settings.gear_root),
        )

    # -- life

    def prepare(self) -> None:
        """Create missing directories and repair the leftovers of a crash; no other process may use the root meanwhile.

        Raises:
            GearError: The root cannot be used.
        """
        prepare_root(self.settings, self.objects, self.layers, self.push_queue)
        self.mounts.prepare()

    def close(self) -> None:
        """End recordings and unmount the indexes; mounts of containers stay."""
        self.profile_hooks.close()
        self.mounts.unmount_indexes()

    def id_maps(self) -> IdMaps:
        """Return the mapping from ids in containers to ids on the disk."""
        return IdMaps.load(self.settings.gear_root)

    # -- layers

    @layer_call
    def create(
        self,
        id: str,
        parent: str,
        kind: LayerKind,
        mount_label: str = "",
        size_limit_bytes: int = 0,
        mount_ids: IdMaps = NO_MAPS,
    ) -> None:
        """Create an empty layer on *parent*.

        Args:
            id: The layer's id.
            parent: The id of the layer's parent; empty for none.
            kind: NEW for a layer that `apply_diff` or a mount fills, CONTAINER for a read-write layer.
            mount_label: SELinux label of its mounts.
            size_limit_bytes: Limit of a read-write layer; 0 for none. The caller checks `Quotas.require` first.
            mount_ids: As `Layer.mount_ids`, for a NEW layer.

        Raises:
            AlreadyExists: The id is taken.
            NotFound: The parent is missing.
        """
        self.layers.create(new_layer(id, parent, kind, mount_label, size_limit_bytes, mount_ids), self.id_maps())

    @layer_call
    def remove(self, id: str) -> None:
        """Unmount and remove the layer in any state; do nothing if it does not exist."""
        with self.mounts.unmounted(id):
            self.layers.remove(id)

    @layer_call
    def mount(self, id: str, mount_label: str = "", *, volatile: bool = False, may_wait: bool = True) -> Path:
        """Mount the layer unless it is mounted; return its mount point. Arguments and errors as `LayerMounts.mount`.

        The engine does not count users: one `unmount` undoes any number of mounts.
        """
        return self.mounts.mount(self.layers.get(id), mount_label, volatile=volatile, may_wait=may_wait)

    @layer_call
    def begin_start(self, id: str) -> None:
        """Prefetch the profile of a mounted container's image, or record one. Call before a program can run.

        For callers whose containers stay mounted between starts; `mount` does it for others.
        """
        layer = self.layers.get(id)
        self.profile_hooks.container_mounted(layer, self.mounts.mount_point(layer))

    @layer_call
    def create_writable(self, id: str, parent: str, mount_ids: IdMaps) -> None:
        """Create a read-write layer in one step; the result is that of `create` with NEW and `make_writable`.

        Args:
            id, parent, mount_ids: As for `create`.

        Raises:
            AlreadyExists, NotFound: As `create`.
        """
        new = new_layer(id, parent, LayerKind.NEW, mount_label="", mount_ids=mount_ids)
        layer = msgspec.structs.replace(new, kind=LayerKind.CONTAINER)
        self.layers.create(layer, mount_ids or self.id_maps(), self._top_owner(layer))

    @layer_call
    def make_writable(self, id: str) -> None:
        """Make a new layer a read-write layer, whose top directory has the owner of its parent's.

        Raises:
            NotFound: There is no such layer.
            FailedPrecondition: An apply_diff into it has not finished.
        """
        layer = self.layers.get(id)
        if layer.kind is LayerKind.NEW:
            self.layers.promote(layer, layer.mount_ids or self.id_maps(), self._top_owner(layer))

    def _top_owner(self, layer: Layer) -> tuple[int, int] | None:
        """Return the owner of the parent's top directory as the layer shows it; None if the layer has no parent."""
        if not layer.parent:
            return None
        parent = self.layers.get(layer.parent)
        top = os.stat(self.layers.lower(parent))
        try:
            return layer.mount_ids.to_host(*parent.mount_ids.to_container(top.st_uid, top.st_gid))
        except InvalidInput:  # outside the ranges: the container's root owns the top
            return layer.mount_ids.root

    @layer_call
    def unmount(self, id: str) -> None:
        """Unmount the layer; do nothing if it is not mounted or does not exist."""
        with self.mounts.unmounted(id):
            pass

    @layer_call
    def apply_diff(self, id: str, parent: str, source: Readable, *, again: bool = False, is_index: bool = False) -> int:
        """Fill an empty layer from a tar.

        Args:
            id: A new layer.
            parent: The parent that the layer was created with; empty for none.
            source: The tar; its `readinto` raises if the stream ends early.
            again: Whether *source* may repeat the tar of an earlier `apply_diff` that did not finish.
            is_index: Whether *source* is the Gear layer of the layer's tar, as `Layer.from_index`.

        Returns:
            The layer's size in bytes, as `diff_size`.

        Raises:
            FailedPrecondition: An earlier `apply_diff` into the layer did not finish, and *again* is False.
            InvalidInput, IntegrityError: The tar is malformed; the error names the entry and the reason.
            ResourceExhausted: The disk is full.

        Crash: the layer is unfinished and can only be removed.
        """
        layer = self.layers.begin_apply(id, parent, again=again)
        with self.layers.build_directory(id) as build:
            applied = apply_tar(
                source,
                build,
                self.objects,
                self.id_maps(),
                self._push_queue(),
                self.settings.gear_root,
                self.layers.inode_numbers,
                private=self.layers.is_private(parent),
            )
            self.layers.publish(build, image_layer(layer, applied, from_index=is_index))
        if not is_index:  # a layer from an index is only copied to images' layers
            self.profile_hooks.layer_applied(id)
        return applied.size_bytes

    @layer_call
    def copy_layer(self, id: str, parent: str, source_id: str) -> None:
        """Fill the empty layer from the image layer *source_id*. Arguments and errors as `layers.copy_layer`."""
        copy_layer(self.layers, self.layers.get(source_id), id, parent)
        self.profile_hooks.layer_applied(id)

    @layer_call
    def rebase(self, id: str, parent: str) -> None:
        """As `LayerStore.rebase`."""
        self.layers.rebase(id, parent)

    @layer_call
    def diff(self, id: str, parent: str, sink: Writable, *, max_mtime_ns: int | None = None) -> None:
        """Write the layer's differences from *parent* as a tar.

        Args:
            id: The layer.
            parent: The older layer; empty for none.
            sink: Receives the tar.
            max_mtime_ns: As for `write_diff`. The tar of an image layer is then not the one that it was filled from.

        Raises:
            NotFound: The layer or an object is missing.
            IntegrityError: Stored data are damaged; a part of the tar may have been written.
        """
        layer = self.layers.get(id)
        ids = self.id_maps()
        is_exact = max_mtime_ns is None and not layer.from_index
        if layer.kind is LayerKind.IMAGE and layer.parent == parent and is_exact:
            replay(self.layers.directory(layer), self.layers.object_store(layer), sink)
        elif layer.kind is LayerKind.CONTAINER and layer.parent == parent:
            upper = self.layers.lower(layer)
            with (
                locked_for_diff(self.layers.directory(layer), upper),
                self.mounts.view(parent) as parent_fd,
                self.mounts.view(id) as merged_fd,
            ):
                assert merged_fd is not None
                write_diff(upper, merged_fd, parent_fd, sink, ids, max_mtime_ns)
        else:
            with self.mounts.view(parent) as parent_fd, self.mounts.view(id) as own_fd:
                write_tree_diff(own_fd, parent_fd, sink, ids, max_mtime_ns)

    @layer_call
    def changes(self, id: str, parent: str) -> list[Change]:
        """Return the paths that differ from *parent*, sorted."""
        layer = self.layers.get(id)
        if layer.kind is LayerKind.CONTAINER and layer.parent == parent:
            with self.mounts.view(parent) as parent_fd, self.mounts.view(id) as merged_fd:
                assert merged_fd is not None
                return upper_changes(self.layers.lower(layer), merged_fd, parent_fd)
        with self.mounts.view(parent) as parent_fd, self.mounts.view(id) as own_fd:
            return tree_changes(own_fd, parent_fd)

    @layer_call
    def diff_size(self, id: str, parent: str) -> int:
        """Return the size in bytes of the layer's files that differ from *parent*; each inode counts once."""
        layer = self.layers.get(id)
        if layer.parent == parent and layer.kind is LayerKind.CONTAINER:
            with opened_directory(self.layers.lower(layer)) as upper_fd:
                return tree_size(upper_fd)
        if layer.parent == parent:
            return layer.size_bytes
        with self.mounts.view(parent) as parent_fd, self.mounts.view(id) as own_fd:
            return 0 if own_fd is None else changed_size(own_fd, tree_changes(own_fd, parent_fd))

    @layer_call
    def usage_of(self, id: str) -> tuple[int, int]:
        """Return the disk use of the layer without its parents: bytes, and the number of inodes."""
        layer = self.layers.get(id)
        if layer.kind is LayerKind.CONTAINER:
            with opened_directory(self.layers.lower(layer)) as upper_fd:
                return tree_usage(upper_fd)
        return layer.size_bytes, layer.objects

    # -- deduplication of finished read-write layers

    def can_dedupe(self, id: str) -> bool:
        """Whether `dedupe` has work: for a finished read-write layer that is not private and still holds its contents.

        A read-write layer is finished when its diff was taken and it is not mounted any more.
        """
        layer = self.layers.get(id)
        directory = self.layers.directory(layer)
        return (
            layer.kind is LayerKind.CONTAINER
            and layer.dedupable
            and not is_deduped(directory)
            and not is_mounted(directory / MERGED)
            and not self.layers.is_private(id)
        )

    @layer_call
    def dedupe(self, id: str) -> int:
        """Move the contents of a finished read-write layer to the object store; return the number of files.

        Raises:
            NotFound: There is no such layer.
            Unavailable: A diff of the layer is in progress; retry later.
        """
        if not self.can_dedupe(id):
            return 0
        layer = self.layers.get(id)
        with self.layers.build_directory(id) as build:
            directory, upper = self.layers.directory(layer), self.layers.lower(layer)
            return dedupe_layer(directory, upper, build, self.objects, self._push_queue(), self.settings.gear_root)

    # -- maintenance

    def status(self) -> list[tuple[str, str]]:
        """Return the store's status as names and values; the usage is at most a minute old."""
        usage = self.usage.get()
        root = self.settings.gear_root
        return [
            ("Root Dir", str(root)),
            ("Backing Filesystem", backing_fs_name(root)),
            ("Kernel Mode", f"overlay with data-only layers, EROFS indexes {self.index_mode.get()}"),
            ("Layers", f"{usage.image_layers} image, {usage.other_layers} read-write"),
            ("Objects", str(usage.objects)),
            ("Logical Bytes", str(usage.logical_bytes)),
            ("Stored Bytes", str(usage.stored_bytes)),
            ("Awaiting Push", str(sum(1 for _ in self.push_queue.pending()))),
        ]

    def faults(
        self, *, read_data: bool, repair: bool, on_incomplete: Callable[[str], object] = lambda _: None
    ) -> Iterator[str]:
        """Check all objects and layers; yield a line for each fault. Arguments as `StoreChecker.faults`."""
        checker = StoreChecker(self.settings, self.layers, self.objects, self.push_queue)
        return checker.faults(read_data=read_data, repair=repair, on_incomplete=on_incomplete)

    def collect_garbage(self) -> GarbageReport:
        """Remove unreferenced objects; safe during imports."""
        return collect_garbage(self.settings, self.objects)

    def push_pending(self) -> PushReport:
        """Push pending objects to the remote; a damaged object does not stop the others.

        Raises:
            FailedPrecondition: No remote is set.
            Unavailable: The remote does not answer; the remaining objects stay pending.
        """
        remote = open_remote(self.settings)
        try:
            return push_pending(self.push_queue, remote)
        finally:
            remote.close()

    def _push_queue(self) -> PushQueue | None:
        return self.push_queue if self.settings.remote.url else None
