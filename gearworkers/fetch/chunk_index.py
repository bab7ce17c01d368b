"""An index of the chunks of this host's large objects: a new version of a large file shares many with the old one.

The index is a hint. A chunk that it finds is verified, and a chunk that it does not find is fetched. So the index is
never synced, and an empty one replaces a damaged one.
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
from gearworkers.util.open_file import ObjectFile

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_KEY_BYTES = 8
_MAX_CANDIDATES = 3
_SCHEMA = """
    PRAGMA journal_mode=WAL;
    PRAGMA synchronous=OFF;
    CREATE TABLE IF NOT EXISTS objects (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE);
    CREATE TABLE IF NOT EXISTS chunks (head INTEGER, object INTEGER, offset INTEGER, PRIMARY KEY (head, object))
        WITHOUT ROWID;
"""


class ChunkIndex:
    """The index of one process; any thread may call all methods. No method raises: errors are logged.

    It takes 23 bytes per chunk on disk, 40 MB for 100 GB of large objects.
    """

    def __init__(self, path: Path, open_object: Callable[[bytes], ObjectFile | None]) -> None:
        """
        Args:
            path: The database file; `prepare` creates it.
            open_object: Opens a whole or partial object, given its digest; None if there is none.
        """
        self._path = path
        self._open_object = open_object
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def prepare(self) -> None:
        """Open the index, or create a new one."""
        with self._lock:
            self._connect()

    def close(self) -> None:
        """Close the index; later searches find nothing."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def add(self, digest: bytes, layout: Sequence[Chunk]) -> None:
        """Add an object with this layout; its chunks can be found as soon as its file holds them."""

        def insert(db: sqlite3.Connection) -> None:
            if db.execute("INSERT OR IGNORE INTO objects (digest) VALUES (?)", (digest,)).rowcount:
                (number,) = db.execute("SELECT id FROM objects WHERE digest = ?", (digest,)).fetchone()
                rows = ((_key(chunk), number, chunk.offset) for chunk in layout)
                db.executemany("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?)", rows)

        self._run(insert)

    def find(self, chunk: Chunk, owner: bytes) -> bytes | None:
        """Return the chunk's verified bytes from an object other than *owner*; None if this host lacks them."""

        def look_up(db: sqlite3.Connection) -> list[tuple[bytes, int]]:
            return db.execute(
                "SELECT digest, offset FROM chunks JOIN objects ON object = id"
                " WHERE head = ? AND digest != ? ORDER BY object DESC LIMIT ?",
                (_key(chunk), owner, _MAX_CANDIDATES),
            ).fetchall()

        for digest, offset in self._run(look_up) or ():
            try:
                file = self._open_object(digest)
                data = os.pread(file.fd, chunk.size_bytes, offset) if file is not None else b""
            except (GearError, OSError) as exc:
                _log.warning("cannot read a chunk of another object", object=digest.hex(), error=str(exc))
                continue
            if len(data) == chunk.size_bytes and hashlib.sha256(data).digest() == chunk.digest:
                return data
        return None

    def remove_missing(self, is_here: Callable[[bytes], bool]) -> None:
        """Remove the objects for which *is_here*, given their digest, returns False."""

        def all_objects(db: sqlite3.Connection) -> list[tuple[int, bytes]]:
            return db.execute("SELECT id, digest FROM objects").fetchall()

        missing = [(number,) for number, digest in self._run(all_objects) or () if not is_here(digest)]

        def delete(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM objects WHERE id = ?", missing)
            db.execute("DELETE FROM chunks WHERE object NOT IN (SELECT id FROM objects)")

        if missing:
            self._run(delete)

    # -- the database

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Run *work* in a transaction and return its result; None if there is no index or *work* fails."""
        with self._lock:
            if self._db is None:
                return None
            try:
                with self._db:
                    return work(self._db)
            except sqlite3.OperationalError as exc:  # temporary, such as a full disk
                _log.warning("cannot use the chunk index", error=str(exc))
            except sqlite3.DatabaseError as exc:
                _log.warning("the chunk index is damaged and is replaced by an empty one", error=str(exc))
                self._replace()
        return None

    def _connect(self) -> None:
        try:
            self._db = _open(self._path)
        except sqlite3.OperationalError as exc:
            _log.warning("cannot open the chunk index", error=str(exc))
        except sqlite3.DatabaseError:
            self._replace()

    def _replace(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        try:
            self._db = _open(self._path)
        except sqlite3.Error as exc:
            _log.warning("cannot create a new chunk index", error=str(exc))


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False)
    try:
        db.executescript(_SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


def _key(chunk: Chunk) -> int:
    """Return the first bytes of the chunk's digest as the key of the index."""
    return int.from_bytes(chunk.digest[:_KEY_BYTES], "little", signed=True)
