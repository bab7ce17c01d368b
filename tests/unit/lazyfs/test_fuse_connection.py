"""Requests and answers of the lazy file system, over a socket instead of the kernel."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gearworkers.errors import GearError
from gearworkers.lazyfs.fuse_connection import Connection, Waiter
from gearworkers.lazyfs.fuse_protocol import Op, Request
from gearworkers.lazyfs.passthrough import OpenFile, Openings
from gearworkers.lazyfs.tree import Found, Served, Tree

READ_UNIQUE = 16
INTERRUPT_UNIQUE = READ_UNIQUE | 1
SHARD_NODE = 4
NODE = 1 << 63


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernels.setblocking(False)
    with ours, kernels:
        yield ours, kernels


def answers(kernels: socket.socket) -> list[tuple[int, int]]:
    """(number, errno) of the answers since the last call."""
    found: list[tuple[int, int]] = []
    while True:
        try:
            _, error, unique = struct.unpack("<IiQ", kernels.recv(100))
        except BlockingIOError:
            return found
        found.append((unique, -error))


class LateContents:
    """Objects whose look-ups are answered by the test."""

    def __init__(self) -> None:
        self.wanted: list[Callable[[Found], None]] = []
        self.forgotten: list[int] = []

    def want(self, name: bytes, done: Callable[[Found], None]) -> None:
        self.wanted.append(done)

    def forget(self, node: int) -> None:
        self.forgotten.append(node)

    def is_wanted(self, name: bytes) -> bool:
        raise AssertionError("nothing but look-ups is asked here")

    def size_bytes(self, node: int) -> int | GearError:
        raise AssertionError("nothing but look-ups is asked here")

    def read(self, node: int, offset: int, size_bytes: int, done: Callable[[bytes | GearError], None]) -> None:
        raise AssertionError("nothing but look-ups is asked here")

    def whole(self, node: int) -> OpenFile | None:
        raise AssertionError("nothing but look-ups is asked here")


def interrupt() -> Request:
    return Request(Op.INTERRUPT, INTERRUPT_UNIQUE, 0, 0, memoryview(struct.pack("<Q", READ_UNIQUE)))


def read(pid: int) -> Request:
    return Request(Op.READ, READ_UNIQUE, 5, pid, memoryview(b""))


def test_an_interrupt_that_is_read_before_its_request_comes_again(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, kernels = sockets
    waiting: list[Waiter] = []
    connection = Connection(ours.fileno(), lambda request, waiter: waiting.append(waiter))
    process = subprocess.Popen(["true"])
    process.wait()
    connection._dispatch(interrupt())
    assert answers(kernels) == [(INTERRUPT_UNIQUE, errno.EAGAIN)]
    connection._dispatch(read(process.pid))
    assert answers(kernels) == []
    connection._dispatch(interrupt())
    assert answers(kernels) == [(READ_UNIQUE, errno.EINTR)]
    waiting[0].give(b"too late")
    assert answers(kernels) == []


def test_an_interrupt_of_one_who_lives_on_is_remembered(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, kernels = sockets
    waiting: list[Waiter] = []
    connection = Connection(ours.fileno(), lambda request, waiter: waiting.append(waiter))
    connection._dispatch(read(os.getpid()))
    connection._dispatch(interrupt())
    connection.give_up_killed()
    assert answers(kernels) == []
    waiting[0].fail(errno.EIO)
    assert answers(kernels) == [(READ_UNIQUE, errno.EIO)]


def test_a_served_file_is_not_kept_for_who_was_killed_while_looking_it_up(
    sockets: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    ours, kernels = sockets
    contents, openings = LateContents(), Openings(-1, tmp_path)
    connection = Connection(ours.fileno(), Tree(contents, openings).handle)
    process = subprocess.Popen(["true"])
    process.wait()
    name = memoryview(b"name\0")
    lookups = [Request(Op.LOOKUP, unique, SHARD_NODE, process.pid, name) for unique in (READ_UNIQUE, 32)]
    for lookup in lookups:
        connection._dispatch(lookup)
    connection._dispatch(interrupt())
    assert answers(kernels) == [(READ_UNIQUE, errno.EINTR)]
    contents.wanted[0](Served(NODE, 5))
    assert contents.forgotten == [NODE]
    contents.wanted[1](Served(NODE, 5))
    assert contents.forgotten == [NODE]
    assert openings.forget(NODE, 1)
