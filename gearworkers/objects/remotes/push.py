"""The spool goes to the remote."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice

from gearworkers.errors import GearError, IntegrityError
from gearworkers.objects.remotes import codec
from gearworkers.objects.remotes.remote import Remote
from gearworkers.objects.spool import PushSpool

_BATCH = 256


def push_pending(spool: PushSpool, remote: Remote) -> int:
    """Push all that waits in the spool; how many objects the remote has confirmed.

    A spool entry goes only when the remote has confirmed the object, so a crash pushes it once more, never less.
    A damaged one keeps no other from being pushed.

    Raises:
        Unavailable: The remote does not answer; what is left stays in the spool.
        IntegrityError: An object is damaged; all others have been pushed.
    """
    waiting = spool.pending()
    pushed = 0
    errors: list[GearError] = []
    while batch := list(islice(waiting, _BATCH)):
        pushed += _push(spool, remote, batch, errors)
    if errors:
        raise errors[0]
    return pushed


def _push(spool: PushSpool, remote: Remote, batch: Sequence[bytes], errors: list[GearError]) -> int:
    """Push *batch*, the small ones together; what is wrong with single ones goes to *errors*."""
    small: list[bytes] = []
    large: list[bytes] = []
    remote.put_many(_small_contents(spool, batch, small, large, errors))
    for digest in large:
        if _push_large(spool, remote, digest, errors):
            small.append(digest)
    for digest in small:
        spool.done(digest)
    return len(small)


def _small_contents(
    spool: PushSpool, batch: Sequence[bytes], small: list[bytes], large: list[bytes], errors: list[GearError]
) -> Iterator[tuple[bytes, bytes]]:
    """(digest, content) of the small ones, noted in *small*; the others are noted in *large*."""
    for digest in batch:
        try:
            fd = spool.open(digest)
        except FileNotFoundError:
            continue
        with open(fd, "rb") as file:
            if os.fstat(fd).st_size >= codec.LARGE_BYTES:
                large.append(digest)
                continue
            content = file.read()
        if hashlib.sha256(content).digest() != digest:
            errors.append(
                IntegrityError(f"push object {digest.hex()}: its bytes have another SHA-256; run `gear fsck`")
            )
            continue
        small.append(digest)
        yield digest, content


def _push_large(spool: PushSpool, remote: Remote, digest: bytes, errors: list[GearError]) -> bool:
    try:
        fd = spool.open(digest)
    except FileNotFoundError:
        return False
    try:
        remote.put(digest, fd)
    except IntegrityError as exc:
        errors.append(exc)
        return False
    finally:
        os.close(fd)
    return True
