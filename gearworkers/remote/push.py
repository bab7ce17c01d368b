"""Moves the objects of the push queue to the remote."""

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

_BATCH_OBJECTS = 256
_OBJECT_ERRORS = (IntegrityError, InvalidInput, OSError)
"""Errors of a single object: it is damaged or unreadable, or the remote rejects it. Others can still be pushed."""


@dataclass(slots=True)
class PushReport:
    """The result of a push."""

    pushed_objects: int = 0
    """Objects that the remote has confirmed; they have left the queue."""
    refused: dict[bytes, str] = field(default_factory=dict)
    """The reason for each digest that cannot be pushed; these objects stay in the queue."""


def push_pending(queue: PushQueue, remote: Remote) -> PushReport:
    """Push all pending objects.

    An object leaves the queue only after the remote has confirmed it, so after a crash it may be pushed twice, but is
    never lost. An object that cannot be pushed does not delay the others.

    Raises:
        Unavailable: The remote does not answer; the remaining objects stay in the queue.
    """
    report = PushReport()
    pending = queue.pending()
    while batch := list(islice(pending, _BATCH_OBJECTS)):
        for digest in _push(queue, remote, batch, report):
            queue.remove(digest)
            report.pushed_objects += 1
    for digest, reason in report.refused.items():
        _log.error("an object cannot be pushed", object=digest.hex(), error=reason)
    return report


def _push(queue: PushQueue, remote: Remote, batch: Sequence[bytes], report: PushReport) -> Iterator[bytes]:
    """Push *batch*, its small objects together; yield each digest that the remote has confirmed."""
    small: list[bytes] = []
    singly: list[bytes] = []
    try:
        remote.put_many(_small_contents(queue, batch, small, singly, report))
    except _OBJECT_ERRORS:  # one small object failed, and the rest of the batch was not read
        small, singly = [], [digest for digest in batch if digest not in report.refused]
    yield from small
    for digest in singly:
        if _push_one(queue, remote, digest, report):
            yield digest


def _small_contents(
    queue: PushQueue, batch: Sequence[bytes], small: list[bytes], large: list[bytes], report: PushReport
) -> Iterator[tuple[bytes, bytes]]:
    """Yield (digest, content) of the small objects; add each digest to *small* or *large*."""
    for digest in batch:
        try:
            with open(queue.open(digest), "rb") as file:
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


def _push_one(queue: PushQueue, remote: Remote, digest: bytes, report: PushReport) -> bool:
    try:
        fd = queue.open(digest)
    except FileNotFoundError:
        return False
    except OSError as exc:
        report.refused[digest] = str(exc)
        return False
    try:
        remote.put(digest, fd)
    except _OBJECT_ERRORS as exc:
        report.refused[digest] = str(exc)
        return False
    finally:
        os.close(fd)
    return True


def damaged_entries(queue: PushQueue) -> Iterator[tuple[bytes, str]]:
    """Read all pending objects; yield (digest, reason) of each whose bytes do not match its digest."""
    for digest in queue.pending():
        try:
            fd = queue.open(digest)
            try:
                verify_file(fd, digest)
            finally:
                os.close(fd)
        except FileNotFoundError:
            continue
        except (GearError, OSError) as exc:
            yield digest, str(exc)
