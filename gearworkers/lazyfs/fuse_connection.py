"""A mounted FUSE connection: reads requests and sends answers, from any thread.

Requests that were read and not answered yet are pending. Only the kernel and this process know them. When the process
dies, the kernel keeps them, and the successor asks for them again (`FuseConnection.resume`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from gearworkers.errors import from_os_error
from gearworkers.lazyfs import fuse_protocol
from gearworkers.lazyfs.fuse_protocol import FuseRequest, Op
from gearworkers.util import syscalls

DEVICE = Path("/dev/fuse")
_UNMOUNTED = (errno.ENODEV, errno.ECONNABORTED)
_SIGKILL_BIT = 1 << 8


class FuseReply:
    """The answer to one request, to be sent once."""

    __slots__ = ("_connection", "_unique", "pid")

    def __init__(self, connection: FuseConnection, unique: int, pid: int) -> None:
        self._connection = connection
        self._unique = unique
        self.pid = pid

    def send(self, body: bytes | memoryview = b"") -> bool:
        """Answer with success, unless an answer was sent; return whether the kernel accepted this answer."""
        return self._connection._answer(self._unique, body, 0)

    def fail(self, error: int) -> None:
        """Answer with an errno, unless an answer was sent."""
        self._connection._answer(self._unique, b"", error)


class FuseConnection:
    """An open /dev/fuse that is mounted; `serve` may run in several threads at once."""

    def __init__(self, fuse_fd: int, handle: Callable[[FuseRequest, FuseReply], None]) -> None:
        self.fuse_fd = fuse_fd
        self._handle = handle
        self._pending: dict[int, FuseReply] = {}
        self._interrupted: set[int] = set()

    def resume(self) -> None:
        """Take over from a dead server: the kernel sends its pending requests again.

        Raises:
            GearError: The kernel is older than 6.9; the pending requests are never answered.
        """
        try:
            os.write(self.fuse_fd, fuse_protocol.resend())
        except OSError as exc:
            raise from_os_error(exc, "ask the kernel for the unanswered requests") from exc

    def serve(self) -> None:
        """Handle requests until the file system is unmounted."""
        buffer = bytearray(fuse_protocol.REQUEST_BYTES)
        view = memoryview(buffer)
        while True:
            try:
                length = os.readv(self.fuse_fd, [buffer])
            except OSError as exc:
                if exc.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # the kernel withdrew the request
                if exc.errno in _UNMOUNTED:
                    return
                raise from_os_error(exc, "read requests of the lazy file system") from exc
            self.dispatch(fuse_protocol.parse(view[:length]))

    def fail_killed(self) -> None:
        """Answer EINTR to pending requests of killed threads, so that a container can stop while it waits.

        Other signals do not interrupt an open or a read of a regular file.
        """
        for unique in list(self._interrupted):
            reply = self._pending.get(unique)
            if reply is None:
                self._interrupted.discard(unique)
            elif _is_dying(reply.pid):
                reply.fail(errno.EINTR)

    def invalidate(self, parent: int, name: bytes) -> None:
        """Make the kernel forget the entry of this name, if it has one.

        Blocks until all pending lookups in *parent* are answered.
        """
        try:
            os.write(self.fuse_fd, fuse_protocol.invalidate_entry(parent, name))
        except OSError as exc:
            if exc.errno != errno.ENOENT and exc.errno not in _UNMOUNTED:
                raise from_os_error(exc, "make the kernel forget an object") from exc

    @property
    def pending(self) -> int:
        """Number of requests without an answer."""
        return len(self._pending)

    def dispatch(self, request: FuseRequest) -> None:
        """Handle one request from the kernel."""
        if request.op == Op.INTERRUPT:
            self._interrupt(request)
            return
        reply = FuseReply(self, request.unique, request.pid)
        if request.op in (Op.FORGET, Op.BATCH_FORGET):
            self._handle(request, reply)  # needs no answer
            return
        self._pending[request.unique] = reply
        if request.op == Op.INIT:
            body, _ = fuse_protocol.init_body(request.body)
            reply.send(body)
            return
        try:
            self._handle(request, reply)
        except BaseException:
            reply.fail(errno.EIO)
            raise

    def _interrupt(self, request: FuseRequest) -> None:
        """Note that the caller of a pending request got a signal.

        Source: Linux Documentation/filesystems/fuse.rst, "Interrupting filesystem operations".
        """
        unique = fuse_protocol.interrupted(request.body)
        if unique not in self._pending:
            # Another thread is about to handle the request, or has answered it. The kernel sends the interrupt again
            # if the request still has no answer.
            self._write(request.unique, b"", errno.EAGAIN)
            return
        self._interrupted.add(unique)
        self.fail_killed()

    def _answer(self, unique: int, body: bytes | memoryview, error: int) -> bool:
        if self._pending.pop(unique, None) is None:
            return False
        self._interrupted.discard(unique)
        return self._write(unique, body, error)

    def _write(self, unique: int, body: bytes | memoryview, error: int) -> bool:
        """Return whether the kernel still waited for the answer."""
        try:
            os.writev(self.fuse_fd, (fuse_protocol.answer(unique, len(body), error), body))
        except OSError as exc:
            if exc.errno != errno.ENOENT and exc.errno not in _UNMOUNTED:
                raise from_os_error(exc, "answer a request of the lazy file system") from exc
            return False
        return True


def mount(target: Path) -> int:
    """Mount a new, read-only FUSE file system at the directory *target*.

    Returns:
        The descriptor of its connection. The file system lives while any process has it open.

    Raises:
        GearError: The kernel refused the mount.
    """
    fuse_fd, mount_fd = create(DEVICE)
    try:
        syscalls.move_mount(mount_fd, target)
    except OSError as exc:
        os.close(fuse_fd)
        raise from_os_error(exc, f"mount the lazy file system at {target} ({exc.strerror})") from exc
    finally:
        os.close(mount_fd)
    return fuse_fd


def create(device: Path) -> tuple[int, int]:
    """Create a file system that is mounted nowhere yet.

    Returns:
        The descriptors of its connection and of its detached mount.

    Raises:
        GearError: The kernel refused it.
    """
    fuse_fd = -1
    try:
        fuse_fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        context_fd = syscalls.fsopen("fuse")
        try:
            _configure(context_fd, fuse_fd)
            return fuse_fd, syscalls.fsmount(context_fd, syscalls.MOUNT_ATTR_RDONLY)
        finally:
            os.close(context_fd)
    except OSError as exc:
        if fuse_fd >= 0:
            os.close(fuse_fd)
        raise from_os_error(exc, f"create a lazy file system with {device} ({exc.strerror})") from exc


def _configure(context_fd: int, fuse_fd: int) -> None:
    syscalls.fsconfig_string(context_fd, "source", b"gear-lazy")
    for key, value in (("fd", b"%d" % fuse_fd), ("rootmode", b"40000"), ("user_id", b"0"), ("group_id", b"0")):
        syscalls.fsconfig_string(context_fd, key, value)
    for flag in ("ro", "allow_other", "default_permissions"):
        syscalls.fsconfig_flag(context_fd, flag)
    syscalls.fsconfig_create(context_fd)


def _is_dying(pid: int) -> bool:
    """Return whether a SIGKILL is pending for the thread, or the thread has exited."""
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return pid != 0
    pending = 0
    for line in status.splitlines():
        key, _, value = line.partition(b":")
        if key in (b"SigPnd", b"ShdPnd"):
            pending |= int(value, 16)
    return bool(pending & _SIGKILL_BIT)
