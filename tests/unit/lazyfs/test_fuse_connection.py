"""Requests and answers of the lazy file system, over a socket instead of the kernel."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from gearworkers.lazyfs.fuse_connection import FuseConnection, FuseReply
from gearworkers.lazyfs.fuse_protocol import FuseRequest, Op
from gearworkers.lazyfs.passthrough import OpenFile, OpenNodes
from gearworkers.lazyfs.tree import LookupResult, Served, Tree

READ_UNIQUE = 16
INTERRUPT_UNIQUE = READ_UNIQUE | 1
SHARD_NODE = 4
NODE = 1 << 63


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.setblocking(False)
    with ours, kernel:
        yield ours, kernel


def answers(kernel: socket.socket) -> list[tuple[int, int]]:
    """Return (number, errno) of the answers since the last call."""
    found: list[tuple[int, int]] = []
    while True:
        try:
            _, error, unique = struct.unpack("<IiQ", kernel.recv(100))
        except BlockingIOError:
            return found
        found.append((unique, -error))


class LateObjects:
    """Objects whose lookups the test answers."""

    def __init__(self) -> None:
        self.lookups: list[Future[LookupResult]] = []
        self.forgotten: list[int] = []

    def look_up(self, name: bytes) -> Future[LookupResult]:
        self.lookups.append(Future())
        return self.lookups[-1]

    def forget(self, node: int) -> None:
        self.forgotten.append(node)

    def is_known(self, name: bytes) -> bool:
        raise AssertionError("this test makes lookups only")

    def size_bytes(self, node: int) -> int:
        raise AssertionError("this test makes lookups only")

    def read(self, node: int, offset: int, size_bytes: int) -> Future[bytes]:
        raise AssertionError("this test makes lookups only")

    def whole(self, node: int) -> OpenFile | None:
        raise AssertionError("this test makes lookups only")


def interrupt() -> FuseRequest:
    return FuseRequest(Op.INTERRUPT, INTERRUPT_UNIQUE, 0, 0, memoryview(struct.pack("<Q", READ_UNIQUE)))


def read(pid: int) -> FuseRequest:
    return FuseRequest(Op.READ, READ_UNIQUE, 5, pid, memoryview(b""))


def test_an_interrupt_that_is_read_before_its_request_is_answered_with_eagain(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, kernel = sockets
    pending: list[FuseReply] = []
    connection = FuseConnection(ours.fileno(), lambda request, reply: pending.append(reply))
    process = subprocess.Popen(["true"])
    process.wait()
    connection.dispatch(interrupt())
    assert answers(kernel) == [(INTERRUPT_UNIQUE, errno.EAGAIN)]
    connection.dispatch(read(process.pid))
    assert answers(kernel) == []
    connection.dispatch(interrupt())
    assert answers(kernel) == [(READ_UNIQUE, errno.EINTR)]
    pending[0].send(b"too late")
    assert answers(kernel) == []


def test_an_interrupt_of_a_living_process_does_not_fail_its_request(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, kernel = sockets
    pending: list[FuseReply] = []
    connection = FuseConnection(ours.fileno(), lambda request, reply: pending.append(reply))
    connection.dispatch(read(os.getpid()))
    connection.dispatch(interrupt())
    connection.fail_killed()
    assert answers(kernel) == []
    pending[0].fail(errno.EIO)
    assert answers(kernel) == [(READ_UNIQUE, errno.EIO)]


def test_a_served_file_is_forgotten_if_its_reader_was_killed_during_the_lookup(
    sockets: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    ours, kernel = sockets
    objects, open_nodes = LateObjects(), OpenNodes(-1, tmp_path)
    connection = FuseConnection(ours.fileno(), Tree(objects, open_nodes).handle)
    process = subprocess.Popen(["true"])
    process.wait()
    name = memoryview(b"name\0")
    requests = [FuseRequest(Op.LOOKUP, unique, SHARD_NODE, process.pid, name) for unique in (READ_UNIQUE, 32)]
    for request in requests:
        connection.dispatch(request)
    connection.dispatch(interrupt())
    assert answers(kernel) == [(READ_UNIQUE, errno.EINTR)]
    objects.lookups[0].set_result(Served(NODE, 5))
    assert objects.forgotten == [NODE]
    objects.lookups[1].set_result(Served(NODE, 5))
    assert objects.forgotten == [NODE]
    assert open_nodes.forget(NODE, 1)
