"""The snapshotter: containerd's snapshots as layers of an engine.

A *snapshot* is active (read-write), a view (read-only) or committed. An active snapshot has a layer of its own, which
stays when the snapshot is committed. It is a read-write layer, or a new layer if the snapshot waits for Apply, which
makes it an image layer. A view has no layer; it is a read-only mount of its parent at `views/NUMBER` in GEAR_ROOT.

Every mount that containerd gets is a bind of a tree that is mounted here. So containerd and BuildKit never see the
upper directory, whose files may be references to objects (see docs/design/containerd.md).

Order of writes: the layer is created before its row and removed after it. `_repair` removes layers and views without
a row, and rows without a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import structlog

from gearworkers.engine.engine import Engine
from gearworkers.errors import FailedPrecondition, InvalidInput, NotFound
from gearworkers.layers.record import LayerKind
from gearworkers.layers.store import MERGED
from gearworkers.util.keyed_locks import KeyedLocks
from plugin_gateway.containerd.filters import matcher
from plugin_gateway.containerd.snapshot_table import (
    AppliedBlob,
    Snapshot,
    SnapshotKind,
    SnapshotTable,
    committed_name,
    is_layer_name,
    is_snapshot_layer,
    is_unpack_key,
    key_of,
)
from plugin_gateway.containerd.user_namespaces import UserNamespaces, id_maps, only_id_maps, without_id_maps

_log = structlog.stdlib.get_logger(__name__)

UNPACK_MOUNT = "gear-layer"
"""The type of the mount of a layer that waits for Apply. No other differ can mount it, so none writes into it."""
_TABLE = "snapshots.sqlite"
_VIEWS = "views"
_EMPTY = "empty"


class Mount(NamedTuple):
    """A mount as containerd describes it."""

    type: str
    source: str
    options: tuple[str, ...]


class SnapshotUsage(NamedTuple):
    """The disk use of one snapshot, without its parents."""

    size_bytes: int
    inodes: int


class Snapshots:
    """The snapshots of one GEAR_ROOT; methods may be called from many threads and raise GearError.

    Names and keys are as containerd sends them: NAMESPACE/NUMBER/KEY.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._root = engine.settings.gear_root
        self._user_namespaces = UserNamespaces(self._root, engine.settings.containerd_address)
        self._views = self._root / _VIEWS
        self._locks = KeyedLocks()
        self._table: SnapshotTable | None = None

    # -- life

    def open(self) -> None:
        """Open the table and repair the leftovers of a crash; the engine is prepared.

        Raises:
            FailedPrecondition: The table is lost, but layers of snapshots exist: a repair would remove them all.
            GearError: The table cannot be used.
        """
        self._require_table()
        self._views.mkdir(mode=0o700, exist_ok=True)
        self._table = SnapshotTable(self._root / _TABLE)
        self._repair()

    def _require_table(self) -> None:
        path = self._root / _TABLE
        layers = [id for id in self._engine.layers.ids() if is_snapshot_layer(id)]
        if layers and not path.exists():
            raise FailedPrecondition(
                f"{path} is missing, but {len(layers)} layers of containerd's snapshots exist: restore the file, or "
                "remove images/snapshot-* and containers/snapshot-* in GEAR_ROOT, whose data are then lost"
            )

    def close(self) -> None:
        """Close the table; mounts stay."""
        if self._table is not None:
            self._table.close()
            self._table = None

    @property
    def _rows(self) -> SnapshotTable:
        if self._table is None:
            raise FailedPrecondition("the snapshots are closed")
        return self._table

    def _repair(self) -> None:
        """Make table and layers agree after a crash."""
        self._forget_lost()
        rows = self._rows.all()
        layers = {snapshot.layer for snapshot in rows}
        for id in self._engine.layers.ids():
            if is_layer_name(id) and id not in layers:
                _log.info("layer without a snapshot removed", layer=id)
                self._engine.remove(id)
        numbers = {str(snapshot.number) for snapshot in rows if snapshot.kind is SnapshotKind.VIEW}
        for view in self._views.iterdir():
            if view.name not in numbers:
                self._remove_view(view)

    def _forget_lost(self) -> None:
        """Remove the rows without a layer, children before their parents; a row with other children stays."""
        lost = {row.name: row for row in self._rows.all() if row.layer and not self._engine.layers.exists(row.layer)}
        while lost:
            parents = {row.parent for row in self._rows.all()}
            childless = [row for row in lost.values() if row.name not in parents]
            if not childless:
                _log.error("snapshots lost their layers but have children", snapshots=sorted(lost))
                return
            for row in childless:
                with self._rows.transaction() as rows:
                    rows.remove(lost.pop(row.name).name)
                _log.warning("snapshot without a layer removed", snapshot=row.name, layer=row.layer)

    # -- creation

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make an active snapshot and return its mounts.

        Raises:
            AlreadyExists: The key is taken.
            NotFound: The parent does not exist.
            InvalidInput: The parent is not committed, or the labels for a user namespace are malformed.
            FailedPrecondition: A dockerd with --userns-remap uses the same GEAR_ROOT; or this host cannot make the
                mounts for a user namespace that containerd expects.
        """
        labels = self._user_namespaces.accepted(labels)
        self._reject_remapped_root()
        created = ""
        try:
            with self._rows.transaction() as rows:
                snapshot = rows.add(SnapshotKind.ACTIVE, key, parent, labels)
                parent_layer = rows.get(parent).layer if parent else ""
                if is_unpack_key(key):
                    self._engine.create(snapshot.layer, parent_layer, LayerKind.NEW, mount_ids=id_maps(labels))
                else:
                    self._engine.create_writable(snapshot.layer, parent_layer, id_maps(labels))
                created = snapshot.layer
        except BaseException:
            if created:  # and the row could not be written
                self._engine.remove(created)
            raise
        return self._mounts_of_new(snapshot)

    def _reject_remapped_root(self) -> None:
        if self._engine.id_maps().uids:
            raise FailedPrecondition(f"{self._root} belongs to a dockerd with --userns-remap; set another GEAR_ROOT")

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make a read-only view of *parent* and return its mounts; errors as `prepare`."""
        labels = self._user_namespaces.accepted(labels)
        with self._rows.transaction() as rows:
            snapshot = rows.add(SnapshotKind.VIEW, key, parent, labels)
        return self._mounts_of_new(snapshot)

    def _mounts_of_new(self, snapshot: Snapshot) -> list[Mount]:
        try:
            return self._mounts(snapshot)
        except BaseException:
            self.remove(snapshot.name)
            raise

    # -- mounts

    def mounts(self, key: str) -> list[Mount]:
        """Mount an active snapshot or a view unless it is mounted; return its mounts.

        A container may start now: containerd's clients call Prepare when they create it, and Mounts when they start it.

        Raises:
            NotFound: There is no such snapshot.
            FailedPrecondition: The snapshot is committed, or the kernel refuses.
        """
        return self._mounts(self._rows.get(key), may_start=True)

    def _mounts(self, snapshot: Snapshot, *, may_start: bool = False) -> list[Mount]:
        with self._locks.held(snapshot.layer):
            snapshot = self._rows.numbered(snapshot.number)  # again: it may have been removed or committed meanwhile
            if snapshot.kind is SnapshotKind.COMMITTED:
                raise FailedPrecondition(f"snapshot {snapshot.name} is committed, so it has no mounts")
            if snapshot.kind is SnapshotKind.VIEW:
                return [_bind(self._mounted_view(snapshot), "ro")]
            layer = self._engine.layers.get(snapshot.layer)
            if layer.kind is LayerKind.NEW:
                return [Mount(UNPACK_MOUNT, str(self._engine.layers.directory(layer)), ("rw",))]
            target = self._engine.mount(layer.id)
            if layer.kind is LayerKind.IMAGE:
                return [_bind(target, "ro")]
            if may_start:
                self._engine.begin_start(layer.id)
            return [_bind(target, "rw")]

    def _mounted_view(self, snapshot: Snapshot) -> Path:
        if not snapshot.layer:
            return self._root / _EMPTY
        target = self._views / str(snapshot.number)
        target.mkdir(mode=0o700, exist_ok=True)
        self._engine.mounts.mount_read_only(snapshot.layer, target, id_maps(snapshot.labels))
        return target

    def layer_of(self, mounts: Sequence[Mount]) -> str | None:
        """Return the layer that *mounts* show: empty for the empty tree, None for other mounts than gearworkers'."""
        if len(mounts) != 1 or mounts[0].type not in ("bind", UNPACK_MOUNT):
            return None
        source, settings = Path(mounts[0].source), self._engine.settings
        if source == self._root / _EMPTY:
            return ""
        if source.parent == self._views and source.name.isdecimal():
            return self._rows.numbered(int(source.name)).layer
        directory = source.parent if source.name == MERGED else source
        if directory.parent in (settings.gear_images_path, settings.gear_containers_path):
            return directory.name if is_layer_name(directory.name) else None
        return None

    def namespace_of(self, layer: str) -> str:
        """Return containerd's namespace of a layer, from the name of its snapshot."""
        return next((row.name.partition("/")[0] for row in self._rows.all() if row.layer == layer), "")

    # -- the end of an active snapshot

    def commit(self, key: str, name: str, labels: Mapping[str, str], parent: str = "") -> str:
        """Commit the active snapshot *key* as *name*, durably.

        Args:
            key: The key of the active snapshot.
            name: The name of the committed one.
            labels: All labels of the committed one.
            parent: The parent of a snapshot that was prepared without one.

        Returns:
            The layer if it was written through a mount; empty if Apply has filled it.

        Raises:
            NotFound, AlreadyExists, FailedPrecondition, InvalidInput: As `SnapshotRows.commit`.
            FailedPrecondition: An Apply to the snapshot has not finished.

        Crash: may leave an active snapshot whose layer has the parent already; the same commit succeeds.
        """
        active = self._rows.get(key)
        with self._locks.held(active.layer):
            usage = SnapshotUsage(0, 0)
            if active.kind is SnapshotKind.ACTIVE:
                self._engine.make_writable(active.layer)  # rejects an unfinished Apply
                self._engine.unmount(active.layer)  # also writes the upper directory to the disk
                usage = self._usage(active)
            with self._rows.transaction(durable=True) as rows:
                committed = rows.commit(key, name, labels, *usage, parent=parent)
                if committed.parent != active.parent:
                    self._engine.rebase(committed.layer, rows.get(committed.parent).layer)
            is_written = self._engine.layers.get(committed.layer).kind is LayerKind.CONTAINER
            return committed.layer if is_written else ""

    def remove(self, key: str) -> None:
        """Remove a snapshot, mounted or not.

        Raises:
            NotFound: There is no such snapshot.
            FailedPrecondition: It has children.
        """
        with self._rows.transaction() as rows:
            snapshot = rows.remove(key)
        with self._locks.held(snapshot.layer):
            if snapshot.kind is SnapshotKind.VIEW:
                self._remove_view(self._views / str(snapshot.number))
            else:
                self._engine.remove(snapshot.layer)

    def _remove_view(self, path: Path) -> None:
        self._engine.mounts.unmount_view(path)
        with suppress(FileNotFoundError):
            path.rmdir()

    # -- information

    def stat(self, name: str) -> Snapshot:
        """Return a snapshot; NotFound if there is none."""
        return self._rows.get(name)

    def find_layer(self, namespace: str, key: str) -> tuple[Path, str]:
        """Return GEAR_ROOT and the layer of a snapshot, as containerd's clients know it.

        Raises:
            NotFound: There is no such snapshot.
        """
        found = [row for row in self._rows.all() if key_of(row.name) == key]
        own = [row for row in found if row.name.startswith(f"{namespace}/")]
        if not found:
            raise NotFound(f"no snapshot {key} in namespace {namespace}")
        # containerd gives a new snapshot a new number, and removes an older one later. A committed snapshot may serve
        # several namespaces under the name of the first.
        return self._root, (own or found)[-1].layer

    def list(self, filters: Sequence[str]) -> Iterator[Snapshot]:
        """Yield the snapshots that match one of *filters*; all if there is no filter. Errors as `filters.matcher`."""
        return filter(matcher(filters), self._rows.all())

    def usage(self, name: str) -> SnapshotUsage:
        """Return the disk use of a snapshot; NotFound if there is none."""
        snapshot = self._rows.get(name)
        match snapshot.kind:
            case SnapshotKind.COMMITTED:
                return SnapshotUsage(snapshot.size_bytes, snapshot.inodes)
            case SnapshotKind.VIEW:
                return SnapshotUsage(0, 0)
            case SnapshotKind.ACTIVE:
                return self._usage(snapshot)

    def _usage(self, snapshot: Snapshot) -> SnapshotUsage:
        return SnapshotUsage(*self._engine.usage_of(snapshot.layer))

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change the labels of a snapshot and return it.

        Args:
            name: The snapshot's name.
            labels: The new labels; an empty value removes a label. The labels for a user namespace never change.
            paths: The fields to change: ``labels`` or ``labels.KEY``; no path means all labels.

        Raises:
            NotFound: There is no such snapshot.
            InvalidInput: A path names an immutable field.
        """
        with self._rows.transaction() as rows:
            current = rows.get(name).labels
            changed = dict(current)
            for path in paths or ("labels",):
                if path == "labels":
                    changed = dict(labels)
                elif path.startswith("labels."):
                    label = path.removeprefix("labels.")
                    changed[label] = labels.get(label, "")
                else:
                    raise InvalidInput(f"cannot update {path!r} field on snapshot {name!r}")
            return rows.update_labels(name, without_id_maps(changed) | only_id_maps(current))

    # -- contents

    def applied(self, digest: str) -> Sequence[AppliedBlob]:
        """Return the layers that the blob *digest* has filled."""
        with self._rows.transaction() as rows:
            return rows.layers_of(digest)

    def unpacked(self, chain_id: str, parent: str) -> Sequence[AppliedBlob]:
        """As `SnapshotRows.unpacked`."""
        with self._rows.transaction() as rows:
            return rows.unpacked(chain_id, parent)

    def copy_applied(self, id: str, digest: str) -> AppliedBlob | None:
        """Fill the empty layer *id* from a layer that the blob *digest* has filled; None if there is no such layer."""
        return next((blob._replace(layer=id) for blob in self.applied(digest) if self.copy(id, blob)), None)

    def is_private(self, layer: str) -> bool:
        """Whether a layer, or one below it, has the marker of private layers; False for the empty id."""
        return self._engine.layers.is_private(layer)

    def commit_copy(self, key: str, parent: str, chain_id: str, labels: Mapping[str, str], blob: AppliedBlob) -> bool:
        """Make a committed snapshot from the layer of *blob*, durably; return False if that cannot be copied.

        Args:
            key: The key of an active snapshot that is not made; the committed one gets its namespace and number.
            parent: The name of the parent.
            chain_id: The key of the committed snapshot.
            labels: Its labels.
            blob: The layer to copy.

        Raises:
            NotFound, InvalidInput, FailedPrecondition: As `prepare`.

        Crash: may leave a layer without a row.
        """
        self._reject_remapped_root()
        name, created = committed_name(key, chain_id), ""
        try:
            with self._rows.transaction(durable=True) as rows:
                snapshot = rows.add(SnapshotKind.ACTIVE, key, parent, labels)
                parent_layer = rows.get(parent).layer if parent else ""
                self._engine.create(snapshot.layer, parent_layer, LayerKind.NEW)
                created = snapshot.layer
                self._engine.copy_layer(snapshot.layer, parent_layer, blob.layer)
                rows.commit(key, name, labels, *self._usage(snapshot))
                rows.note_blob(blob._replace(layer=snapshot.layer))
        except BaseException as exc:
            if created:
                self._engine.remove(created)
                if isinstance(exc, NotFound | FailedPrecondition):  # the layer to copy was removed, or is private
                    return False
            raise
        return True

    def copy(self, id: str, blob: AppliedBlob) -> bool:
        """Fill the empty layer *id* from the layer of *blob*; return False if that cannot be copied."""
        try:
            self._engine.copy_layer(id, self._engine.layers.get(id).parent, blob.layer)
        except (NotFound, FailedPrecondition):
            return False
        return True

    def place_of(self, layer: str) -> tuple[int, str]:
        """Return the number of layers below a snapshot's layer, and containerd's namespace."""
        return sum(1 for _ in self._engine.layers.layer_chain(layer)) - 1, self.namespace_of(layer)

    def note_applied(self, blob: AppliedBlob) -> None:
        """Note the blob that has filled a layer, so that the next Apply of it copies the layer."""
        with self._rows.transaction() as rows:
            rows.note_blob(blob)

    def prepare_apply(self, id: str) -> str:
        """Make layer *id* ready for Apply: unmount it. Return the layer of its parent.

        Raises:
            NotFound: There is no such layer.
            FailedPrecondition: It belongs to a committed snapshot.
        """
        owner = self._rows.owner(id)
        if owner.kind is not SnapshotKind.ACTIVE:
            raise FailedPrecondition(f"snapshot {owner.name} is not active, so no blob can be applied to it")
        self._engine.unmount(id)
        return self._engine.layers.get(id).parent


def _bind(source: Path, access: str) -> Mount:
    return Mount("bind", str(source), ("rbind", access))
