"""Storing an import's contents beside the process that reads and hashes them."""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import socket
import struct
import threading
from types import TracebackType
from typing import NoReturn

from gearworkers.cas.inplace import InPlaceLock, put_in_place
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError, from_os_error
from gearworkers.util import syscalls as kernel
from gearworkers.util.process import end_with_parent

MAX_CONTENT_BYTES = 4 << 20
"""A larger content is not to be put, but stored piece by piece by the caller."""

_ALONE_BYTES = 8 << 20
_ALONE_CONTENTS = 1000
_RING_BYTES = 4 * MAX_CONTENT_BYTES
_BATCH_CONTENTS = 128
_BATCH_BYTES = 1 << 20
_MESSAGE_BYTES = 1 << 16
_WRITEBACK_BYTES = 64 << 20

_PLACED = struct.Struct("<QI32s")  # position in all that went through the ring, length, digest
_TAKEN = struct.Struct("<cQ")
_TOTALS = struct.Struct("<cQQ")
_BATCH, _FLUSH = b"B", b"F"
_ACK, _DONE, _ERROR = b"A", b"D", b"E"


class ContentWriter:
    """Takes contents with their digest and stores those that are new; a context manager, for one thread.

    The first few are stored by this process. Once there are many, a forked one does it, which gets them through
    shared memory: a thread would wait for the interpreter's lock at each of its system calls. What was put is stored
    when `flush` has returned. The caller calls `pause` before it waits for anything.

    Attributes:
        new_objects: How many were new; right after `flush`.
        new_bytes: Their bytes.

    Crash: the kernel ends the other process with this one; see `inplace` and `store` for what a write leaves.
    """

    def __init__(self, store: ObjectStore, staging_fd: int, push_queue: PushQueue | None, bursts: InPlaceLock) -> None:
        self._store = store
        self._staging_fd = staging_fd
        self._push_queue = push_queue
        self._bursts = bursts
        self._is_private = False
        self._beside: _WriterProcess | None = None
        self._alone = self._alone_bytes = 0
        self.new_objects = 0
        self.new_bytes = 0

    def __enter__(self) -> ContentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bursts.close()
        if self._beside is not None:
            self._beside.close()

    def put(self, digest: bytes, data: memoryview) -> None:
        """Store *data*, whose SHA-256 the caller has computed; copied before the call returns.

        Args:
            digest: SHA-256 of data.
            data: At most MAX_CONTENT_BYTES.

        Raises:
            GearError: Of this or an earlier content.
        """
        if self._beside is not None:
            self._beside.put(digest, data)
            return
        self._store_one(digest, data)
        self._alone += 1
        self._alone_bytes += len(data)
        if self._alone >= _ALONE_CONTENTS or self._alone_bytes >= _ALONE_BYTES:
            self._bursts.close()  # else its lock would be that of both processes
            self._beside = _WriterProcess(self)

    def pause(self) -> None:
        """Keep nobody waiting who wants to forbid storing in place; cheap."""
        self._bursts.end()

    def push_nothing(self) -> None:
        """What comes is of a Gear layer: the remote has what it names, and each node gets the rest with the layer."""
        self._push_queue = None

    def keep_private(self, store: ObjectStore) -> None:
        """What comes goes to *store*, which nobody sees yet, and is never pushed; nothing has been put before."""
        self._store = store
        self._push_queue = None
        self._is_private = True

    def announce(self, digest: bytes) -> None:
        """The caller is about to store this object, which is not here, otherwise."""
        if self._push_queue is not None:
            self._push_queue.announce(digest)

    def stored(self, digest: bytes, size_bytes: int) -> None:
        """Note a new object that the caller has stored otherwise."""
        self.new_objects += 1
        self.new_bytes += size_bytes
        if self._push_queue is not None:
            self._push_queue.add(digest)

    def flush(self) -> None:
        """Wait until all that was put is stored.

        Raises:
            GearError: Of any of them.
        """
        if self._beside is not None:
            new_objects, new_bytes = self._beside.flush()
            self.new_objects += new_objects
            self.new_bytes += new_bytes

    def _store_one(self, digest: bytes, data: memoryview) -> None:
        store, staging_fd = self._store, self._staging_fd
        if self._push_queue is not None and not store.has(digest):
            self._push_queue.announce(digest)
        if self._is_private or self._bursts.begin():
            new = put_in_place(store, digest, data, staging_fd)
        else:
            new = not store.has(digest) and store.put(digest, data, staging_fd)
        if new:
            self.stored(digest, len(data))

    # -- in the other process

    def _serve(self, line: socket.socket, ring: memoryview) -> None:
        """Store what is told until the line ends."""
        self.new_objects = self.new_bytes = 0
        writeback = _Writeback(self._staging_fd)
        while message := line.recv(_MESSAGE_BYTES):
            if message[:1] == _FLUSH:
                writeback.check()
                line.send(_TOTALS.pack(_DONE, self.new_objects, self.new_bytes))
                self.new_objects = self.new_bytes = 0
                continue
            end = 0
            for position, length, digest in _PLACED.iter_unpack(message[1:]):
                at = position % _RING_BYTES
                self._store_one(digest, ring[at : at + length])
                end = position + length
            self._bursts.end()
            writeback.advance(end)
            line.send(_TAKEN.pack(_ACK, end))


class _Writeback:
    """Has what was stored so far written to the disk while more comes, so that a layer's own syncfs is short."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._thread: threading.Thread | None = None
        self._begun_at = 0
        self._error: OSError | None = None

    def advance(self, stored_bytes: int) -> None:
        """So many bytes are stored in all; returns at once.

        Raises:
            GearError: The disk did not take what was stored before.
        """
        if stored_bytes - self._begun_at < _WRITEBACK_BYTES or (self._thread is not None and self._thread.is_alive()):
            return
        self.check()
        self._begun_at = stored_bytes
        self._thread = threading.Thread(target=self._sync, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Wait for what was begun. An error of the disk is told once, so it must not get lost here."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise from_os_error(self._error, "write objects to the disk") from self._error

    def _sync(self) -> None:
        try:
            kernel.syncfs(self._fd)
        except OSError as exc:
            self._error = exc


class _WriterProcess:
    """The process that stores, and the shared ring by which it gets the contents."""

    def __init__(self, writer: ContentWriter) -> None:
        self._ring = mmap.mmap(-1, _RING_BYTES)
        self._put = 0  # bytes that went into the ring, what was left free at its end included
        self._taken = 0  # of them, bytes that are stored
        self._batch = bytearray(_BATCH)
        self._batch_start = 0
        self._line, line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent_pid = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            _run(writer, line, self._ring, writer._staging_fd, parent_pid)
        line.close()

    def put(self, digest: bytes, data: memoryview) -> None:
        """Copy *data* into the ring; waits for room."""
        length = len(data)
        at = self._put % _RING_BYTES
        if at + length > _RING_BYTES:
            self._put += _RING_BYTES - at
            at = 0
        if not self._has_room(length):
            self._hand_over()
        while not self._has_room(length):
            self._hear()
        self._ring[at : at + length] = data
        self._batch += _PLACED.pack(self._put, length, digest)
        self._put += length
        if len(self._batch) >= _BATCH_CONTENTS * _PLACED.size or self._put - self._batch_start >= _BATCH_BYTES:
            self._hand_over()

    def flush(self) -> tuple[int, int]:
        """Wait until all is stored; how many were new, and their bytes, since the last time."""
        self._hand_over()
        self._send(_FLUSH)
        while (message := self._hear())[:1] != _DONE:
            pass
        _, new_objects, new_bytes = _TOTALS.unpack(message)
        return new_objects, new_bytes

    def close(self) -> None:
        """End the process after the batches it has got."""
        self._line.close()
        os.waitpid(self._pid, 0)
        self._ring.close()

    def _has_room(self, length: int) -> bool:
        return self._put + length - self._taken <= _RING_BYTES

    def _hand_over(self) -> None:
        if len(self._batch) > len(_BATCH):
            self._send(self._batch)
            self._batch = bytearray(_BATCH)
            self._batch_start = self._put
            while self._hear(socket.MSG_DONTWAIT):  # so that neither side ever waits to be heard by the other
                pass

    def _send(self, message: bytes | bytearray) -> None:
        try:
            self._line.send(message)
        except OSError:
            while True:  # it has ended: what it said last is why
                self._hear()

    def _hear(self, flags: int = 0) -> bytes:
        """The next message, an error raised; empty if there is none and the flags say not to wait."""
        try:
            message = self._line.recv(_MESSAGE_BYTES, flags)
        except BlockingIOError:
            return b""
        except ConnectionResetError:  # told ahead of what it said last
            message = self._line.recv(_MESSAGE_BYTES)
        if message[:1] == _ACK:
            _, self._taken = _TAKEN.unpack(message)
        elif message[:1] == _ERROR:
            raise pickle.loads(message[1:])
        elif not message:
            raise GearError("the process that stores an import's contents was killed; is there too little memory?")
        return message


def _run(writer: ContentWriter, line: socket.socket, ring: mmap.mmap, staging_fd: int, parent_pid: int) -> NoReturn:
    """All that the forked process does. It holds none of the caller's connections: their end would not be seen."""
    try:
        end_with_parent(parent_pid, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        kept = sorted((line.fileno(), staging_fd))
        for low, high in zip((2, *kept), (*kept, os.sysconf("SC_OPEN_MAX")), strict=True):
            os.closerange(low + 1, high)
        writer._serve(line, memoryview(ring))
    except GearError as exc:
        line.send(_ERROR + pickle.dumps(exc))
    except BaseException as exc:
        line.send(_ERROR + pickle.dumps(GearError(f"store contents: {type(exc).__name__}: {exc}")))
    finally:
        os._exit(0)
