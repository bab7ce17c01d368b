"""Where layers lie and what state they are in.

Glossary: a *layer* is known by its id and has at most one parent; an *image layer* is read-only and lies in
images/, a *container layer* is read-write and lies in containers/; a layer is *new* after Create: the first
ApplyDiff makes it an image layer, the first Get a container layer; its *lower* is the directory that stands for
it in a mount of a layer above it; its *chain* are the lowers of itself and all its parents, the topmost first.

Order of writes: a layer is made in build/ and comes to its place by one rename; it goes the other way.
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
from gearworkers.errors import AlreadyExists, GearError, InvalidInput, NotFound, from_os_error
from gearworkers.layers import apply_once
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.index.inode_numbers import INDEX_FILE, InodeNumbers
from gearworkers.layers.index.mount import mount_index
from gearworkers.layers.index.renumber import has_own_inode_numbers, renumber
from gearworkers.layers.private import PrivateStores
from gearworkers.layers.quotas import Quotas
from gearworkers.layers.record import RECORD_FILE, Layer, LayerKind, read_record, write_record
from gearworkers.mounts.overlay import is_mounted, unmount
from gearworkers.settings import NodeSettings
from gearworkers.tar.private_marker import MARK
from gearworkers.util import syscalls as kernel
from gearworkers.util.fs import opened_directory, remove_tree

TREE = "tree"
UPPER = "upper"
WORK = "work"
MERGED = "merged"

_VALID_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


def check_id(id: str) -> str:
    """*id*, which is going to be a path component.

    Raises:
        InvalidInput: It is empty or has characters that no id of Docker's has.
    """
    if not _VALID_ID.fullmatch(id):
        raise InvalidInput(f"layer id {id[:80]!r}: up to 200 letters, digits, '_', '-', and '.' but first, are allowed")
    return id


class LayerStore:
    """The layers of one GEAR_ROOT; any process of the node may have one at the same time."""

    def __init__(self, settings: NodeSettings, objects: ObjectStore) -> None:
        self._root = settings.gear_root
        self._objects = objects
        self._images = settings.gear_images_path
        self._containers = settings.gear_containers_path
        self._build = settings.gear_build_path
        self.private_stores = PrivateStores(settings.gear_private_cache_path, self._images)
        """What private layers keep to themselves."""
        self.quotas = Quotas(self._containers)
        """The sizes that containers are held to."""
        self.inode_numbers = InodeNumbers(settings.gear_root, (self._build, self._images))
        """Where layers' indexes take their inode numbers from."""
        self._settled: dict[str, Layer] = {}  # complete image layers; changed by `inplace.leave_mark` only
        self._settled_ns = 0

    def prepare(self) -> None:
        """Make the directories that are missing."""
        for path in (self._images, self._containers, self._build):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.private_stores.prepare()

    def ids(self) -> list[str]:
        """The ids of all layers, sorted."""
        return sorted({path.name for parent in (self._images, self._containers) for path in parent.iterdir()})

    def get(self, id: str) -> Layer:
        """The layer's record.

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
            raise NotFound(f"layer {id}: there is none of this id")
        return container

    def exists(self, id: str) -> bool:
        """Whether there is such a layer, finished or not."""
        check_id(id)
        return (self._images / id).is_dir() or (self._containers / id).is_dir()

    def directory(self, layer: Layer) -> Path:
        """Where the layer lies."""
        return (self._containers if layer.kind is LayerKind.CONTAINER else self._images) / layer.id

    def lower(self, layer: Layer) -> Path:
        """What stands for the layer in a mount above it: of an image layer its index, mounted.

        Raises:
            FailedPrecondition: Its ApplyDiff did not finish.
        """
        directory = self.directory(layer)
        if layer.kind is LayerKind.NEW:
            apply_once.refuse_unfinished(directory)
        if layer.kind is LayerKind.CONTAINER:
            return directory / UPPER
        if layer.kind is LayerKind.IMAGE:
            index = directory / INDEX_FILE
            mount_index(index, directory / TREE, prepare=lambda: self._give_numbers(index))
        return directory / TREE

    def lowers(self, id: str) -> tuple[Path, ...]:
        """The lowers of this layer and its parents, the topmost first; empty for the empty id.

        Raises:
            NotFound: One of them is missing.
            FailedPrecondition: One of them is unfinished.
        """
        return tuple(self.lower(layer) for layer in self.layer_chain(id))

    def layer_chain(self, id: str) -> Iterator[Layer]:
        """The layer, its parent, and so on down."""
        changed_ns = inplace.mark_time_ns(self._root)
        if changed_ns != self._settled_ns:
            self._settled, self._settled_ns = {}, changed_ns
        while id:
            layer = self._settled.get(id)
            if layer is None:
                layer = self.get(id)
                if layer.kind is LayerKind.IMAGE and layer.complete:
                    self._settled[id] = layer
            yield layer
            id = layer.parent

    def is_complete(self, id: str) -> bool:
        """Whether all contents of the layer and its parents are here."""
        return all(layer.complete for layer in self.layer_chain(id))

    def is_private(self, id: str) -> bool:
        """Whether the layer, or one below it, has the mark: its contents are shared with no other and never pushed."""
        return any(self._has_mark(layer) for layer in self.layer_chain(id))

    def private_layers(self, id: str) -> list[Layer]:
        """Of the layer and its parents those that are private, the topmost first; also those that BuildKit made."""
        layers = list(self.layer_chain(id))
        while layers and not self._has_mark(layers[-1]):
            layers.pop()
        return layers

    def _has_mark(self, layer: Layer) -> bool:
        if layer.kind is LayerKind.IMAGE:
            return layer.private
        return os.path.lexists(os.fsencode(self.directory(layer) / UPPER) + b"/" + MARK)

    def object_store(self, layer: Layer) -> ObjectStore:
        """Where the contents lie that an image layer's tar holds."""
        return self.private_stores.store(layer.id) if layer.private else self._objects

    def private_directories(self, id: str) -> tuple[Path, ...]:
        """The directories of what the layer and its parents keep to themselves, the topmost first."""
        return tuple(self.private_stores.path(layer.id) for layer in self.layer_chain(id) if layer.private_objects)

    # -- a layer's life

    def create(self, layer: Layer, ids: IdMaps) -> None:
        """Make an empty layer; its parent must be there, and a limit needs `Quotas.require`.

        Raises:
            AlreadyExists: The id is taken.
            NotFound: The parent is missing.
        """
        check_id(layer.id)
        if layer.parent:
            self.lower(self.get(layer.parent))
        if self.exists(layer.id):
            raise AlreadyExists(f"layer {layer.id}: there is one of this id")
        with self.build_directory(layer.id) as build:
            if layer.size_limit_bytes:
                layer = msgspec.structs.replace(layer, project=self.quotas.limit(build, layer.size_limit_bytes))
            self._lay_out(build, layer, ids)
            if layer.kind is LayerKind.NEW:
                apply_once.allow(build)
            _rename(build, self.directory(layer), kernel.Rename.NOREPLACE)

    def promote(self, layer: Layer, ids: IdMaps) -> Layer:
        """Make a new layer a container layer, to be written through a mount."""
        apply_once.refuse_unfinished(self._images / layer.id)
        container = msgspec.structs.replace(layer, kind=LayerKind.CONTAINER)
        with self.build_directory(layer.id) as build:
            self._lay_out(build, container, ids)
            if apply_once.is_allowed(self._images / layer.id):
                apply_once.allow(build)
            _rename(build, self._containers / layer.id, kernel.Rename.NOREPLACE)
        self._discard(self._images / layer.id)
        return container

    def begin_apply(self, id: str, parent: str) -> Layer:
        """Mark that an ApplyDiff fills the layer; stays until it has finished or the layer is removed.

        Raises:
            InvalidInput: Create was told another parent.
            AlreadyExists: The layer has content.
            FailedPrecondition: As `filling.begin`.
        """
        layer = self.get(id)
        if layer.parent != parent:
            raise InvalidInput(f"layer {id}: its parent is {layer.parent!r}, not {parent!r}")
        directory = self.directory(layer)
        if layer.kind is LayerKind.IMAGE or (layer.kind is LayerKind.CONTAINER and any((directory / UPPER).iterdir())):
            raise AlreadyExists(f"layer {id}: it has content; ApplyDiff fills an empty layer only")
        apply_once.begin(directory)
        return layer

    def publish(self, build: Path, layer: Layer) -> None:
        """Put a finished image layer in the place of the empty one, durably.

        Raises:
            NotFound: The empty layer was removed meanwhile; nothing is visible.

        Crash: before the rename the layer is unfinished, after it whole; what it has in private/ before belongs to
        no layer, and `recover` removes it.
        """
        for name in (TREE, MERGED):
            (build / name).mkdir(mode=0o700)
        write_record(build, layer)
        place = self._images / layer.id
        with opened_directory(self._images) as images_fd:
            with self.private_stores.placed(build, layer.id) if layer.private_objects else nullcontext():
                kernel.syncfs(images_fd)
                if not layer.complete:
                    inplace.forbid(self._root)
                with publishing(self._root, self._objects):
                    self._place(build, place)
            os.fsync(images_fd)
            if not layer.complete:
                inplace.forbid(self._root)  # once more: a `recover` may just have found no incomplete layer
        self._discard(self._containers / layer.id)

    def _place(self, build: Path, place: Path) -> None:
        if place.exists():
            _rename(build, place, kernel.Rename.EXCHANGE)
        elif (self._containers / place.name).exists():
            _rename(build, place, kernel.Rename.NOREPLACE)
        else:
            raise NotFound(f"layer {place.name}: it was removed while its ApplyDiff ran")

    def remove(self, id: str) -> bool:
        """Remove a layer in whatever state it is; whether it was there.

        Crash: what was begun is out of sight, and removed from build/ and private/ at the next start.
        """
        check_id(id)
        self._settled.pop(id, None)
        project = self._project(id)
        found = [self._discard(parent / id) for parent in (self._containers, self._images)]
        for leftover in self._build.glob(f"{id}.????????"):  # of an import that died, or goes on and now will fail
            self._discard(leftover)
        self._discard(self.private_stores.path(id))  # last: nothing comes any more
        if project:
            self.quotas.release(project)
        return any(found)

    def recover(self) -> int:
        """Remove what crashes left in build/ and private/, and let no layer of before take a tar.

        For the start of the gateway or of dockerd only.

        Returns:
            How many directories were removed.
        """
        staged = list(self._build.iterdir())
        for path in staged:
            self._discard(path)
        ownerless = self.private_stores.ownerless()  # only now: nothing that was staged is published any more
        for path in ownerless:
            self._discard(path)
        for path in self._containers.iterdir():
            if self._is_image(path.name):
                self._discard(path)
        self._release_old_indexes()
        for parent in (self._images, self._containers):
            for path in parent.iterdir():
                apply_once.forbid(path)
        if all(self._is_complete(id) for id in self.ids()):
            inplace.allow(self._root)
        return len(staged) + len(ownerless)

    def _project(self, id: str) -> int:
        try:
            return self.get(id).project
        except GearError:
            return 0

    def _is_image(self, id: str) -> bool:
        try:
            return self.get(id).kind is LayerKind.IMAGE
        except GearError:  # a power cut may leave an unfinished layer's record without its bytes
            return False

    def _is_complete(self, id: str) -> bool:
        try:
            return self.get(id).complete
        except GearError:
            return False

    def has_shared_inode_numbers(self, id: str) -> bool:
        """Whether an index of the layer or its parents has inode numbers that others have, too.

        Raises:
            NotFound: One of them is missing.
        """
        images = (layer for layer in self.layer_chain(id) if layer.kind is LayerKind.IMAGE)
        return any(not has_own_inode_numbers(self.directory(layer) / INDEX_FILE) for layer in images)

    def _release_old_indexes(self) -> None:
        """Have indexes without numbers of their own get them before they are mounted anew."""
        for path in self._images.iterdir():
            if is_mounted(path / TREE) and not has_own_inode_numbers(path / INDEX_FILE):
                unmount(path / TREE)

    def unmount_indexes(self) -> None:
        """Unmount all indexes; containers that run keep what they have, and what is asked for comes back."""
        for path in self._images.glob("*"):
            unmount(path / TREE)

    @contextmanager
    def build_directory(self, id: str) -> Iterator[Path]:
        """An empty directory in build/; gone at the end, with what is still in it."""
        path = self._build / f"{id[:200]}.{secrets.token_hex(4)}"
        try:
            path.mkdir(mode=0o700)
        except OSError as exc:
            raise from_os_error(exc, f"make {path}") from exc
        try:
            yield path
        finally:
            remove_tree(path)

    # -- steps

    def _give_numbers(self, index: Path) -> None:
        """An index of an older gearworkers counts its inodes from 1, as all others did."""
        if not has_own_inode_numbers(index):
            with self.build_directory(index.parent.name) as build:
                renumber(index, self.inode_numbers, build)

    def _lay_out(self, build: Path, layer: Layer, ids: IdMaps) -> None:
        if layer.kind is LayerKind.CONTAINER:
            for name, mode in ((UPPER, 0o755), (WORK, 0o700), (MERGED, 0o700)):
                (build / name).mkdir(mode=mode)
                (build / name).chmod(mode)
            os.chown(build / UPPER, *ids.root)
            # As overlay2: the container's root gets to its tree, and changes no name here.
            os.chown(build, 0, ids.root[1])
            build.chmod(0o710)
        write_record(build, layer)

    def _discard(self, place: Path) -> bool:
        """Out of sight by one rename, then removed; so nobody publishes what is half removed."""
        unmount(place / TREE)
        grave = self._build / f"removed.{secrets.token_hex(8)}"
        try:
            os.rename(place, grave)
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise from_os_error(exc, f"remove {place}") from exc
        remove_tree(grave)
        return True


def _rename(source: Path, target: Path, flags: kernel.Rename) -> None:
    try:
        kernel.renameat2(kernel.AT_FDCWD, os.fsencode(source), kernel.AT_FDCWD, os.fsencode(target), flags)
    except OSError as exc:
        raise from_os_error(exc, f"layer {target.name}") from exc
