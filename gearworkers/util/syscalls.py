"""System calls that Python's os module lacks, through ctypes.

Every function raises OSError with the errno, the attempted call as its text and, for calls with a path, the path.
For fsconfig and fsmount the text ends with the kernel's messages in the file system context.

Sources: fsopen(2), fsconfig(2), fsmount(2), move_mount(2), open_tree(2), mount_setattr(2), umount2(2), openat2(2),
renameat2(2), fanotify_init(2), fanotify_mark(2), syncfs(2), statfs(2), getdents64(2), quotactl(2).
System call numbers from 424 on are the same on all architectures.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from enum import IntEnum, IntFlag
from pathlib import Path

AT_FDCWD = -100
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
MOUNT_ATTR_RDONLY = 1
MAX_OPTION_BYTES = 255

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442
_SYS_QUOTACTL_FD = 443

_FSOPEN_CLOEXEC = 1
_FAN_CLOEXEC = 0x1
_FAN_NONBLOCK = 0x2
_FAN_MARK_ADD = 0x1
_FAN_MARK_FILESYSTEM = 0x100
_FAN_OPEN = 0x20
_FAN_OPEN_EXEC = 0x1000
_FSMOUNT_CLOEXEC = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_OPEN_TREE_CLONE = 1
_AT_EMPTY_PATH = 0x1000
_MOUNT_ATTR_IDMAP = 0x100000
_OPENAT2_RACES = 64
"""Attempts of openat2 when concurrent renames make it fail with EAGAIN."""


class _Fsconfig(IntEnum):
    SET_FLAG = 0
    SET_STRING = 1
    SET_FD = 5
    CMD_CREATE = 6


class Resolve(IntFlag):
    """RESOLVE_* of openat2(2): how the kernel may resolve a path."""

    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    IN_ROOT = 0x10


class Rename(IntFlag):
    """Flags of renameat2(2)."""

    NOREPLACE = 1
    EXCHANGE = 2


def fsopen(fs_name: str) -> int:
    """Return a new file system context of a type; the caller closes it."""
    return _syscall(f"fsopen {fs_name}", _SYS_FSOPEN, os.fsencode(fs_name), _FSOPEN_CLOEXEC)


def fsconfig_flag(context_fd: int, key: str) -> None:
    """Set an option without a value."""
    _fsconfig(context_fd, key, _Fsconfig.SET_FLAG, key, None, 0)


def fsconfig_string(context_fd: int, key: str, value: bytes) -> None:
    """Set an option to a text of at most MAX_OPTION_BYTES."""
    _fsconfig(context_fd, f"{key}={os.fsdecode(value)}", _Fsconfig.SET_STRING, key, value, 0)


def fsconfig_fd(context_fd: int, key: str, value_fd: int) -> None:
    """Set an option to an open file or directory."""
    _fsconfig(context_fd, f"{key}=<fd {value_fd}>", _Fsconfig.SET_FD, key, None, value_fd)


def fsconfig_create(context_fd: int) -> None:
    """Create the superblock of the configured file system."""
    _fsconfig(context_fd, "create", _Fsconfig.CMD_CREATE, None, None, 0)


def fsmount(context_fd: int, attributes: int = 0) -> int:
    """Return a detached mount of the context's superblock, as an O_PATH descriptor; closing it unmounts."""
    try:
        return _syscall("fsmount", _SYS_FSMOUNT, context_fd, _FSMOUNT_CLOEXEC, attributes)
    except OSError as exc:
        raise _with_messages(exc, context_fd) from None


def move_mount(mount_fd: int, target: Path) -> None:
    """Attach a detached mount at *target*."""
    path = os.fsencode(target)
    _syscall("move_mount", _SYS_MOVE_MOUNT, mount_fd, b"", AT_FDCWD, path, _MOVE_MOUNT_F_EMPTY_PATH, path=path)


def clone_mount(path: Path) -> int:
    """Return a detached mount of the tree at *path*, without mounts below it, as an O_PATH descriptor."""
    raw = os.fsencode(path)
    return _syscall("open_tree", _SYS_OPEN_TREE, AT_FDCWD, raw, _OPEN_TREE_CLONE | os.O_CLOEXEC, path=raw)


def map_owners(mount_fd: int, userns_fd: int) -> None:
    """Make a new detached mount show each owner as the user namespace maps it; the namespace may then end."""
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, userns_fd)
    _syscall("mount_setattr", _SYS_MOUNT_SETATTR, mount_fd, b"", _AT_EMPTY_PATH, attributes, len(attributes))


def umount2(target: Path, flags: int = MNT_DETACH | UMOUNT_NOFOLLOW) -> None:
    """Unmount *target*; EINVAL if nothing is mounted there."""
    path = os.fsencode(target)
    if _libc().umount2(path, flags) < 0:
        raise _last_error("umount", path)


def openat2(dir_fd: int, path: bytes, flags: int, mode: int = 0, resolve: Resolve = Resolve.IN_ROOT) -> int:
    """Open *path*, resolved from *dir_fd* under the rules of *resolve*; O_CLOEXEC is always set.

    Raises:
        OSError: As open(2); EXDEV or ELOOP if the rules forbid the path.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(_OPENAT2_RACES):
        try:
            return _syscall("openat2", _SYS_OPENAT2, dir_fd, path, how, len(how), path=path)
        except BlockingIOError:
            continue
    raise OSError(errno.EAGAIN, "openat2: concurrent renames kept interfering", os.fsdecode(path))


def watch_opens(path: Path) -> int:
    """Return a fanotify group that reports opens and executions of files of the file system at *path*.

    It reports opens through every mount of the file system, in any namespace, and does not keep a mount busy.
    """
    flags = _FAN_CLOEXEC | _FAN_NONBLOCK
    group_fd = int(_libc().fanotify_init(flags, os.O_RDONLY | os.O_LARGEFILE | os.O_CLOEXEC | os.O_NOATIME))
    if group_fd < 0:
        raise _last_error("fanotify_init", None)
    raw = os.fsencode(path)
    mask = ctypes.c_uint64(_FAN_OPEN | _FAN_OPEN_EXEC)
    if _libc().fanotify_mark(group_fd, _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM, mask, AT_FDCWD, raw) < 0:
        error = _last_error("fanotify_mark", raw)
        os.close(group_fd)
        raise error
    return group_fd


def renameat2(old_dir_fd: int, old: bytes, new_dir_fd: int, new: bytes, flags: Rename) -> None:
    """Rename with NOREPLACE (EEXIST if *new* exists) or EXCHANGE (both must exist)."""
    if _libc().renameat2(old_dir_fd, old, new_dir_fd, new, int(flags)) < 0:
        raise _last_error(f"renameat2 {os.fsdecode(old)} to", new)


def syncfs(fd: int) -> None:
    """Write the file system that holds *fd* to its device."""
    if _libc().syncfs(fd) < 0:
        raise _last_error("syncfs", None)


def statfs_type(path: Path) -> int:
    """Return the magic number of the file system that holds *path*: f_type of statfs(2)."""
    raw = os.fsencode(path)
    buffer = ctypes.create_string_buffer(256)
    if _libc().statfs(raw, buffer) < 0:
        raise _last_error("statfs", raw)
    return int(struct.unpack_from("l", buffer)[0]) & 0xFFFFFFFF


def quotactl_fd(fd: int, command: int, id: int, data: bytes) -> bytes:
    """Read or set a quota of the file system that holds *fd*; return *data* as the kernel has left it.

    Args:
        fd: Any file of the file system, without O_PATH.
        command: The command and the quota's type, combined as QCMD does.
        id: The user, group or project.
        data: The command's structure, which reading commands fill in.
    """
    buffer = ctypes.create_string_buffer(data, len(data))
    numbers = (ctypes.c_long(number) for number in (_SYS_QUOTACTL_FD, fd, command, id))
    if _libc().syscall(*numbers, buffer) < 0:
        raise _last_error("quotactl", None)
    return buffer.raw


def entry_types(dir_fd: int) -> dict[bytes, int]:
    """Return the d_type of each entry of a small directory by name, as getdents64(2) reports it (DT_UNKNOWN is 0).

    It reads a single buffer of 32 KiB, which is enough for a probe and not for large directories.
    """
    buffer = ctypes.create_string_buffer(32768)
    length = _libc().getdents64(dir_fd, buffer, len(buffer))
    if length < 0:
        raise _last_error("getdents64", None)
    types: dict[bytes, int] = {}
    offset = 0
    while offset < length:
        record_bytes, d_type = struct.unpack_from("HB", buffer, offset + 16)
        name = buffer.raw[offset + 19 : offset + record_bytes].split(b"\0", 1)[0]
        types[name] = d_type
        offset += record_bytes
    return types


def _fsconfig(context_fd: int, action: str, command: int, key: str | None, value: bytes | None, aux: int) -> None:
    raw_key = None if key is None else os.fsencode(key)
    try:
        _syscall(f"fsconfig {action}", _SYS_FSCONFIG, context_fd, command, raw_key, value, aux)
    except OSError as exc:
        raise _with_messages(exc, context_fd) from None


def _with_messages(exc: OSError, context_fd: int) -> OSError:
    """Return *exc* with the context's pending messages in its text, without their prefixes ``e `` and ``w ``."""
    messages = []
    while True:
        try:
            messages.append(os.read(context_fd, 4096).decode(errors="replace")[2:].strip())
        except OSError:
            break
    if not messages:
        return exc
    return OSError(exc.errno, f"{exc.strerror} ({'; '.join(messages)})")


def _syscall(action: str, number: int, *args: int | bytes | None, path: bytes | None = None) -> int:
    converted = [ctypes.c_long(arg) if isinstance(arg, int) else ctypes.c_char_p(arg) for arg in args]
    result: int = _libc().syscall(ctypes.c_long(number), *converted)
    if result < 0:
        raise _last_error(action, path)
    return result


def _last_error(action: str, path: bytes | None) -> OSError:
    number = ctypes.get_errno()
    if path is None:
        return OSError(number, action)
    return OSError(number, action, os.fsdecode(path))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.getdents64.restype = ctypes.c_ssize_t
    libc.getdents64.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
    return libc
