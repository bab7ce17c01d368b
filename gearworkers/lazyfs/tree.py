"""The tree of the lazy file system: directories list nothing, and every object can be looked up.

``fetch/``, the fetch directory, has the layout of an object cache, ``\\x01a/bcd…``. A lookup of an object fetches it.
Then the answer is ENOENT, and the overlay continues with arrivals/, which has the object by then. The answer for a
large object is a file instead, whose reads wait only for the parts that they need.

``failed/`` has the same layout and is the last layer of an overlay. An overlay treats every error of a data layer as a
missing object, and reports the error of the last layer. So failed/ answers EIO for an object that should have arrived.

Node numbers are fixed, so the successor of a dead server needs no state: 1 is the root, 2 and 3 are its directories,
and the next 128 are their directories. An object's number is a set top bit and the first 63 bits of its digest.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog

from gearworkers.digest import ALPHABET, RESERVED, object_name
from gearworkers.errors import GearError, ResourceExhausted
from gearworkers.lazyfs import fuse_protocol
from gearworkers.lazyfs.fuse_connection import FuseReply
from gearworkers.lazyfs.fuse_protocol import ROOT_NODE, FuseRequest, Op
from gearworkers.lazyfs.passthrough import OpenFile, OpenNodes

_log = structlog.get_logger(__name__)

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
    """The object is still arriving, and is read through this file system until then."""

    node: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """No layer has such an object."""


LookupResult = Arrived | Served | Unknown


class ObjectProvider(Protocol):
    """The objects behind the tree; many threads call it at once, and futures complete in any thread."""

    def look_up(self, name: bytes) -> Future[LookupResult]:
        """Fetch the object with this name of 21 characters, or serve it while it arrives; GearError on failure."""

    def is_known(self, name: bytes) -> bool:
        """Return whether a layer has an object of this name."""

    def size_bytes(self, node: int) -> int:
        """Return the size of the node's object.

        Raises:
            GearError: The size is not known.
        """

    def read(self, node: int, offset: int, size_bytes: int) -> Future[bytes]:
        """Return verified bytes of a served object; GearError if they cannot be fetched."""

    def whole(self, node: int) -> OpenFile | None:
        """Return the object's file if the object is in the store, otherwise None."""

    def forget(self, node: int) -> None:
        """Release the node: the kernel has forgotten it."""


def node_of(digest: bytes) -> int:
    """Return the number of the node of this object."""
    return int.from_bytes(digest[:8], "big") >> 1 | _OBJECT_BIT


def entry_of(digest: bytes) -> tuple[int, bytes]:
    """Return the directory below fetch/ in which this object is looked up, and its name there."""
    name = object_name(digest)
    return _FETCH_SHARDS + ALPHABET.index(name[:1]), name[1:]


def digests_from(node: int) -> tuple[bytes, bytes]:
    """Return the lowest and the highest first eight bytes of the digests that belong to this node."""
    bits = (node & ~_OBJECT_BIT) << 1
    return bits.to_bytes(8, "big"), (bits | 1).to_bytes(8, "big")


class Tree:
    """Answers the requests of a connection from an `ObjectProvider`."""

    def __init__(self, objects: ObjectProvider, open_nodes: OpenNodes) -> None:
        self._objects = objects
        self._open_nodes = open_nodes
        self._handlers: dict[int, Callable[[FuseRequest, FuseReply], object]] = {
            Op.LOOKUP: self._lookup,
            Op.GETATTR: self._getattr,
            Op.OPEN: self._open,
            Op.READ: self._read,
            Op.FORGET: self._forget,
            Op.BATCH_FORGET: self._forget,
            Op.STATFS: lambda _, reply: reply.send(fuse_protocol.statfs_body()),
            Op.OPENDIR: lambda _, reply: reply.send(fuse_protocol.open_body(0)),
            Op.READDIR: lambda _, reply: reply.send(),
            Op.RELEASEDIR: lambda _, reply: reply.send(),
            Op.RELEASE: self._release,
            Op.DESTROY: lambda _, reply: reply.send(),
        }

    def handle(self, request: FuseRequest, reply: FuseReply) -> None:
        """Answer *request*, now or when its object has arrived."""
        handler = self._handlers.get(request.op)
        if handler is None:
            reply.fail(errno.ENOSYS)
        else:
            handler(request, reply)

    def _lookup(self, request: FuseRequest, reply: FuseReply) -> None:
        name, parent = fuse_protocol.name_of(request.body), request.node
        if _is_object(parent):
            reply.fail(errno.ENOTDIR)
        elif parent < _FETCH_SHARDS:
            _send_directory(_directory_node(parent, name), reply)
        elif parent < _FAILED_SHARDS:
            found = self._objects.look_up(_full_name(parent - _FETCH_SHARDS, name))
            found.add_done_callback(partial(self._send_lookup, reply))
        else:
            is_known = self._objects.is_known(_full_name(parent - _FAILED_SHARDS, name))
            reply.fail(errno.EIO if is_known else errno.ENOENT)

    def _send_lookup(self, reply: FuseReply, found: Future[LookupResult]) -> None:
        error = found.exception()
        if error is not None:
            reply.fail(error_number(error))
            return
        result = found.result()
        if not isinstance(result, Served):
            reply.fail(errno.ENOENT)
            return
        node, attributes = result.node, fuse_protocol.regular(result.node, result.size_bytes)
        self._open_nodes.looked_up(node)
        if not reply.send(fuse_protocol.entry_body(node, attributes)):
            self._forget_node(node, 1)  # the caller was killed, so the kernel does not know the node

    def _getattr(self, request: FuseRequest, reply: FuseReply) -> None:
        if not _is_object(request.node):
            reply.send(fuse_protocol.attributes_body(fuse_protocol.directory(request.node)))
            return
        try:
            size_bytes = self._objects.size_bytes(request.node)
        except GearError as exc:
            reply.fail(error_number(exc))
        else:
            reply.send(fuse_protocol.attributes_body(fuse_protocol.regular(request.node, size_bytes)))

    def _open(self, request: FuseRequest, reply: FuseReply) -> None:
        node = request.node
        reply.send(self._open_nodes.open(node, lambda: self._objects.whole(node)))

    def _release(self, request: FuseRequest, reply: FuseReply) -> None:
        self._open_nodes.release(request.node, fuse_protocol.released(request.body))
        reply.send()

    def _read(self, request: FuseRequest, reply: FuseReply) -> None:
        offset, size_bytes = fuse_protocol.read_range(request.body)
        self._objects.read(request.node, offset, size_bytes).add_done_callback(partial(_send_bytes, reply))

    def _forget(self, request: FuseRequest, _reply: FuseReply) -> None:
        for node, lookups in fuse_protocol.forgotten(request.op, request.node, request.body):
            if _is_object(node):
                self._forget_node(node, lookups)

    def _forget_node(self, node: int, lookups: int) -> None:
        if self._open_nodes.forget(node, lookups):
            self._objects.forget(node)


def error_number(error: BaseException) -> int:
    """Return the errno for the reader: ENOSPC for lack of space, EIO for everything else."""
    if not isinstance(error, GearError):
        _log.error("a request of the lazy file system failed unexpectedly", exc_info=error)
    return errno.ENOSPC if isinstance(error, ResourceExhausted) else errno.EIO


def _send_bytes(reply: FuseReply, read: Future[bytes]) -> None:
    error = read.exception()
    if error is not None:
        reply.fail(error_number(error))
    else:
        reply.send(read.result())


def _is_object(node: int) -> bool:
    return node >= _OBJECT_BIT


def _send_directory(node: int | None, reply: FuseReply) -> None:
    if node is None:
        reply.fail(errno.ENOENT)
    else:
        reply.send(fuse_protocol.entry_body(node, fuse_protocol.directory(node)))


def _full_name(shard: int, name: bytes) -> bytes:
    return ALPHABET[shard : shard + 1] + name


def _directory_node(parent: int, name: bytes) -> int | None:
    if parent == ROOT_NODE:
        return _TOP.get(name)
    if len(name) != 2 or name[:1] != RESERVED:
        return None
    shard = ALPHABET.find(name[1:])
    return None if shard < 0 else _SHARDS[parent] + shard
