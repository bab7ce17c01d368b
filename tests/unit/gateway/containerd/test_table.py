"""The table of snapshots: unique names, transactions, durability, and databases that it refuses."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gearworkers.errors import (
    AlreadyExists,
    FailedPrecondition,
    GearError,
    InvalidInput,
    NotFound,
    ResourceExhausted,
)
from plugin_gateway.containerd.snapshot_table import Snapshot, SnapshotKind, SnapshotTable, is_layer_name

NORMAL, FULL = 1, 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "snapshots.sqlite"


@pytest.fixture
def table(path: Path) -> Iterator[SnapshotTable]:
    with closing(SnapshotTable(path)) as table:
        yield table


def add(
    table: SnapshotTable, key: str, parent: str = "", kind: SnapshotKind = SnapshotKind.ACTIVE, **labels: str
) -> Snapshot:
    with table.transaction() as rows:
        return rows.add(kind, key, parent, labels)


def commit(table: SnapshotTable, key: str, name: str, parent: str = "", **labels: str) -> Snapshot:
    with table.transaction(durable=True) as rows:
        return rows.commit(key, name, labels, 10, 2, parent)


def remove(table: SnapshotTable, name: str) -> Snapshot:
    with table.transaction() as rows:
        return rows.remove(name)


def committed(table: SnapshotTable, name: str, parent: str = "") -> Snapshot:
    add(table, f"{name}-active", parent)
    return commit(table, f"{name}-active", name)


# -- rows


def test_an_active_snapshot_has_a_layer_of_its_own(table: SnapshotTable) -> None:
    first, second = add(table, "first", a="1"), add(table, "second")
    assert (first.name, first.parent, first.kind, first.labels) == ("first", "", SnapshotKind.ACTIVE, {"a": "1"})
    assert first.created_ns == first.updated_ns
    assert first.layer != second.layer and is_layer_name(first.layer) and is_layer_name(second.layer)
    assert table.get("first") == first == table.numbered(first.number)
    assert table.all() == [first, second]


def test_a_view_has_the_layer_of_its_parent(table: SnapshotTable) -> None:
    base = committed(table, "base")
    assert add(table, "view", "base", SnapshotKind.VIEW).layer == base.layer
    assert add(table, "empty", "", SnapshotKind.VIEW).layer == ""
    assert table.owner(base.layer) == base
    with pytest.raises(NotFound, match="snapshot-99"):
        table.owner("snapshot-99")


def test_a_committed_snapshot_keeps_number_and_layer(table: SnapshotTable) -> None:
    active = add(table, "active", a="1")
    snapshot = commit(table, "active", "base", b="2")
    assert (snapshot.number, snapshot.layer) == (active.number, active.layer)
    assert (snapshot.kind, snapshot.labels) == (SnapshotKind.COMMITTED, {"b": "2"})
    assert (snapshot.size_bytes, snapshot.inodes) == (10, 2)
    assert table.all() == [snapshot]


def test_the_number_and_layer_of_a_removed_snapshot_are_never_used_again(table: SnapshotTable, path: Path) -> None:
    first = add(table, "key")
    assert remove(table, "key") == first
    table.close()
    with closing(SnapshotTable(path)) as again:
        second = add(again, "key")
    assert second.number > first.number and second.layer != first.layer


def test_labels_without_a_value_are_dropped(table: SnapshotTable) -> None:
    assert add(table, "key", a="", b="1").labels == {"b": "1"}
    with table.transaction() as rows:
        assert rows.update_labels("key", {"b": "", "ü": "\n"}).labels == {"ü": "\n"}
    assert table.get("key").labels == {"ü": "\n"}


def test_names_are_compared_exactly(table: SnapshotTable) -> None:
    for key in ("key", "KEY", "key ", "k%", "' OR 1 --", "ключ"):
        add(table, key)
    assert len(table.all()) == 6
    with pytest.raises(NotFound):
        table.get("k_y")


# -- uniqueness and order


@pytest.mark.parametrize("kind", [SnapshotKind.ACTIVE, SnapshotKind.VIEW])
def test_a_taken_name_is_refused(table: SnapshotTable, kind: SnapshotKind) -> None:
    committed(table, "base")
    add(table, "active")
    before = table.all()
    for taken in ("base", "active"):
        with pytest.raises(AlreadyExists, match=taken):
            add(table, taken, kind=kind)
        with pytest.raises(AlreadyExists, match=taken):
            commit(table, "active", taken)
    assert table.all() == before


def test_an_empty_name_is_refused(table: SnapshotTable) -> None:
    with pytest.raises(InvalidInput, match="key"):
        add(table, "")
    add(table, "active")
    with pytest.raises(InvalidInput, match="name"):
        commit(table, "active", "")


def test_only_committed_snapshots_are_parents(table: SnapshotTable) -> None:
    add(table, "active")
    with pytest.raises(InvalidInput, match="active is not a committed"):
        add(table, "child", "active")
    with pytest.raises(NotFound, match="missing"):
        add(table, "child", "missing")
    with pytest.raises(FailedPrecondition, match="active is not a committed"):
        add(table, "other")
        commit(table, "other", "base", parent="active")


def test_a_snapshot_with_children_is_not_removed(table: SnapshotTable) -> None:
    committed(table, "base")
    add(table, "view", "base", SnapshotKind.VIEW)
    with pytest.raises(FailedPrecondition, match="cannot remove snapshot base"):
        remove(table, "base")
    remove(table, "view")
    remove(table, "base")
    with pytest.raises(NotFound, match="base"):
        remove(table, "base")


def test_all_has_the_oldest_snapshot_first(table: SnapshotTable) -> None:
    add(table, "z")
    committed(table, "y")
    add(table, "x", "y")
    commit(table, "z", "w")
    assert [snapshot.name for snapshot in table.all()] == ["w", "y", "x"]


# -- transactions


def test_an_exception_rolls_a_transaction_back(table: SnapshotTable) -> None:
    base = committed(table, "base")
    with pytest.raises(KeyError), table.transaction() as rows:
        rows.add(SnapshotKind.ACTIVE, "new", "base", {})
        rows.update_labels("base", {"a": "1"})
        raise KeyError
    assert table.all() == [base]
    add(table, "new", "base")


def test_a_refused_change_rolls_the_whole_transaction_back(table: SnapshotTable) -> None:
    with pytest.raises(NotFound), table.transaction() as rows:
        rows.add(SnapshotKind.ACTIVE, "new", "", {})
        rows.remove("missing")
    assert table.all() == []


def test_other_threads_wait_for_the_end_of_a_transaction(table: SnapshotTable) -> None:
    with ThreadPoolExecutor(1) as pool:
        with table.transaction() as rows:
            rows.add(SnapshotKind.ACTIVE, "first", "", {})
            waiting = pool.submit(table.all)
            assert not waiting.done()
        assert [snapshot.name for snapshot in waiting.result(60)] == ["first"]


def test_one_of_many_threads_gets_a_name(table: SnapshotTable) -> None:
    def attempt(_: int) -> bool:
        try:
            add(table, "key")
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(32))) == 1


# -- durability


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[tuple[sqlite3.Connection, SnapshotTable]]:
    """Yield a table and its connection."""
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def recorded(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", recorded)
    with closing(SnapshotTable(path)) as table:
        yield opened[0], table


def test_only_durable_transactions_are_synced(connection: tuple[sqlite3.Connection, SnapshotTable]) -> None:
    database, table = connection
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    for durable, level in ((False, NORMAL), (True, FULL), (False, NORMAL)):
        with table.transaction(durable=durable):
            assert database.execute("PRAGMA synchronous").fetchone() == (level,)


def test_the_rows_survive_without_a_close(table: SnapshotTable, path: Path) -> None:
    snapshot = committed(table, "base")
    with closing(SnapshotTable(path)) as other:
        assert other.all() == [snapshot]


# -- refused databases


def test_a_database_of_a_newer_version_is_refused_and_unchanged(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE snapshots (future TEXT)")
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(FailedPrecondition, match=r"version 99 is newer than \d+; upgrade"):
        SnapshotTable(path)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT sql FROM sqlite_schema").fetchall() == [
            ("CREATE TABLE snapshots (future TEXT)",)
        ]


def test_a_file_that_is_not_a_database_is_an_error(path: Path) -> None:
    path.write_bytes(b"not a database " * 1000)
    with pytest.raises(GearError, match=f"{path}: file is not a database"):
        SnapshotTable(path)
    assert path.read_bytes() == b"not a database " * 1000


def test_a_damaged_database_is_an_error(path: Path) -> None:
    with closing(SnapshotTable(path)) as table:
        for number in range(200):
            add(table, f"key-{number}", label="long" * 20)
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    with pytest.raises(GearError, match=str(path)), closing(SnapshotTable(path)) as table:
        table.all()


def test_a_database_in_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GearError, match="unable to open"):
        SnapshotTable(tmp_path / "missing" / "snapshots.sqlite")


def test_a_closed_table_is_an_error(path: Path) -> None:
    table = SnapshotTable(path)
    table.close()
    with pytest.raises(GearError, match="closed"):
        table.all()
    with pytest.raises(GearError, match="closed"):
        add(table, "key")


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=True)
    with closing(SnapshotTable(disk / "snapshots.sqlite")) as table:
        add(table, "key")
        before = table.all()
        with pytest.raises(ResourceExhausted), table.transaction(durable=True) as rows:
            rows.update_labels("key", {"label": "long" * 200_000})
        assert table.all() == before
        add(table, "other")
