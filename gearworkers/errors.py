"""The errors that reach a user.

    GearError
    ├── NotFound             a layer, object or image does not exist
    ├── AlreadyExists        a name is taken
    ├── FailedPrecondition   a valid call in the wrong state: a half-applied layer, a kernel without a feature
    ├── InvalidInput         the caller's input, or a tar, is invalid; the same call fails again
    ├── IntegrityError       bytes differ from their digest or length
    ├── Unavailable          Redis, NFS, a remote or a lock does not answer; the only retryable error
    └── ResourceExhausted    no space, inodes, quota or memory left

A message says what failed, why, and what to do, in one line without secrets: "cannot push to registry.local/app:1: 401
Unauthorized; run `docker login registry.local`". It is shown to users as it is.

The errors of each other library are translated in one place: OSError in `from_os_error`, urllib3 in
`util.http_errors`, obstore in `remote.bucket`.
"""

from __future__ import annotations

import errno
import os
from typing import Self


class GearError(Exception):
    """The base class of all errors below."""

    retryable = False
    retry_after_s = 0.0
    """Seconds before which a retry cannot succeed."""

    def with_retry_after(self, seconds: float) -> Self:
        """Set `retry_after_s`; return this error."""
        self.retry_after_s = seconds
        return self


class NotFound(GearError):
    """A named layer, object, image or file does not exist."""


class AlreadyExists(GearError):
    """The name is taken."""


class FailedPrecondition(GearError):
    """The call is valid, but not in the present state."""


class InvalidInput(GearError):
    """The input is malformed, hostile or unsupported."""


class IntegrityError(GearError):
    """Stored or received bytes differ from their digest or length."""


class Unavailable(GearError):
    """A service or file system does not answer now; a retry may succeed."""

    retryable = True


class ResourceExhausted(GearError):
    """No space, inodes, quota or memory left."""


_BY_NAME = {cls.__name__: cls for cls in GearError.__subclasses__()}
_BY_ERRNO: dict[int, type[GearError]] = {
    errno.ENOENT: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.ENOTEMPTY: AlreadyExists,
    errno.ENOSPC: ResourceExhausted,
    errno.EDQUOT: ResourceExhausted,
    errno.ENOMEM: ResourceExhausted,
    errno.EMFILE: ResourceExhausted,
    errno.ENFILE: ResourceExhausted,
    errno.EMLINK: ResourceExhausted,
    errno.EINVAL: InvalidInput,
    errno.ENAMETOOLONG: InvalidInput,
    errno.ELOOP: InvalidInput,
    errno.ENOTDIR: InvalidInput,
    errno.EISDIR: InvalidInput,
    errno.EFBIG: InvalidInput,
    errno.E2BIG: InvalidInput,
    errno.ERANGE: InvalidInput,
    errno.EPERM: FailedPrecondition,
    errno.EACCES: FailedPrecondition,
    errno.EROFS: FailedPrecondition,
    errno.EBUSY: FailedPrecondition,
    errno.EXDEV: FailedPrecondition,
    errno.ENOSYS: FailedPrecondition,
    errno.EOPNOTSUPP: FailedPrecondition,
    errno.ENODEV: FailedPrecondition,
    errno.EIO: Unavailable,
    errno.ESTALE: Unavailable,
    errno.ETIMEDOUT: Unavailable,
    errno.EAGAIN: Unavailable,
    errno.EINTR: Unavailable,
    errno.EPIPE: Unavailable,
    errno.ECONNRESET: Unavailable,
    errno.ECONNREFUSED: Unavailable,
    errno.ECONNABORTED: Unavailable,
    errno.ENOTCONN: Unavailable,
    errno.EHOSTUNREACH: Unavailable,
    errno.ENETUNREACH: Unavailable,
}


def by_name(name: str) -> type[GearError]:
    """Return the class with this name, as another process reports it; GearError for an unknown name."""
    return _BY_NAME.get(name, GearError)


def from_os_error(exc: OSError, tried: str) -> GearError:
    """Translate *exc* into the tree; use as ``raise from_os_error(exc, "...") from exc``.

    Args:
        exc: The kernel's error; without an errno, or with one that is not listed, it becomes a plain GearError.
        tried: The attempted operation and its object; the first half of the message.
    """
    cls = _BY_ERRNO.get(exc.errno or 0, GearError)
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    return cls(f"{tried}: {reason}")
