"""ApplyDiff: a tar stream becomes a layer's index, its objects, its `objects` list and its exact stream."""

from __future__ import annotations

import gc
import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gearworkers.cas.inplace import InPlaceLock, forbid, remove_unfinished
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.refs import RefWriter
from gearworkers.cas.store import ObjectState, ObjectStore
from gearworkers.cas.writer import ContentWriter
from gearworkers.cas.writer_process import MAX_CONTENT_BYTES
from gearworkers.errors import InvalidInput, ResourceExhausted
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.index.inode_numbers import INDEX_FILE, InodeNumbers
from gearworkers.layers.index.tree import LayerTree
from gearworkers.tar.entry import REG, TarEntry, shown
from gearworkers.tar.private_marker import MARK, is_mark, reject_hidden_mark, reject_late_mark
from gearworkers.tar.reader import Readable, TarReader
from gearworkers.tar.sparse import expanded, zeros
from gearworkers.tar.tar_split import TarSplitWriter
from gearworkers.util.fs import free_bytes, opened_directory

STREAM_FILE = "stream.zst"
PRIVATE = "private"
"""In the build directory: a private layer's own objects."""
PRIVATE_FILE = "private-objects"
"""Their list, as `objects`."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What one tar brought."""

    size_bytes: int
    """As overlay2 counts: st_size of all but directories, each inode once."""
    objects: int
    """Distinct contents the layer refers to."""
    object_bytes: int
    new_objects: int
    """Of them, how many this import stored."""
    new_bytes: int
    complete: bool
    """Whether all contents are here; False for a Gear layer whose objects are still to come."""
    private: bool
    """Whether the contents of the tar are its own and lie in the build directory's `private`."""
    private_objects: int
    private_bytes: int


def apply_tar(
    source: Readable,
    build: Path,
    store: ObjectStore,
    ids: IdMaps,
    push_queue: PushQueue | None,
    root: Path,
    inode_numbers: InodeNumbers,
    *,
    private: bool = False,
) -> Applied:
    """Fill the empty directory *build* with `index.erofs`, `stream.zst` and `objects`.

    The contents of a private layer go to `private/` in it, with their list `private-objects`; `objects` then names
    only what the tar names without holding it.

    Args:
        source: The tar; read to its clean end.
        build: On the store's file system, private to this call.
        store: Where contents go.
        ids: From the tar's owners to the host's.
        push_queue: Where new objects are noted for push; None for nowhere.
        root: GEAR_ROOT, which knows whether contents may be stored in place.
        inode_numbers: Where the index takes its inode numbers from.
        private: Whether the layer is private; it also is if the tar has the mark (tar.private_marker).

    Raises:
        InvalidInput, IntegrityError: The tar is malformed, hostile or ends early; the message names the entry.
        ResourceExhausted: No space or inodes left, or too many files.

    Crash: leaves *build*, and objects that no layer refers to, which the garbage collector removes.
    """
    with ExitStack() as stack:
        staging_fd = stack.enter_context(opened_directory(build))
        stream_file = stack.enter_context(open(build / STREAM_FILE, "xb"))
        log = TarSplitWriter(stream_file)
        index = LayerTree(ids, time_ns=time.time_ns())
        writer = stack.enter_context(ContentWriter(store, staging_fd, push_queue, InPlaceLock(root)))
        reader = TarReader(_Pausing(source, writer), log, buffer_bytes=MAX_CONTENT_BYTES)
        contents = stack.enter_context(closing(_ContentImporter(reader, log, store, writer, build, staging_fd, root)))
        if private:
            contents.keep_private()
        with _no_garbage_collector():
            contents.fill(index)
        inode_numbers.write_index(index.image(secrets.token_bytes(16)), build / INDEX_FILE)
        log.close()
        return contents.finish(index.size_bytes())


@contextmanager
def _no_garbage_collector() -> Iterator[None]:
    """Python's would walk an index of a million inodes again and again, and there are no cycles to find in it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Pausing:
    """The tar's source; the writer is told before each wait for it."""

    def __init__(self, source: Readable, writer: ContentWriter) -> None:
        self._source = source
        self._writer = writer

    def readinto(self, buffer: memoryview, /) -> int | None:
        self._writer.pause()
        return self._source.readinto(buffer)


class _ContentImporter:
    """Takes the contents out of a tar: hashed, claimed, stored, logged."""

    def __init__(
        self,
        reader: TarReader,
        log: TarSplitWriter,
        store: ObjectStore,
        writer: ContentWriter,
        build: Path,
        staging_fd: int,
        root: Path,
    ) -> None:
        self._reader = reader
        self._log = log
        self._store = self._own_store = store
        self._claims = self._own_claims = RefWriter(build)
        self._writer = writer
        self._build = build
        self._staging_fd = staging_fd
        self._root = root
        self._complete = True

    @property
    def _is_private(self) -> bool:
        """Whether what the tar holds is kept apart."""
        return self._own_claims is not self._claims

    def keep_private(self) -> None:
        """All that the tar holds is the layer's own."""
        self._own_store = ObjectStore(self._build / PRIVATE)
        self._own_store.prepare()
        self._own_claims = RefWriter(self._build, PRIVATE_FILE)
        self._writer.use_private_store(self._own_store)

    def close(self) -> None:
        """Let go of the lists."""
        self._claims.close()
        if self._is_private:
            self._own_claims.close()

    def finish(self, size_bytes: int) -> Applied:
        """Wait until all is stored and listed; what the tar, a layer of *size_bytes*, has brought."""
        objects, object_bytes = self._claims.seal()
        private_objects, private_bytes = self._own_claims.seal() if self._is_private else (0, 0)
        self._writer.flush()
        if self._is_private:
            self._own_store.drop_empty_shards()
        return Applied(
            size_bytes,
            objects,
            object_bytes,
            self._writer.new_objects,
            self._writer.new_bytes,
            self._complete,
            self._is_private,
            private_objects,
            private_bytes,
        )

    def fill(self, index: LayerTree) -> None:
        """Read all of the tar into *index*."""
        reader, add = self._reader, index.add
        entry = reader.next()
        if reader.guarded:
            self._writer.disable_push()
        while entry is not None:
            if MARK in entry.name and not self._is_private and is_mark(entry.name):
                self._turn_private(entry)
            add(entry, self._digest(entry) if entry.type == REG else None)
            entry = reader.next()
        reader.finish()
        if not self._is_private and index.has_at_top(MARK):
            reject_hidden_mark()

    def _turn_private(self, mark: TarEntry) -> None:
        if self._claims:
            reject_late_mark(mark)
        self.keep_private()

    def _digest(self, entry: TarEntry) -> bytes | None:
        if entry.gear is not None:
            return self._named(entry)
        if not entry.size_bytes:
            return None
        payload = self._reader.payload() if entry.sparse is None else None
        if payload is None:
            return self._streamed(entry)
        digest = hashlib.sha256(payload).digest()
        self._own_claims.add(digest, len(payload))
        self._writer.put(digest, payload)
        self._log.content(digest, len(payload))
        return digest

    def _named(self, entry: TarEntry) -> bytes | None:
        """A Gear layer's file: its content lies elsewhere."""
        assert entry.gear is not None
        digest, size_bytes = entry.gear
        if entry.stored_bytes:
            raise InvalidInput(f"tar entry {shown(entry.name)}: it names a content and holds one")
        if not size_bytes:
            return None
        entry.size_bytes = size_bytes
        self._claims.add(digest, size_bytes)
        found = self._store.find(digest)
        if found is not ObjectState.WHOLE and self._complete:
            self._complete = False
            self._writer.pause()
            forbid(self._root)
            found = self._store.find(digest)
        if found is ObjectState.UNFINISHED:
            remove_unfinished(self._store, digest, self._staging_fd)
        return digest

    def _streamed(self, entry: TarEntry) -> bytes:
        """A content that is large or sparse goes piece by piece to a file that has no name yet."""
        self._writer.pause()  # hashing a long hole takes its time
        self._refuse_without_space(entry)
        hasher = hashlib.sha256()
        segments = entry.sparse if entry.sparse is not None else ((0, entry.size_bytes),)
        with self._own_store.create(self._staging_fd) as pending:
            for piece in expanded(self._reader.chunks(), entry.sparse, entry.size_bytes):
                if isinstance(piece, int):
                    for hole in zeros(piece):
                        hasher.update(hole)
                    pending.write_zeros(piece)
                else:
                    hasher.update(piece)
                    pending.write(piece)
            digest = hasher.digest()
            self._own_claims.add(digest, entry.size_bytes)
            if not self._own_store.has(digest):
                self._writer.announce(digest)
                if pending.publish(digest):
                    self._writer.note_stored(digest, entry.size_bytes)
        for offset, length in segments:
            self._log.slice(digest, offset, length)
        return digest

    def _refuse_without_space(self, entry: TarEntry) -> None:
        room_bytes = free_bytes(self._staging_fd)
        if entry.size_bytes > room_bytes:
            raise ResourceExhausted(
                f"tar entry {shown(entry.name)}: {entry.size_bytes} bytes, "
                f"and {room_bytes} are free in {self._store.cache}"
            )
