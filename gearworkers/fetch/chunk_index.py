"""Where chunks lie on this host: a new version of a large file shares many with the one before.

A hint and no more. What is found by it is compared with the chunk's digest, and what it does not know is fetched. So
nothing is synced, and a damaged index is replaced by an empty one.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog

from gearworkers.errors import GearError
from gearworkers.fetch.source import Chunk
from gearworkers.util.open_file import File

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_HEAD_BYTES = 8
_MOST_TRIED = 3
_SCHEMA = """
    PRAGMA journal_mode=WAL;
    PRAGMA synchronous=OFF;
    CREATE TABLE IF NOT EXISTS objects (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE);
    CREATE TABLE IF NOT EXISTS chunks (head INTEGER, object INTEGER, offset INTEGER, PRIMARY KEY (head, object))
        WITHOUT ROWID;
"""


class ChunkIndex:
    """Of one process; all methods from any thread, and none fails: what goes wrong is logged.

    It takes some 25 bytes a chunk on disk, 40 MB for 100 GB of large objects.
    """

    def __init__(self, path: Path, open_object: Callable[[bytes], File | None]) -> None:
        """
        Args:
            path: Its file, made by `prepare`.
            open_object: Gives the file of an object that is here or on its way, given its digest, or None.
        """
        self._path = path
        self._open_object = open_object
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def prepare(self) -> None:
        """Open it, or begin a new one."""
        with self._lock:
            self._connect()

    def close(self) -> None:
        """Find nothing any more."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def note(self, digest: bytes, layout: Sequence[Chunk]) -> None:
        """An object of this layout is on its way: what has arrived of it can be found from now on."""

        def insert(db: sqlite3.Connection) -> None:
            if db.execute("INSERT OR IGNORE INTO objects (digest) VALUES (?)", (digest,)).rowcount:
                (number,) = db.execute("SELECT id FROM objects WHERE digest = ?", (digest,)).fetchone()
                rows = ((_head(chunk), number, chunk.offset) for chunk in layout)
                db.executemany("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?)", rows)

        self._do(insert)

    def find(self, chunk: Chunk, of: bytes) -> bytes | None:
        """The chunk's bytes, verified, from another object than *of*; None if they are not here."""

        def look_up(db: sqlite3.Connection) -> list[tuple[bytes, int]]:
            return db.execute(
                "SELECT digest, offset FROM chunks JOIN objects ON object = id"
                " WHERE head = ? AND digest != ? ORDER BY object DESC LIMIT ?",
                (_head(chunk), of, _MOST_TRIED),
            ).fetchall()

        for digest, offset in self._do(look_up) or ():
            try:
                file = self._open_object(digest)
                data = os.pread(file.fd, chunk.size_bytes, offset) if file is not None else b""
            except (GearError, OSError) as exc:
                _log.warning("a chunk that is here could not be read", object=digest.hex(), error=str(exc))
                continue
            if len(data) == chunk.size_bytes and hashlib.sha256(data).digest() == chunk.digest:
                return data
        return None

    def forget_gone(self, is_here: Callable[[bytes], bool]) -> None:
        """Drop the objects that, given their digest, are neither here nor on their way."""

        def noted(db: sqlite3.Connection) -> list[tuple[int, bytes]]:
            return db.execute("SELECT id, digest FROM objects").fetchall()

        gone = [(number,) for number, digest in self._do(noted) or () if not is_here(digest)]

        def delete(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM objects WHERE id = ?", gone)
            db.execute("DELETE FROM chunks WHERE object NOT IN (SELECT id FROM objects)")

        if gone:
            self._do(delete)

    # -- the database

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Its result, of one transaction; None if there is no index or it fails."""
        with self._lock:
            if self._db is None:
                return None
            try:
                with self._db:
                    return work(self._db)
            except sqlite3.OperationalError as exc:  # no room, or what else may pass
                _log.warning("the index of chunks cannot be used", error=str(exc))
            except sqlite3.DatabaseError as exc:
                _log.warning("the index of chunks is damaged; a new one begins", error=str(exc))
                self._begin_anew()
        return None

    def _connect(self) -> None:
        try:
            self._db = _opened(self._path)
        except sqlite3.OperationalError as exc:
            _log.warning("there is no index of chunks", error=str(exc))
        except sqlite3.DatabaseError:
            self._begin_anew()

    def _begin_anew(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        try:
            self._db = _opened(self._path)
        except sqlite3.Error as exc:
            _log.warning("there is no index of chunks", error=str(exc))


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False)
    try:
        db.executescript(_SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


def _head(chunk: Chunk) -> int:
    """What a chunk is looked up by: the begin of its digest."""
    return int.from_bytes(chunk.digest[:_HEAD_BYTES], "little", signed=True)
