"""Requests and answers of the lazy file system, over a socket instead of the kernel."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest

from gearworkers.mounts.lazy.connection import Connection, Waiter
from gearworkers.mounts.lazy.protocol import Op, Request

READ_UNIQUE = 16
INTERRUPT_UNIQUE = READ_UNIQUE | 1


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
