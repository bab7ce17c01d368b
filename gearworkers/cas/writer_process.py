"""Store an import's contents in a second process, beside the process that reads the tar.

Protocol: the parent copies contents into a ring in shared memory, and sends batches of their positions over a socket of
type SOCK_SEQPACKET. The child acknowledges each batch, so that the parent can reuse the space. After a flush the child
sends totals. If the child fails, its last message is the error.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import threading
from typing import NoReturn, Protocol

import msgspec

from gearworkers.errors import GearError, by_name, from_os_error
from gearworkers.util import syscalls as kernel
from gearworkers.util.process import end_with_parent

MAX_CONTENT_BYTES = 4 << 20
"""The largest content to `put`. The caller stores larger contents itself, piece by piece."""
BATCH_CONTENTS = 128
BATCH_BYTES = 1 << 20
"""A batch ends with this number of contents or bytes."""
WRITEBACK_BYTES = 64 << 20
"""After this number of bytes, the stored objects are synced while more contents arrive."""

_RING_BYTES = 4 * MAX_CONTENT_BYTES
_MESSAGE_BYTES = 1 << 16
_MAX_ERROR_CHARS = 8000

_ENTRY = struct.Struct("<QI32s")  # position in the sequence of all bytes put into the ring, length, digest
_ACKNOWLEDGEMENT = struct.Struct("<cQ")
_TOTALS = struct.Struct("<cQQ")
_BATCH, _FLUSH = b"B", b"F"
_ACK, _DONE, _ERROR = b"A", b"D", b"E"


class LocalWriter(Protocol):
    """Stores contents in the process that calls it: the second process, after the fork."""

    def store_now(self, digest: bytes, data: memoryview, /) -> None:
        """Store one content."""

    def pause(self) -> None:
        """Prepare to wait for the next batch."""

    def take_counts(self) -> tuple[int, int]:
        """Return (number of new objects, sum of their sizes in bytes) since the last call."""


class WriterProcess:
    """The parent's side: the process and the ring."""

    def __init__(self, writer: LocalWriter, staging_fd: int) -> None:
        """Fork the process.

        Args:
            writer: Stores contents in the child.
            staging_fd: The only descriptor that the child keeps; its file system is synced.
        """
        self._ring = mmap.mmap(-1, _RING_BYTES)
        self._put_bytes = 0  # total of bytes put into the ring, including the gaps before wrap-arounds
        self._free_from = 0  # total of bytes that the child has stored
        self._batch = bytearray(_BATCH)
        self._batch_start = 0
        self._socket, child_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent_pid = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            _run_child(writer, child_socket, self._ring, staging_fd, parent_pid)
        child_socket.close()

    def put(self, digest: bytes, data: memoryview) -> None:
        """Copy *data* into the ring; wait until there is space.

        Raises:
            GearError: An earlier content cannot be stored, or the process was killed.
        """
        length = len(data)
        at = self._put_bytes % _RING_BYTES
        if at + length > _RING_BYTES:
            self._put_bytes += _RING_BYTES - at
            at = 0
        if not self._has_space(length):
            self._send_batch()
        while not self._has_space(length):
            self._receive()
        self._ring[at : at + length] = data
        self._batch += _ENTRY.pack(self._put_bytes, length, digest)
        self._put_bytes += length
        if len(self._batch) >= BATCH_CONTENTS * _ENTRY.size or self._put_bytes - self._batch_start >= BATCH_BYTES:
            self._send_batch()

    def flush(self) -> tuple[int, int]:
        """Wait until all contents are stored; return (new objects, their bytes) since the last flush.

        Raises:
            GearError: A content cannot be stored, or the process was killed.
        """
        self._send_batch()
        self._send(_FLUSH)
        while (message := self._receive())[:1] != _DONE:
            pass
        _, new_objects, new_bytes = _TOTALS.unpack(message)
        return new_objects, new_bytes

    def close(self) -> None:
        """End the process after the batches that it has received."""
        self._socket.close()
        os.waitpid(self._pid, 0)
        self._ring.close()

    def _has_space(self, length: int) -> bool:
        return self._put_bytes + length - self._free_from <= _RING_BYTES

    def _send_batch(self) -> None:
        if len(self._batch) > len(_BATCH):
            self._send(self._batch)
            self._batch = bytearray(_BATCH)
            self._batch_start = self._put_bytes
            while self._receive(socket.MSG_DONTWAIT):  # read acknowledgements, so that neither side blocks in send
                pass

    def _send(self, message: bytes | bytearray) -> None:
        try:
            self._socket.send(message)
        except OSError:
            while True:  # the child has ended; its last message raises the reason
                self._receive()

    def _receive(self, flags: int = 0) -> bytes:
        """Return the next message; empty if none has arrived and *flags* contains MSG_DONTWAIT.

        Raises:
            GearError: The message is an error, or the process was killed.
        """
        try:
            message = self._socket.recv(_MESSAGE_BYTES, flags)
        except BlockingIOError:
            return b""
        except ConnectionResetError:  # reported before the child's last message
            message = self._socket.recv(_MESSAGE_BYTES)
        if message[:1] == _ACK:
            _, self._free_from = _ACKNOWLEDGEMENT.unpack(message)
        elif message[:1] == _ERROR:
            raise _decode_error(message[1:])
        elif not message:
            raise GearError("the process that stores an import's contents was killed; is there too little memory?")
        return message


def _run_child(
    writer: LocalWriter, parent: socket.socket, ring: mmap.mmap, staging_fd: int, parent_pid: int
) -> NoReturn:
    """Run the child. Close all inherited descriptors: an open copy of a connection would hide the connection's end."""
    try:
        end_with_parent(parent_pid, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        kept = sorted((parent.fileno(), staging_fd))
        for low, high in zip((2, *kept), (*kept, os.sysconf("SC_OPEN_MAX")), strict=True):
            os.closerange(low + 1, high)
        _serve(writer, parent, memoryview(ring), staging_fd)
    except GearError as exc:
        parent.send(_ERROR + _encode_error(exc))
    except BaseException as exc:
        parent.send(_ERROR + _encode_error(GearError(f"store contents: {type(exc).__name__}: {exc}")))
    finally:
        os._exit(0)


def _serve(writer: LocalWriter, parent: socket.socket, ring: memoryview, staging_fd: int) -> None:
    """Store batches until the parent closes the socket."""
    writer.take_counts()  # the parent has counted its own
    writeback = _Writeback(staging_fd)
    while message := parent.recv(_MESSAGE_BYTES):
        if message[:1] == _FLUSH:
            writeback.check()
            parent.send(_TOTALS.pack(_DONE, *writer.take_counts()))
            continue
        end = 0
        for position, length, digest in _ENTRY.iter_unpack(message[1:]):
            at = position % _RING_BYTES
            writer.store_now(digest, ring[at : at + length])
            end = position + length
        writer.pause()
        writeback.advance(end)
        parent.send(_ACKNOWLEDGEMENT.pack(_ACK, end))


class _Writeback:
    """Syncs stored objects in a thread while more contents arrive, so that the final syncfs of the layer is short."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._thread: threading.Thread | None = None
        self._begun_at = 0
        self._error: OSError | None = None

    def advance(self, stored_bytes: int) -> None:
        """Note the total of stored bytes; may start a sync. Returns at once.

        Raises:
            GearError: An earlier sync failed.
        """
        if stored_bytes - self._begun_at < WRITEBACK_BYTES or (self._thread is not None and self._thread.is_alive()):
            return
        self.check()
        self._begun_at = stored_bytes
        self._thread = threading.Thread(target=self._sync, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Wait for a running sync and raise its error. The kernel reports an error once, so it must not get lost."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise from_os_error(self._error, "write objects to the disk") from self._error

    def _sync(self) -> None:
        try:
            kernel.syncfs(self._fd)
        except OSError as exc:
            self._error = exc


def _encode_error(error: GearError) -> bytes:
    return msgspec.msgpack.encode((type(error).__name__, str(error)[:_MAX_ERROR_CHARS]))


def _decode_error(encoded: bytes) -> GearError:
    kind, text = msgspec.msgpack.decode(encoded, type=tuple[str, str])
    return by_name(kind)(text)
