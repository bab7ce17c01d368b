"""A mounted FUSE connection: requests in, answers out, from any thread.

A *waiter* is a request that was read and not answered yet. Nobody but the kernel and the waiters themselves knows
them: when the process dies, the kernel keeps them, and the successor asks for them again (`Connection.resume`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from gearworkers.errors import from_os_error
from gearworkers.lazyfs import fuse_protocol
from gearworkers.lazyfs.fuse_protocol import Op, Request
from gearworkers.util import syscalls

DEVICE = Path("/dev/fuse")
_GONE = (errno.ENODEV, errno.ECONNABORTED)
_SIGKILL_BIT = 1 << 8


class Waiter:
    """One request's answer, to be given once."""

    __slots__ = ("_connection", "_unique", "pid")

    def __init__(self, connection: Connection, unique: int, pid: int) -> None:
        self._connection = connection
        self._unique = unique
        self.pid = pid

    def give(self, body: bytes | memoryview = b"") -> bool:
        """Answer with success; nothing happens if an answer was given. Whether the kernel has taken this one."""
        return self._connection._answer(self._unique, body, 0)

    def fail(self, error: int) -> None:
        """Answer with an errno; nothing happens if an answer was given."""
        self._connection._answer(self._unique, b"", error)


class Connection:
    """An open /dev/fuse that is mounted; `serve` may run in several threads at once."""

    def __init__(self, fuse_fd: int, handle: Callable[[Request, Waiter], None]) -> None:
        self.fuse_fd = fuse_fd
        self._handle = handle
        self._waiters: dict[int, Waiter] = {}
        self._interrupted: set[int] = set()

    def resume(self) -> None:
        """Take over from a server that died: what it had read and not answered comes again.

        Raises:
            GearError: The kernel is older than 6.9; what the dead server had read is never answered.
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
                    continue  # the request was taken back
                if exc.errno in _GONE:
                    return
                raise from_os_error(exc, "read requests of the lazy file system") from exc
            self._dispatch(fuse_protocol.parse(view[:length]))

    def give_up_killed(self) -> None:
        """Answer EINTR to the waiters whose thread is being killed, so that a container can stop while it waits.

        Other signals do not break off an open or a read of a regular file.
        """
        for unique in list(self._interrupted):
            waiter = self._waiters.get(unique)
            if waiter is None:
                self._interrupted.discard(unique)
            elif _is_dying(waiter.pid):
                waiter.fail(errno.EINTR)

    def invalidate(self, parent: int, name: bytes) -> None:
        """Have the kernel forget what it found of this name; if it does not know it, that is fine.

        It waits for the answers to the look-ups in *parent* that are under way.
        """
        try:
            os.write(self.fuse_fd, fuse_protocol.invalidate_entry(parent, name))
        except OSError as exc:
            if exc.errno != errno.ENOENT and exc.errno not in _GONE:
                raise from_os_error(exc, "have the kernel forget an object") from exc

    @property
    def waiting(self) -> int:
        """How many requests have no answer yet."""
        return len(self._waiters)

    def _dispatch(self, request: Request) -> None:
        if request.op == Op.INTERRUPT:
            self._interrupt(request)
            return
        waiter = Waiter(self, request.unique, request.pid)
        if request.op in (Op.FORGET, Op.BATCH_FORGET):
            self._handle(request, waiter)  # wants no answer
            return
        self._waiters[request.unique] = waiter
        if request.op == Op.INIT:
            body, _ = fuse_protocol.init_body(request.body)
            waiter.give(body)
            return
        try:
            self._handle(request, waiter)
        except BaseException:
            waiter.fail(errno.EIO)
            raise

    def _interrupt(self, request: Request) -> None:
        """Source: Linux Documentation/filesystems/fuse.rst, "Interrupting filesystem operations"."""
        unique = fuse_protocol.interrupted(request.body)
        if unique not in self._waiters:
            # Another thread is about to handle it, or it was answered: the kernel knows, and asks again or not.
            self._write(request.unique, b"", errno.EAGAIN)
            return
        self._interrupted.add(unique)
        self.give_up_killed()

    def _answer(self, unique: int, body: bytes | memoryview, error: int) -> bool:
        if self._waiters.pop(unique, None) is None:
            return False
        self._interrupted.discard(unique)
        return self._write(unique, body, error)

    def _write(self, unique: int, body: bytes | memoryview, error: int) -> bool:
        """Whether the kernel still waited for it."""
        try:
            os.writev(self.fuse_fd, (fuse_protocol.answer(unique, len(body), error), body))
        except OSError as exc:
            if exc.errno != errno.ENOENT and exc.errno not in _GONE:
                raise from_os_error(exc, "answer a request of the lazy file system") from exc
            return False
        return True


def mount(target: Path) -> int:
    """Mount a new, read-only FUSE file system at the directory *target*.

    Returns:
        The descriptor of its connection. The file system answers as long as it is open in some process.

    Raises:
        GearError: What the kernel refused.
    """
    fuse_fd, mount_fd = begin(DEVICE)
    try:
        syscalls.move_mount(mount_fd, target)
    except OSError as exc:
        os.close(fuse_fd)
        raise from_os_error(exc, f"mount the lazy file system at {target} ({exc.strerror})") from exc
    finally:
        os.close(mount_fd)
    return fuse_fd


def begin(device: Path) -> tuple[int, int]:
    """A new file system that is mounted nowhere yet.

    Returns:
        The descriptors of its connection and of its detached mount.

    Raises:
        GearError: What the kernel refused.
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
        raise from_os_error(exc, f"begin a lazy file system with {device} ({exc.strerror})") from exc


def _configure(context_fd: int, fuse_fd: int) -> None:
    syscalls.fsconfig_string(context_fd, "source", b"gear-lazy")
    for key, value in (("fd", b"%d" % fuse_fd), ("rootmode", b"40000"), ("user_id", b"0"), ("group_id", b"0")):
        syscalls.fsconfig_string(context_fd, key, value)
    for flag in ("ro", "allow_other", "default_permissions"):
        syscalls.fsconfig_flag(context_fd, flag)
    syscalls.fsconfig_create(context_fd)


def _is_dying(pid: int) -> bool:
    """Whether a SIGKILL waits for the thread, or it is gone."""
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
