"""The table of snapshots: name, parent, kind, labels, times and layer of each, in an SQLite database.

The database is `snapshots.sqlite` in GEAR_ROOT, in WAL mode. A commit is atomic. It survives a power cut only if it is
made with ``durable=True``, which also makes all earlier ones durable, or after a checkpoint.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from gearworkers.errors import (
    AlreadyExists,
    FailedPrecondition,
    GearError,
    InvalidInput,
    NotFound,
    ResourceExhausted,
)

_VERSION = 1
_SCHEMA = """
CREATE TABLE snapshots (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    parent TEXT NOT NULL,
    kind INTEGER NOT NULL,
    labels TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    layer TEXT NOT NULL,
    size_bytes INTEGER NOT NULL DEFAULT 0,
    inodes INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX children ON snapshots (parent);
CREATE TABLE blobs (
    digest TEXT NOT NULL,
    layer TEXT NOT NULL,
    diff_id TEXT NOT NULL,
    tar_bytes INTEGER NOT NULL,
    PRIMARY KEY (digest, layer)
) STRICT;
CREATE INDEX layers ON blobs (layer);
"""
_COLUMNS = "number, name, parent, kind, labels, created_ns, updated_ns, layer, size_bytes, inodes"
REF = "containerd.io/snapshot.ref"
"""The label with the chain ID of a snapshot that is to be unpacked, or was. containerd finds committed ones by it."""
_LAYER_PREFIX = "snapshot-"
_EARLY_PREFIX = "early-"
_UNPACK_KEY = "extract-"


class SnapshotKind(IntEnum):
    """The kinds of snapshots, by containerd's numbers."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class Snapshot(msgspec.Struct, frozen=True):
    """One row of the table."""

    number: int
    """Permanent number of the snapshot; its name may be reused."""
    name: str
    """The key of an active snapshot or a view, the name of a committed one: NAMESPACE/NUMBER/KEY."""
    parent: str
    """The name of a committed snapshot; empty for none."""
    kind: SnapshotKind
    labels: dict[str, str]
    created_ns: int
    updated_ns: int
    layer: str
    """The engine's layer: the snapshot's own, or that of a view's parent; empty for a view without a parent."""
    size_bytes: int
    inodes: int


class AppliedBlob(NamedTuple):
    """A layer that was filled from a blob."""

    digest: str
    """The blob's digest, as in containerd's content store."""
    layer: str
    diff_id: str
    tar_bytes: int


def early_name(number: int) -> str:
    """Return the id of the engine's layer for a blob that is applied early."""
    return f"{_EARLY_PREFIX}{number}"


def layer_name(number: int) -> str:
    """Return the id of the engine's layer for an active snapshot."""
    return f"{_LAYER_PREFIX}{number}"


def key_of(name: str) -> str:
    """Return the key in a snapshot's name, NAMESPACE/NUMBER/KEY: the name by which containerd's clients know it."""
    return name.split("/", 2)[-1]


def committed_name(key: str, chain_id: str) -> str:
    """Return the name of the snapshot that results from the active snapshot *key* of an unpack."""
    return f"{key.removesuffix(key_of(key))}{chain_id}"


def is_unpack_key(name: str) -> bool:
    """Whether a snapshot with this name waits for Apply: containerd's key for it begins with ``extract-``.

    Source: containerd's core/snapshots, "UnpackKeyFormat".
    """
    return key_of(name).startswith(_UNPACK_KEY)


def is_snapshot_layer(id: str) -> bool:
    """Whether the engine's layer is that of a snapshot."""
    return id.startswith(_LAYER_PREFIX)


def is_layer_name(id: str) -> bool:
    """Whether the engine's layer is of containerd's door; Docker's ids are hexadecimal."""
    return id.startswith((_LAYER_PREFIX, _EARLY_PREFIX))


class SnapshotRows:
    """The table inside one transaction of `SnapshotTable`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, name: str) -> Snapshot:
        """Return the snapshot.

        Raises:
            NotFound: There is no such snapshot.
        """
        rows = self._select("WHERE name = ?", name)
        for row in rows:
            return row
        raise NotFound(f"snapshot {name} does not exist")

    def numbered(self, number: int) -> Snapshot:
        """Return the snapshot with this number; errors as `get`."""
        for row in self._select("WHERE number = ?", number):
            return row
        raise NotFound(f"snapshot number {number} does not exist")

    def owner(self, layer: str) -> Snapshot:
        """Return the active or committed snapshot that has the engine's layer; errors as `get`."""
        for row in self._select("WHERE layer = ? AND kind != ?", layer, SnapshotKind.VIEW):
            return row
        raise NotFound(f"the snapshot of layer {layer} does not exist")

    def all(self) -> list[Snapshot]:
        """Return all snapshots, the oldest first. A parent named at commit may be younger than its child."""
        return list(self._select("ORDER BY number"))

    def add(self, kind: SnapshotKind, key: str, parent: str, labels: Mapping[str, str]) -> Snapshot:
        """Add an active snapshot or a view.

        Raises:
            AlreadyExists: The key is taken.
            NotFound: The parent does not exist.
            InvalidInput: The parent is not a committed snapshot.
        """
        if not key:
            raise InvalidInput("a snapshot needs a key")
        parent_layer = self._committed(parent, InvalidInput).layer if parent else ""
        self._require_free(key)
        now_ns = time.time_ns()
        values = (key, parent, kind, _encoded(labels), now_ns, now_ns, parent_layer)
        cursor = self._connection.execute(
            "INSERT INTO snapshots (name, parent, kind, labels, created_ns, updated_ns, layer) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            values,
        )
        assert cursor.lastrowid is not None
        if kind is SnapshotKind.ACTIVE:
            layer = layer_name(cursor.lastrowid)
            self._connection.execute("UPDATE snapshots SET layer = ? WHERE name = ?", (layer, key))
        return self.get(key)

    def commit(
        self, key: str, name: str, labels: Mapping[str, str], size_bytes: int, inodes: int, parent: str = ""
    ) -> Snapshot:
        """Make the active snapshot *key* the committed snapshot *name*; its labels are replaced.

        Args:
            key: The key of the active snapshot.
            name: The new name.
            labels: All labels of the committed snapshot.
            size_bytes: Its size, without its parents.
            inodes: The number of its inodes, likewise.
            parent: The parent of a snapshot that was prepared without one; empty to keep its parent.

        Raises:
            AlreadyExists: The name is taken.
            NotFound: The active snapshot or the parent does not exist.
            FailedPrecondition: The snapshot is not active, or the parent is not committed.
            InvalidInput: The snapshot has another parent already.
        """
        if not name:
            raise InvalidInput("a committed snapshot needs a name")
        self._require_free(name)
        active = self.get(key)
        if active.kind is not SnapshotKind.ACTIVE:
            raise FailedPrecondition(f"snapshot {key} is not active")
        if parent and parent != active.parent:
            if active.parent:
                raise InvalidInput(f"snapshot {key}: its parent {active.parent} cannot be changed to {parent}")
            self._committed(parent, FailedPrecondition)
        now_ns = time.time_ns()
        self._connection.execute(
            "UPDATE snapshots SET name = ?, parent = ?, kind = ?, labels = ?, created_ns = ?, updated_ns = ?, "
            "size_bytes = ?, inodes = ? WHERE name = ?",
            (
                name,
                parent or active.parent,
                SnapshotKind.COMMITTED,
                _encoded(labels),
                now_ns,
                now_ns,
                size_bytes,
                inodes,
                key,
            ),
        )
        return self.get(name)

    def update_labels(self, name: str, labels: Mapping[str, str]) -> Snapshot:
        """Replace the labels of a snapshot and return it; errors as `get`."""
        self._connection.execute(
            "UPDATE snapshots SET labels = ?, updated_ns = ? WHERE name = ?", (_encoded(labels), time.time_ns(), name)
        )
        return self.get(name)

    def remove(self, name: str) -> Snapshot:
        """Remove a snapshot from the table and return it.

        Raises:
            NotFound: There is no such snapshot.
            FailedPrecondition: It has children.
        """
        found = self.get(name)
        if self._connection.execute("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", (name,)).fetchone():
            raise FailedPrecondition(f"cannot remove snapshot {name} with child")
        self._connection.execute("DELETE FROM snapshots WHERE name = ?", (name,))
        if found.kind is not SnapshotKind.VIEW:
            self._connection.execute("DELETE FROM blobs WHERE layer = ?", (found.layer,))
        return found

    def note_blob(self, blob: AppliedBlob) -> None:
        """Note that a layer was filled from a blob; do nothing if its snapshot was removed meanwhile."""
        self._connection.execute(
            "INSERT OR REPLACE INTO blobs (digest, layer, diff_id, tar_bytes) SELECT ?, ?, ?, ? "
            "WHERE EXISTS (SELECT 1 FROM snapshots WHERE layer = ?)",
            (*blob, blob.layer),
        )

    def layers_of(self, digest: str) -> list[AppliedBlob]:
        """Return the layers that were filled from the blob *digest*."""
        return self._blobs("WHERE digest = ?", digest)

    def unpacked(self, chain_id: str, parent: str) -> list[AppliedBlob]:
        """Return the layers, each with its blob, of the committed snapshots with this parent and label REF."""
        children = self._select("WHERE parent = ? AND kind = ?", parent, SnapshotKind.COMMITTED)
        layers = [child.layer for child in children if child.labels.get(REF) == chain_id]
        return [blob for layer in layers for blob in self._blobs("WHERE layer = ?", layer)]

    def _blobs(self, condition: str, value: str) -> list[AppliedBlob]:
        rows = self._connection.execute(f"SELECT digest, layer, diff_id, tar_bytes FROM blobs {condition}", (value,))
        return [AppliedBlob(*row) for row in rows]

    def _committed(self, name: str, otherwise: type[GearError]) -> Snapshot:
        found = self.get(name)
        if found.kind is not SnapshotKind.COMMITTED:
            raise otherwise(f"parent {name} is not a committed snapshot")
        return found

    def _require_free(self, name: str) -> None:
        if self._connection.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
            raise AlreadyExists(f"snapshot {name} already exists")

    def _select(self, condition: str, *values: str | int) -> Iterator[Snapshot]:
        for row in self._connection.execute(f"SELECT {_COLUMNS} FROM snapshots {condition}", values):
            number, name, parent, kind, labels, *rest = row
            yield Snapshot(number, name, parent, SnapshotKind(kind), msgspec.json.decode(labels), *rest)


class SnapshotTable:
    """The table in the database at *path*; any number of threads of one process may use it.

    Raises:
        GearError: The database cannot be opened, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._create()
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as exc:
            raise self._translated(exc) from exc

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[SnapshotRows]:
        """Yield the rows for one transaction, which an exception rolls back. Transactions follow each other.

        Args:
            durable: Whether the changes survive a power cut once the context has ended.

        Raises:
            GearError: The database refuses, for example because the disk is full; nothing has changed.
        """
        with self._reading() as rows:
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield rows
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def get(self, name: str) -> Snapshot:
        """As `SnapshotRows.get`."""
        with self._reading() as rows:
            return rows.get(name)

    def numbered(self, number: int) -> Snapshot:
        """As `SnapshotRows.numbered`."""
        with self._reading() as rows:
            return rows.numbered(number)

    def owner(self, layer: str) -> Snapshot:
        """As `SnapshotRows.owner`."""
        with self._reading() as rows:
            return rows.owner(layer)

    def all(self) -> list[Snapshot]:
        """As `SnapshotRows.all`."""
        with self._reading() as rows:
            return rows.all()

    @contextmanager
    def _reading(self) -> Iterator[SnapshotRows]:
        with self._lock:
            try:
                yield SnapshotRows(self._connection)
            except sqlite3.Error as exc:
                raise self._translated(exc) from exc

    def _create(self) -> None:
        with closing(self._connection.execute("PRAGMA user_version")) as cursor:
            (version,) = cursor.fetchone()
        if version == 0:
            self._connection.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_VERSION};COMMIT;")
        elif version != _VERSION:
            raise FailedPrecondition(f"{self._path}: version {version} is newer than {_VERSION}; upgrade gearworkers")

    def _translated(self, exc: sqlite3.Error) -> GearError:
        if getattr(exc, "sqlite_errorname", "") == "SQLITE_FULL":  # errors of the module itself have no name
            return ResourceExhausted(f"{self._path}: {exc}")
        return GearError(f"{self._path}: {exc}")


def _encoded(labels: Mapping[str, str]) -> str:
    return msgspec.json.encode({key: value for key, value in labels.items() if value}, order="sorted").decode()
