"""Every error that gearworkers raises on purpose.

    GearError
    ├── NotFound             an id, object or image that is not there
    ├── AlreadyExists        a name that is taken
    ├── FailedPrecondition   right call, wrong state: a half-applied layer, a kernel that lacks something
    ├── InvalidInput         what the caller or a tar said is wrong; saying it again will not help
    ├── IntegrityError       bytes that are not what their name promises
    ├── Unavailable          the only retryable one: Redis, NFS, a remote, a lock
    └── ResourceExhausted    no space, no inodes, no quota, no memory

Each foreign library is translated in one place: OSError in `from_os_error`, urllib3 in `http_errors`, obstore in
`remote.bucket`.
"""

from __future__ import annotations

import errno
import os
from typing import Self


class GearError(Exception):
    """Base class; its text is shown to users: what was tried, on what, and what to do."""

    retryable = False
    after_s = 0.0
    """Trying again is of no use before."""

    def after(self, seconds: float) -> Self:
        """This, with *seconds* to wait."""
        self.after_s = seconds
        return self


class NotFound(GearError):
    """Something that was named is not there."""


class AlreadyExists(GearError):
    """Something of that name is there already."""


class FailedPrecondition(GearError):
    """The call is right, the state it meets is not."""


class InvalidInput(GearError):
    """The input is malformed, hostile or not supported."""


class IntegrityError(GearError):
    """Stored or received bytes differ from their digest or length."""


class Unavailable(GearError):
    """A service or file system does not answer now; trying again may help."""

    retryable = True


class ResourceExhausted(GearError):
    """No space, inodes, quota or memory left."""


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


def from_os_error(exc: OSError, tried: str) -> GearError:
    """Translate *exc* into the tree; use as ``raise from_os_error(exc, "...") from exc``.

    Args:
        exc: What the kernel said; one without errno, or with one not listed, becomes plain GearError.
        tried: What was being done, on what: the first half of the message.
    """
    cls = _BY_ERRNO.get(exc.errno or 0, GearError)
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    return cls(f"{tried}: {reason}")
