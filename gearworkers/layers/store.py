"""The layers of a GEAR_ROOT: their directories, their states and their life from creation to removal.

Glossary: a *layer* has an id and at most one parent. An *image layer* is read-only and is in images/. A *container
layer* is read-write and is in containers/. A layer is *new* after Create: the first ApplyDiff makes it an image layer,
the first Get makes it a container layer. The *lower* of a layer is the directory that represents the layer in a mount
of a layer above it. The *layer chain* is the layer, its parent, and so on.

Order of writes: a layer is built in build/ and moved to its final path by one rename. Removal first moves it back.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import msgspec

from gearworkers.cas import inplace
from gearworkers.cas.collector import publishing
from gearworkers.cas.store import ObjectStore
from gearworkers.errors import AlreadyExists, FailedPrecondition, GearError, InvalidInput, NotFound, from_os_error
from gearworkers.layers import apply_once
from gearworkers.layers.idmap import IdMaps, shown_tree
from gearworkers.layers.index.inode_numbers import INDEX_FILE, InodeNumbers
from gearworkers.layers.index.mount import mount_index
from gearworkers.layers.index.renumber import has_own_inode_numbers, renumber
from gearworkers.layers.private import PrivateStores
from gearworkers.layers.quotas import Quotas
from gearworkers.layers.record import RECORD_FILE, Layer, LayerKind, read_record, write_record
from gearworkers.mounts.idmapped import MappedTree
from gearworkers.mounts.overlay import is_mounted, unmount
from gearworkers.settings import NodeSettings
from gearworkers.tar.private_marker import MARKER
from gearworkers.util import syscalls as kernel
from gearworkers.util.fs import opened_directory, remove_tree
from gearworkers.util.writing import replace_file, sync_directory

TREE = "tree"
UPPER = "upper"
WORK = "work"
MERGED = "merged"

_VALID_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


def check_id(id: str) -> str:
    """Return *id* if it is valid as a path component.

    Raises:
        InvalidInput: The id is empty or has characters that Docker does not use in ids.
    """
    if not _VALID_ID.fullmatch(id):
        raise InvalidInput(
            f"layer id {id[:80]!r} is invalid: use up to 200 letters, digits, '_', '-' or '.', a letter or digit first"
        )
    return id


class LayerStore:
    """The layers of one GEAR_ROOT. Several processes of the node may have a store of the same root."""

    def __init__(self, settings: NodeSettings, objects: ObjectStore) -> None:
        self._root = settings.gear_root
        self._objects = objects
        self._images = settings.gear_images_path
        self._containers = settings.gear_containers_path
        self._build = settings.gear_build_path
        self.private_stores = PrivateStores(settings.gear_private_cache_path, self._images)
        """The object stores of private layers."""
        self.quotas = Quotas(self._containers)
        """The size limits of containers."""
        self.inode_numbers = InodeNumbers(settings.gear_root, (self._build, self._images))
        """The inode numbers of the layers' indexes."""
        self._cached: dict[
            str, Layer
        ] = {}  # complete image layers; they change only with `inplace.touch_incomplete_layers`
        self._cached_ns = 0

    def prepare(self) -> None:
        """Create missing directories."""
        for path in (self._images, self._containers, self._build):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.private_stores.prepare()

    def ids(self) -> list[str]:
        """Return the ids of all layers, sorted."""
        return sorted({path.name for parent in (self._images, self._containers) for path in parent.iterdir()})

    def get(self, id: str) -> Layer:
        """Return the layer's record.

        Raises:
            NotFound: There is no such layer.
        """
        check_id(id)
        container = None
        for directory in (self._images / id, self._containers / id):
            try:
                layer = read_record(directory)
            except FileNotFoundError:
                continue
            except msgspec.DecodeError as exc:
                raise GearError(f"layer {id}: {directory / RECORD_FILE} is damaged ({exc}); remove the layer") from exc
            if layer.kind is not LayerKind.NEW:
                return layer
            container = layer
        if container is None:
            raise NotFound(f"layer {id} does not exist")
        return container

    def exists(self, id: str) -> bool:
        """Whether the layer exists, finished or not."""
        check_id(id)
        return (self._images / id).is_dir() or (self._containers / id).is_dir()

    def directory(self, layer: Layer) -> Path:
        """Return the directory of the layer."""
        return (self._containers if layer.kind is LayerKind.CONTAINER else self._images) / layer.id

    def lower(self, layer: Layer) -> Path:
        """Return the layer's lower. Mounts the index of an image layer if it is not mounted.

        Raises:
            FailedPrecondition: The layer's ApplyDiff did not finish.
        """
        directory = self.directory(layer)
        if layer.kind is LayerKind.NEW:
            apply_once.require_finished(directory)
        if layer.kind is LayerKind.CONTAINER:
            return directory / UPPER
        if layer.kind is LayerKind.IMAGE:
            index = directory / INDEX_FILE
            mount_index(index, directory / TREE, prepare=lambda: self._ensure_own_numbers(index))
        return directory / TREE

    def lowers(self, id: str) -> tuple[Path, ...]:
        """Return the lowers of the layer chain, the topmost first; none for the empty id.

        Raises:
            NotFound: A layer is missing.
            FailedPrecondition: A layer is unfinished.
        """
        return tuple(self.lower(layer) for layer in self.layer_chain(id))

    def mapped_lowers(self, id: str, ids: IdMaps) -> tuple[Path | MappedTree, ...]:
        """Return the lowers, as `lowers`, so that a mount shows all owners as *ids* maps the container's ids."""
        return tuple(shown_tree(self.lower(layer), layer.mount_ids, ids) for layer in self.layer_chain(id))

    def layer_chain(self, id: str) -> Iterator[Layer]:
        """Yield the layer, its parent, and so on; nothing for the empty id."""
        changed_ns = inplace.mark_time_ns(self._root)
        if changed_ns != self._cached_ns:
            self._cached, self._cached_ns = {}, changed_ns
        while id:
            layer = self._cached.get(id)
            if layer is None:
                layer = self.get(id)
                if layer.kind is LayerKind.IMAGE and layer.complete:
                    self._cached[id] = layer
            yield layer
            id = layer.parent

    def is_complete(self, id: str) -> bool:
        """Whether all objects of the layer chain are in the object store."""
        return all(layer.complete for layer in self.layer_chain(id))

    def is_private(self, id: str) -> bool:
        """Whether the layer or one below it has the marker: its contents are not shared and never pushed."""
        return any(self._has_marker(layer) for layer in self.layer_chain(id))

    def private_layers(self, id: str) -> list[Layer]:
        """Return the private layers of the layer chain, the topmost first; includes layers that BuildKit wrote."""
        layers = list(self.layer_chain(id))
        while layers and not self._has_marker(layers[-1]):
            layers.pop()
        return layers

    def _has_marker(self, layer: Layer) -> bool:
        if layer.kind is LayerKind.IMAGE:
            return layer.private
        return os.path.lexists(os.fsencode(self.directory(layer) / UPPER) + b"/" + MARKER)

    def object_store(self, layer: Layer) -> ObjectStore:
        """Return the store that contains the contents of an image layer's tar."""
        return self.private_stores.store(layer.id) if layer.private else self._objects

    def private_directories(self, id: str) -> tuple[Path, ...]:
        """Return the directories of the layer chain's private objects, the topmost first."""
        return tuple(self.private_stores.path(layer.id) for layer in self.layer_chain(id) if layer.private_objects)

    # -- creation and removal

    def create(self, layer: Layer, ids: IdMaps, owner: tuple[int, int] | None = None) -> None:
        """Create an empty layer; *ids* and *owner* as for `promote`. First `Quotas.require` if it has a size limit.

        Raises:
            AlreadyExists: The id is taken.
            NotFound: The parent is missing.
        """
        check_id(layer.id)
        if layer.parent:
            self.lower(self.get(layer.parent))
        if self.exists(layer.id):
            raise AlreadyExists(f"layer {layer.id} exists already")
        with self.build_directory(layer.id) as build:
            if layer.size_limit_bytes:
                layer = msgspec.structs.replace(layer, project=self.quotas.limit(build, layer.size_limit_bytes))
            self._lay_out(build, layer, ids, owner)
            if layer.dedupable:
                apply_once.allow_apply(build)
            _rename(build, self.directory(layer), kernel.Rename.NOREPLACE)

    def promote(self, layer: Layer, ids: IdMaps, owner: tuple[int, int] | None = None) -> Layer:
        """Make a new layer a container layer, which is written through a mount; return its record.

        Args:
            layer: The new layer.
            ids: Maps the container's root to the owner of the layer's top directory.
            owner: User and group of the top directory instead.
        """
        apply_once.require_finished(self._images / layer.id)
        container = msgspec.structs.replace(layer, kind=LayerKind.CONTAINER)
        with self.build_directory(layer.id) as build:
            self._lay_out(build, container, ids, owner)
            if apply_once.is_allowed(self._images / layer.id):
                apply_once.allow_apply(build)
            _rename(build, self._containers / layer.id, kernel.Rename.NOREPLACE)
        self._discard(self._images / layer.id)
        return container

    def begin_apply(self, id: str, parent: str, *, again: bool = False) -> Layer:
        """Mark the layer as being filled by an ApplyDiff, until that finishes or the layer is removed.

        Args:
            id: The layer's id.
            parent: The id of the layer's parent.
            again: As for `apply_once.begin`.

        Raises:
            InvalidInput: The layer was created with another parent.
            AlreadyExists: The layer has content.
            FailedPrecondition: As `apply_once.begin`.
        """
        layer = self.get(id)
        if layer.parent != parent:
            raise InvalidInput(f"layer {id}: its parent is {layer.parent!r}, not {parent!r}")
        directory = self.directory(layer)
        if layer.kind is LayerKind.IMAGE or (layer.kind is LayerKind.CONTAINER and any((directory / UPPER).iterdir())):
            raise AlreadyExists(f"layer {id}: it has content; ApplyDiff fills an empty layer only")
        apply_once.begin(directory, again=again)
        return layer

    def rebase(self, id: str, parent: str) -> None:
        """Give a finished layer without parent the parent *parent*, before another layer has it as parent; idempotent.

        Raises:
            NotFound: One of the layers is missing.
            FailedPrecondition: The layer has another parent, or the new parent is private and the layer is not.
        """
        layer = self.get(id)
        if layer.parent == parent:
            return
        if layer.parent:
            raise FailedPrecondition(f"layer {id} has the parent {layer.parent}")
        if self.is_private(parent) and not self._has_marker(layer):
            raise FailedPrecondition(f"layer {id}: its new parent is private, but its contents are public already")
        record = msgspec.json.encode(msgspec.structs.replace(layer, parent=parent))
        replace_file(self.directory(layer) / RECORD_FILE, record, sync=True)
        self._cached.pop(id, None)

    def publish(self, build: Path, layer: Layer, *, is_synced: bool = False) -> None:
        """Replace the empty layer by the finished image layer in *build*, durably.

        Args:
            build: The layer's directory.
            layer: Its record.
            is_synced: Whether the layer's files and objects are on the disk already, all except the record.

        Raises:
            NotFound: The empty layer was removed meanwhile; nothing is visible.

        Crash: the layer is unfinished before the rename and complete after it. Before the rename, a directory in
        private/ may belong to no layer; `recover` removes it.
        """
        for name in (TREE, MERGED):
            (build / name).mkdir(mode=0o700)
        write_record(build, layer, sync=is_synced)
        target = self._images / layer.id
        with opened_directory(self._images) as images_fd:
            with self.private_stores.moved_into_place(build, layer.id) if layer.private_objects else nullcontext():
                if is_synced:
                    sync_directory(build)
                else:
                    kernel.syncfs(images_fd)
                if not layer.complete:
                    inplace.forbid_in_place(self._root)
                with publishing(self._root, self._objects):
                    self._move_into_place(build, target)
            os.fsync(images_fd)
            if not layer.complete:
                inplace.forbid_in_place(
                    self._root
                )  # again: a concurrent `recover` may have found no incomplete layer before
        self._discard(self._containers / layer.id)

    def _move_into_place(self, build: Path, target: Path) -> None:
        if target.exists():
            _rename(build, target, kernel.Rename.EXCHANGE)
        elif (self._containers / target.name).exists():
            _rename(build, target, kernel.Rename.NOREPLACE)
        else:
            raise NotFound(f"layer {target.name} was removed while its ApplyDiff ran")

    def remove(self, id: str) -> bool:
        """Remove a layer in any state; return whether it existed.

        Crash: leaves renamed directories in build/, and perhaps one in private/; the next start removes them.
        """
        check_id(id)
        self._cached.pop(id, None)
        project = self._project(id)
        found = [self._discard(parent / id) for parent in (self._containers, self._images)]
        for leftover in self._build.glob(f"{id}.????????"):  # of an import that died, or is running and will fail
            self._discard(leftover)
        self._discard(self.private_stores.path(id))  # last, since no import can add to it any more
        if project:
            self.quotas.remove_limit(project)
        return any(found)

    def recover(self) -> int:
        """Remove the leftovers of crashes in build/ and private/; forbid ApplyDiff into the existing new layers.

        Call only when the gateway or dockerd starts.

        Returns:
            The number of directories removed.
        """
        staged = list(self._build.iterdir())
        for path in staged:
            self._discard(path)
        orphans = self.private_stores.orphans()  # only now: staged layers cannot be published any more
        for path in orphans:
            self._discard(path)
        for path in self._containers.iterdir():
            if self._is_image(path.name):
                self._discard(path)
        self._unmount_old_indexes()
        for parent in (self._images, self._containers):
            for path in parent.iterdir():
                apply_once.forbid_apply(path)
        if all(self._is_complete(id) for id in self.ids()):
            inplace.allow_in_place(self._root)
        return len(staged) + len(orphans)

    def _project(self, id: str) -> int:
        try:
            return self.get(id).project
        except GearError:
            return 0

    def _is_image(self, id: str) -> bool:
        try:
            return self.get(id).kind is LayerKind.IMAGE
        except GearError:  # a power cut may leave the record of an unfinished layer empty
            return False

    def _is_complete(self, id: str) -> bool:
        try:
            return self.get(id).complete
        except GearError:
            return False

    def has_shared_inode_numbers(self, id: str) -> bool:
        """Whether an index of the layer chain has inode numbers that other layers also have.

        Raises:
            NotFound: A layer is missing.
        """
        images = (layer for layer in self.layer_chain(id) if layer.kind is LayerKind.IMAGE)
        return any(not has_own_inode_numbers(self.directory(layer) / INDEX_FILE) for layer in images)

    def _unmount_old_indexes(self) -> None:
        """Unmount indexes without inode numbers of their own; the next mount gives them numbers."""
        for path in self._images.iterdir():
            if is_mounted(path / TREE) and not has_own_inode_numbers(path / INDEX_FILE):
                unmount(path / TREE)

    def unmount_indexes(self) -> None:
        """Unmount all indexes; only for `LayerMounts.unmount_indexes`, which waits for mounts in progress."""
        for path in self._images.glob("*"):
            unmount(path / TREE)

    @contextmanager
    def build_directory(self, id: str) -> Iterator[Path]:
        """Create an empty directory in build/; remove it and its content at the end of the context."""
        path = self._build / f"{id[:200]}.{secrets.token_hex(4)}"
        try:
            path.mkdir(mode=0o700)
        except OSError as exc:
            raise from_os_error(exc, f"create {path}") from exc
        try:
            yield path
        finally:
            remove_tree(path)

    # -- steps

    def _ensure_own_numbers(self, index: Path) -> None:
        """Give numbers of its own to an index of gearworkers 0.1, whose inodes count from 1."""
        if not has_own_inode_numbers(index):
            with self.build_directory(index.parent.name) as build:
                renumber(index, self.inode_numbers, build)

    def _lay_out(self, build: Path, layer: Layer, ids: IdMaps, owner: tuple[int, int] | None) -> None:
        if layer.kind is LayerKind.CONTAINER:
            for name, mode in ((UPPER, 0o755), (WORK, 0o700), (MERGED, 0o700)):
                (build / name).mkdir(mode=mode)
                (build / name).chmod(mode)
            os.chown(build / UPPER, *(owner or ids.root))
            # As overlay2: the container's root can enter the directory but not change its entries.
            os.chown(build, 0, ids.root[1])
            build.chmod(0o710)
        write_record(build, layer)

    def _discard(self, directory: Path) -> bool:
        """Remove a directory; return whether it existed. It is first renamed into build/, so the removal is atomic."""
        unmount(directory / TREE)
        removed_path = self._build / f"removed.{secrets.token_hex(8)}"
        try:
            os.rename(directory, removed_path)
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise from_os_error(exc, f"remove {directory}") from exc
        remove_tree(removed_path)
        return True


def _rename(source: Path, target: Path, flags: kernel.Rename) -> None:
    try:
        kernel.renameat2(kernel.AT_FDCWD, os.fsencode(source), kernel.AT_FDCWD, os.fsencode(target), flags)
    except OSError as exc:
        raise from_os_error(exc, f"layer {target.name}") from exc
