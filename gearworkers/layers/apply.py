"""ApplyDiff: turn a tar stream into a layer's index, objects, refs and exact stream."""

from __future__ import annotations

import gc
import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gearworkers.cas.inplace import InPlaceLock, forbid_in_place, remove_unfinished
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.refs import OBJECTS_FILE, RefWriter, read_refs
from gearworkers.cas.store import ObjectStore
from gearworkers.cas.writer import ContentWriter
from gearworkers.cas.writer_process import MAX_CONTENT_BYTES
from gearworkers.errors import InvalidInput, ResourceExhausted
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.index.inode_numbers import INDEX_FILE, InodeNumbers
from gearworkers.layers.index.tree import LayerTree
from gearworkers.tar.entry import REG, TarEntry, shown
from gearworkers.tar.private_marker import MARKER, is_marker, reject_hidden_marker, reject_late_marker
from gearworkers.tar.reader import Readable, TarReader
from gearworkers.tar.sparse import expanded, zeros
from gearworkers.tar.tar_split import TarSplitWriter
from gearworkers.util.fs import free_bytes, opened_directory

STREAM_FILE = "stream.zst"
PRIVATE = "private"
"""The directory of a private layer's objects in the build directory."""
PRIVATE_FILE = "private-objects"
"""The list of a private layer's objects, in the format of `objects`."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The result of applying one tar."""

    size_bytes: int
    """The layer's size as overlay2 counts it: st_size of all except directories, each inode once."""
    objects: int
    """The number of distinct objects that the layer refers to."""
    object_bytes: int
    new_objects: int
    """The number of objects that this import stored."""
    new_bytes: int
    complete: bool
    """Whether all objects are in the store; False for a Gear layer with objects that are not fetched yet."""
    private: bool
    """Whether the contents of the tar are in the build directory's `private`."""
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

    The contents of a private layer go to `private/` in *build*, and their list is `private-objects`. In that case
    `objects` lists only objects that the tar names without containing them.

    Args:
        source: The tar; read to its end.
        build: A directory on the store's file system that only this call uses.
        store: Receives the contents.
        ids: Maps the tar's owners to the host's.
        push_queue: Receives new objects; None if there is no remote.
        root: GEAR_ROOT; its `incomplete-layers` may forbid storing in place (`cas.inplace`).
        inode_numbers: Provides the inode numbers of the index.
        private: Whether the layer is private. A layer is also private if the tar has the marker (tar.private_marker).

    Raises:
        InvalidInput, IntegrityError: The tar is malformed, hostile or ends early; the message names the entry.
        ResourceExhausted: No space or inodes are left, or the tar has too many files.

    Crash: leaves *build*, and unreferenced objects that the garbage collector removes.
    """
    with ExitStack() as stack:
        staging_fd = stack.enter_context(opened_directory(build))
        stream_file = stack.enter_context(open(build / STREAM_FILE, "xb"))
        log = TarSplitWriter(stream_file)
        index = LayerTree(ids, time_ns=time.time_ns())
        writer = stack.enter_context(ContentWriter(store, staging_fd, push_queue, InPlaceLock(root)))
        reader = TarReader(_PausingSource(source, writer), log, buffer_bytes=MAX_CONTENT_BYTES)
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
    """Disable Python's garbage collector, which would walk a tree of a million inodes repeatedly and find no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _PausingSource:
    """Pauses the writer before each read of the tar, since the read may wait."""

    def __init__(self, source: Readable, writer: ContentWriter) -> None:
        self._source = source
        self._writer = writer

    def readinto(self, buffer: memoryview, /) -> int | None:
        self._writer.pause()
        return self._source.readinto(buffer)


class _ContentImporter:
    """Imports the contents of a tar: hash, write a ref, store, log."""

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
        self._refs = self._own_refs = RefWriter(build)
        self._writer = writer
        self._build = build
        self._staging_fd = staging_fd
        self._root = root
        self._is_complete = True
        """False from the first missing object on."""

    @property
    def _is_private(self) -> bool:
        """Whether the contents of the tar are private objects."""
        return self._own_refs is not self._refs

    def keep_private(self) -> None:
        """Store the contents of the tar as private objects. Call before the first content."""
        self._own_store = ObjectStore(self._build / PRIVATE)
        self._own_store.prepare()
        self._own_refs = RefWriter(self._build, PRIVATE_FILE)
        self._writer.use_private_store(self._own_store)

    def close(self) -> None:
        """Close the lists of refs."""
        self._refs.close()
        if self._is_private:
            self._own_refs.close()

    def finish(self, size_bytes: int) -> Applied:
        """Wait until all contents are stored and listed; return the result for a layer of *size_bytes*."""
        objects, object_bytes = self._refs.seal()
        private_objects, private_bytes = self._own_refs.seal() if self._is_private else (0, 0)
        self._writer.flush()
        if not self._is_complete:
            remove_unfinished(
                self._store, (digest for digest, _ in read_refs(self._build / OBJECTS_FILE)), self._staging_fd
            )
        if self._is_private:
            self._own_store.drop_empty_shards()
        return Applied(
            size_bytes,
            objects,
            object_bytes,
            self._writer.new_objects,
            self._writer.new_bytes,
            self._is_complete,
            self._is_private,
            private_objects,
            private_bytes,
        )

    def fill(self, index: LayerTree) -> None:
        """Read the whole tar into *index*."""
        reader, add = self._reader, index.add
        entry = reader.next()
        if reader.guarded:
            self._writer.disable_push()
        while entry is not None:
            if MARKER in entry.name and not self._is_private and is_marker(entry.name):
                self._make_private(entry)
            add(entry, self._digest(entry) if entry.type == REG else None)
            entry = reader.next()
        reader.finish()
        if not self._is_private and index.has_at_top(MARKER):
            reject_hidden_marker()

    def _make_private(self, marker: TarEntry) -> None:
        if self._refs:
            reject_late_marker(marker)
        self.keep_private()

    def _digest(self, entry: TarEntry) -> bytes | None:
        if entry.gear is not None:
            return self._referred(entry)
        if not entry.size_bytes:
            return None
        payload = self._reader.payload() if entry.sparse is None else None
        if payload is None:
            return self._streamed(entry)
        digest = hashlib.sha256(payload).digest()
        self._own_refs.add(digest, len(payload))
        self._writer.put(digest, payload)
        self._log.content(digest, len(payload))
        return digest

    def _referred(self, entry: TarEntry) -> bytes | None:
        """Add a ref to the object that a Gear layer's entry names; return its digest."""
        assert entry.gear is not None
        digest, size_bytes = entry.gear
        if entry.stored_bytes:
            raise InvalidInput(f"tar entry {shown(entry.name)}: it both names a content and contains one")
        if not size_bytes:
            return None
        entry.size_bytes = size_bytes
        self._refs.add(digest, size_bytes)
        if self._is_complete and not self._store.has(digest):
            self._writer.pause()
            forbid_in_place(self._root)
            self._is_complete = False
        return digest

    def _streamed(self, entry: TarEntry) -> bytes:
        """Store a large or sparse content piece by piece; return its digest."""
        self._writer.pause()  # hashing a long hole takes long
        self._require_space(entry)
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
            self._own_refs.add(digest, entry.size_bytes)
            if not self._own_store.has(digest):
                self._writer.announce(digest)
                if pending.publish(digest):
                    self._writer.note_stored(digest, entry.size_bytes)
        for offset, length in segments:
            self._log.slice(digest, offset, length)
        return digest

    def _require_space(self, entry: TarEntry) -> None:
        available_bytes = free_bytes(self._staging_fd)
        if entry.size_bytes > available_bytes:
            raise ResourceExhausted(
                f"tar entry {shown(entry.name)}: it has {entry.size_bytes} bytes, "
                f"but {available_bytes} are free in {self._store.cache}"
            )
