"""Check every object: its bytes match its name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from gearworkers.cas.store import ObjectStore, verify_file
from gearworkers.digest import DIGEST_BYTES, DIGEST_XATTR, object_name
from gearworkers.errors import IntegrityError, from_os_error


class DamagedObject(NamedTuple):
    """A damaged object in the store."""

    path: bytes
    digest: bytes
    """The digest in the file's xattr."""
    reason: str


def damaged_objects(store: ObjectStore, *, read_data: bool) -> Iterator[DamagedObject]:
    """Check the name of every object against its digest and, with *read_data*, its bytes.

    A file without digest is skipped: an import is writing it, or the garbage collector removes it after a crash.

    Raises:
        GearError: The store cannot be read.
    """
    for shard in store.shards():
        for name in sorted(store.names(shard)):
            path = shard + b"/" + name
            try:
                found = _checked(path, shard[-1:] + name, read_data)
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise from_os_error(exc, f"check {os.fsdecode(path)}") from exc
            if found is not None:
                yield found


def _checked(path: bytes, name: bytes, read_data: bool) -> DamagedObject | None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        digest = _digest(fd)
        if not digest:
            return None
        if len(digest) != DIGEST_BYTES or object_name(digest) != name:
            return DamagedObject(path, digest, f"its digest {digest.hex()} does not match its name")
        if read_data:
            verify_file(fd, digest)
    except IntegrityError as exc:
        return DamagedObject(path, digest, str(exc))
    finally:
        os.close(fd)
    return None


def _digest(fd: int) -> bytes:
    try:
        return os.getxattr(fd, DIGEST_XATTR)
    except OSError as exc:
        if exc.errno == errno.ENODATA:
            return b""
        raise
