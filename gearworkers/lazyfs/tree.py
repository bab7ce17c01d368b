"""What the lazy file system shows: nothing to list, every object to look up.

``fetch/`` is a tree as that of an object cache, ``\\x01a/bcd…``. Looking an object up there makes it arrive; then the
answer is that there is none, and the overlay goes on to arrivals/, where it is by now (the trap). A large object is
answered with a file, whose reads wait for the parts they need only.

``failed/`` is another one, where an overlay looks last. It takes every error of a data layer for a missing object
and tells its reader the last layer's error. So here the answer is EIO for an object that should have arrived.

A node's number says all about it, so a successor of a dead server needs none of its memory: 1 is the root, 2 and 3
its directories, the next 128 theirs, and an object has the first 63 bits of its digest below a set top bit.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gearworkers.digest import ALPHABET, RESERVED, object_name
from gearworkers.errors import GearError, ResourceExhausted
from gearworkers.lazyfs import fuse_protocol
from gearworkers.lazyfs.fuse_connection import Waiter
from gearworkers.lazyfs.fuse_protocol import ROOT_NODE, Op, Request
from gearworkers.lazyfs.passthrough import OpenFile, Openings

FETCH = "fetch"
FAILED = "failed"
_FETCH_NODE = 2
_FAILED_NODE = 3
_FETCH_SHARDS = 4
_FAILED_SHARDS = _FETCH_SHARDS + len(ALPHABET)
_TOP = {FETCH.encode(): _FETCH_NODE, FAILED.encode(): _FAILED_NODE}
_SHARDS = {_FETCH_NODE: _FETCH_SHARDS, _FAILED_NODE: _FAILED_SHARDS}
_OBJECT_BIT = 1 << 63


@dataclass(frozen=True, slots=True)
class Arrived:
    """The object is in arrivals/."""


@dataclass(frozen=True, slots=True)
class Served:
    """The object is still coming and read through this file system meanwhile."""

    node: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """No layer has such an object."""


Found = Arrived | Served | Unknown | GearError


class Contents(Protocol):
    """Where the objects come from; called from several threads at once, and answers from any."""

    def want(self, name: bytes, done: Callable[[Found], None]) -> None:
        """Make the object with this name of 21 characters arrive; *done* is called once, now or later."""

    def is_wanted(self, name: bytes) -> bool:
        """Whether a layer has such an object."""

    def size_bytes(self, node: int) -> int | GearError:
        """How long the object of this node is."""

    def read(self, node: int, offset: int, size_bytes: int, done: Callable[[bytes | GearError], None]) -> None:
        """Verified bytes of a served object; *done* is called once, now or later."""

    def whole(self, node: int) -> OpenFile | None:
        """The object's file, if all of it is here."""

    def forget(self, node: int) -> None:
        """The kernel knows the node no longer."""


def node_of(digest: bytes) -> int:
    """The number of the object with this digest."""
    return int.from_bytes(digest[:8], "big") >> 1 | _OBJECT_BIT


def entry_of(digest: bytes) -> tuple[int, bytes]:
    """The directory below fetch/ in which this object is looked up, and its name there."""
    name = object_name(digest)
    return _FETCH_SHARDS + ALPHABET.index(name[:1]), name[1:]


def digests_from(node: int) -> tuple[bytes, bytes]:
    """The least and the greatest first eight bytes that a digest of this node can have."""
    bits = (node & ~_OBJECT_BIT) << 1
    return bits.to_bytes(8, "big"), (bits | 1).to_bytes(8, "big")


class Tree:
    """Answers the requests of a connection from `Contents`."""

    def __init__(self, contents: Contents, openings: Openings) -> None:
        self._contents = contents
        self._openings = openings
        self._answers: dict[int, Callable[[Request, Waiter], object]] = {
            Op.LOOKUP: self._lookup,
            Op.GETATTR: self._getattr,
            Op.OPEN: self._open,
            Op.READ: self._read,
            Op.FORGET: self._forget,
            Op.BATCH_FORGET: self._forget,
            Op.STATFS: lambda _, waiter: waiter.give(fuse_protocol.statfs_body()),
            Op.OPENDIR: lambda _, waiter: waiter.give(fuse_protocol.open_body(0)),
            Op.READDIR: lambda _, waiter: waiter.give(),
            Op.RELEASEDIR: lambda _, waiter: waiter.give(),
            Op.RELEASE: self._release,
            Op.DESTROY: lambda _, waiter: waiter.give(),
        }

    def handle(self, request: Request, waiter: Waiter) -> None:
        """Answer *request* through *waiter*, now or when its object is here."""
        handler = self._answers.get(request.op)
        if handler is None:
            waiter.fail(errno.ENOSYS)
        else:
            handler(request, waiter)

    def _lookup(self, request: Request, waiter: Waiter) -> None:
        name, parent = fuse_protocol.name_of(request.body), request.node
        if _is_object(parent):
            waiter.fail(errno.ENOTDIR)
        elif parent < _FETCH_SHARDS:
            _tell_directory(_directory_node(parent, name), waiter)
        elif parent < _FAILED_SHARDS:
            full_name = _full_name(parent - _FETCH_SHARDS, name)
            self._contents.want(full_name, lambda found: self._tell(found, waiter))
        else:
            is_wanted = self._contents.is_wanted(_full_name(parent - _FAILED_SHARDS, name))
            waiter.fail(errno.EIO if is_wanted else errno.ENOENT)

    def _getattr(self, request: Request, waiter: Waiter) -> None:
        if not _is_object(request.node):
            waiter.give(fuse_protocol.attributes_body(fuse_protocol.directory(request.node)))
            return
        size_bytes = self._contents.size_bytes(request.node)
        if isinstance(size_bytes, GearError):
            waiter.fail(error_number(size_bytes))
        else:
            waiter.give(fuse_protocol.attributes_body(fuse_protocol.regular(request.node, size_bytes)))

    def _open(self, request: Request, waiter: Waiter) -> None:
        node = request.node
        waiter.give(self._openings.open(node, lambda: self._contents.whole(node)))

    def _release(self, request: Request, waiter: Waiter) -> None:
        self._openings.release(request.node, fuse_protocol.released(request.body))
        waiter.give()

    def _read(self, request: Request, waiter: Waiter) -> None:
        offset, size_bytes = fuse_protocol.read_range(request.body)

        def done(result: bytes | GearError) -> None:
            if isinstance(result, GearError):
                waiter.fail(error_number(result))
            else:
                waiter.give(result)

        self._contents.read(request.node, offset, size_bytes, done)

    def _forget(self, request: Request, _waiter: Waiter) -> None:
        for node, lookups in fuse_protocol.forgotten(request.op, request.node, request.body):
            if _is_object(node):
                self._forget_node(node, lookups)

    def _forget_node(self, node: int, lookups: int) -> None:
        if self._openings.forget(node, lookups):
            self._contents.forget(node)

    def _tell(self, found: Found, waiter: Waiter) -> None:
        if isinstance(found, Served):
            self._openings.looked_up(found.node)
            if not waiter.give(
                fuse_protocol.entry_body(found.node, fuse_protocol.regular(found.node, found.size_bytes))
            ):
                self._forget_node(found.node, 1)  # who looked it up was killed: the kernel does not know it
        elif isinstance(found, GearError):
            waiter.fail(error_number(found))
        else:
            waiter.fail(errno.ENOENT)


def error_number(error: GearError) -> int:
    """What a reader is told: no space is said as such, all else is EIO."""
    return errno.ENOSPC if isinstance(error, ResourceExhausted) else errno.EIO


def _is_object(node: int) -> bool:
    return node >= _OBJECT_BIT


def _tell_directory(node: int | None, waiter: Waiter) -> None:
    if node is None:
        waiter.fail(errno.ENOENT)
    else:
        waiter.give(fuse_protocol.entry_body(node, fuse_protocol.directory(node)))


def _full_name(shard: int, name: bytes) -> bytes:
    return ALPHABET[shard : shard + 1] + name


def _directory_node(parent: int, name: bytes) -> int | None:
    if parent == ROOT_NODE:
        return _TOP.get(name)
    if len(name) != 2 or name[:1] != RESERVED:
        return None
    shard = ALPHABET.find(name[1:])
    return None if shard < 0 else _SHARDS[parent] + shard
