"""The spool goes to the remote."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import structlog

from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.store import verify_file
from gearworkers.errors import GearError, IntegrityError, InvalidInput
from gearworkers.remote import encoding
from gearworkers.remote.remote import Remote

_log = structlog.get_logger(__name__)

_BATCH = 256
_ITS_OWN_FAULT = (IntegrityError, InvalidInput, OSError)
"""What keeps one object from being pushed and no other: it is damaged, unreadable, or none that the remote takes."""


@dataclass(slots=True)
class PushReport:
    """What became of what waited."""

    pushed_objects: int = 0
    """Confirmed by the remote, and no longer waiting."""
    refused: dict[bytes, str] = field(default_factory=dict)
    """Digests of those that cannot be pushed, and why; they stay in the spool."""


def push_pending(spool: PushQueue, remote: Remote) -> PushReport:
    """Push all that waits in the spool.

    A spool entry goes only when the remote has confirmed the object, so a crash pushes it once more, never less.
    One that cannot be pushed keeps no other from it.

    Raises:
        Unavailable: The remote does not answer; what is left stays in the spool.
    """
    report = PushReport()
    waiting = spool.pending()
    while batch := list(islice(waiting, _BATCH)):
        for digest in _push(spool, remote, batch, report):
            spool.remove(digest)
            report.pushed_objects += 1
    for digest, why in report.refused.items():
        _log.error("an object cannot be pushed", object=digest.hex(), error=why)
    return report


def _push(spool: PushQueue, remote: Remote, batch: Sequence[bytes], report: PushReport) -> Iterator[bytes]:
    """Push *batch*, the small ones together; those that the remote has confirmed."""
    small: list[bytes] = []
    singly: list[bytes] = []
    try:
        remote.put_many(_small_contents(spool, batch, small, singly, report))
    except _ITS_OWN_FAULT:  # one of them is at fault, and those behind it were not even read
        small, singly = [], [digest for digest in batch if digest not in report.refused]
    yield from small
    for digest in singly:
        if _push_one(spool, remote, digest, report):
            yield digest


def _small_contents(
    spool: PushQueue, batch: Sequence[bytes], small: list[bytes], large: list[bytes], report: PushReport
) -> Iterator[tuple[bytes, bytes]]:
    """(digest, content) of the small ones, noted in *small*; the others are noted in *large*."""
    for digest in batch:
        try:
            with open(spool.open(digest), "rb") as file:
                if os.fstat(file.fileno()).st_size >= encoding.LARGE_BYTES:
                    large.append(digest)
                    continue
                content = file.read()
        except FileNotFoundError:
            continue
        except OSError as exc:
            report.refused[digest] = str(exc)
            continue
        if hashlib.sha256(content).digest() != digest:
            report.refused[digest] = "its bytes have another SHA-256; run `gear fsck --read-data --repair`"
            continue
        small.append(digest)
        yield digest, content


def _push_one(spool: PushQueue, remote: Remote, digest: bytes, report: PushReport) -> bool:
    try:
        fd = spool.open(digest)
    except FileNotFoundError:
        return False
    except OSError as exc:
        report.refused[digest] = str(exc)
        return False
    try:
        remote.put(digest, fd)
    except _ITS_OWN_FAULT as exc:
        report.refused[digest] = str(exc)
        return False
    finally:
        os.close(fd)
    return True


def damaged_in(spool: PushQueue) -> Iterator[tuple[bytes, str]]:
    """Those that wait but are not what they are named by, and why; reads them all."""
    for digest in spool.pending():
        try:
            fd = spool.open(digest)
            try:
                verify_file(fd, digest)
            finally:
                os.close(fd)
        except FileNotFoundError:
            continue
        except (GearError, OSError) as exc:
            yield digest, str(exc)
