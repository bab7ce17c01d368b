"""The streams socket grants a job once, and serves processes whose job ends or whose caller leaves early."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gearworkers.workers.messages import (
    ApplyDiff,
    Claim,
    CollectGarbage,
    FrameBuffer,
    Granted,
    HttpConnection,
    JobResult,
    Message,
    Refused,
    frame,
)
from plugin_gateway.dispatch.claim_server import ClaimServer
from plugin_gateway.dispatch.pending_job import JobState
from plugin_gateway.metrics import GatewayMetrics
from plugin_gateway.sockets import listen

APPLY = ApplyDiff(gear_root="/gear", token="token", id="a")
COLLECT = CollectGarbage(gear_root="/gear", token="token")
MORE_THAN_A_SOCKET_HOLDS = HttpConnection(received=bytes(3 << 20))


@asynccontextmanager
async def opened(directory: Path, listener: socket.socket | None = None) -> AsyncIterator[ClaimServer]:
    """Run a server that listens."""
    server = ClaimServer(directory / "streams.sock", GatewayMetrics())
    server.open(listener)
    try:
        async with asyncio.timeout(60):
            yield server
    finally:
        server.close()
        await asyncio.sleep(0)


async def claim(directory: Path) -> socket.socket:
    """Return the control connection of a process that has presented the token."""
    control = socket.socket(socket.AF_UNIX)
    control.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(control, str(directory / "streams.sock"))
    await loop.sock_sendall(control, frame(Claim("token", "worker", 1)))
    return control


async def reply(control: socket.socket) -> Message:
    """Receive the reply to a claim."""
    frames = FrameBuffer()
    while (message := frames.next()) is None:
        data = await asyncio.get_running_loop().sock_recv(control, 1 << 20)
        assert data, "the server has closed the connection"
        frames.feed(data)
    return message


async def begin_reply(control: socket.socket) -> None:
    """Receive the first bytes of the reply."""
    assert await asyncio.get_running_loop().sock_recv(control, 64)


async def read_to_the_end(control: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(control, 1 << 20):
        pass


async def wait_for(server: ClaimServer, state: Any) -> None:
    """Wait until *state* returns true; checked after each change."""
    while not state():
        await server.changes.next()


def connection() -> int:
    """Return the descriptor of a connection whose caller has left."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_a_job_is_granted_to_the_first_process_and_refused_to_the_next(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path) as server:
            with server.offer(COLLECT), await claim(tmp_path) as first, await claim(tmp_path) as second:
                assert await reply(first) == Granted(COLLECT)
                assert await reply(second) == Refused()

    run(test())


def test_a_worker_killed_after_it_begins_ends_its_job_with_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path) as server:
            with server.offer(COLLECT) as pending:
                with await claim(tmp_path) as worker:
                    await reply(worker)
                await pending.wait_done()
                assert "died" in pending.result.error and pending.result.retryable
                with await claim(tmp_path) as second:
                    assert await reply(second) == Refused()

    run(test())


def test_a_worker_killed_before_it_begins_leaves_the_job_to_the_next_process(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path) as server:
            with server.offer(APPLY, MORE_THAN_A_SOCKET_HOLDS, connection()) as pending:
                with await claim(tmp_path) as first:
                    await begin_reply(first)
                    await wait_for(server, lambda: pending.state is JobState.CLAIMED)
                await wait_for(server, lambda: pending.state is JobState.OFFERED)
                with await claim(tmp_path) as second:
                    assert await reply(second) == Granted(APPLY, MORE_THAN_A_SOCKET_HOLDS)
                    await wait_for(server, lambda: pending.has_begun)

    run(test())


def test_a_worker_whose_job_is_withdrawn_before_it_begins_is_disconnected(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path) as server:
            with server.offer(APPLY, MORE_THAN_A_SOCKET_HOLDS, connection()) as pending:
                worker = await claim(tmp_path)
                await begin_reply(worker)
            with worker:
                await read_to_the_end(worker)
            assert not pending.has_begun
            assert server.running("worker", heavy=True) == 0

    run(test())


def test_a_withdrawn_job_is_not_offered_again_when_its_worker_dies(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path) as server:
            with server.offer(APPLY, MORE_THAN_A_SOCKET_HOLDS, connection()) as pending:
                first = await claim(tmp_path)
                await begin_reply(first)
            first.close()
            with await claim(tmp_path) as second:
                assert await reply(second) == Refused()
            assert pending.state is JobState.WITHDRAWN

    run(test())


def test_a_result_that_arrives_after_the_withdrawal_is_received_without_error(tmp_path: Path) -> None:
    errors: list[str] = []

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["message"]))
        async with opened(tmp_path) as server:
            with server.offer(COLLECT) as pending:
                worker = await claim(tmp_path)
                await reply(worker)
                await wait_for(server, lambda: pending.has_begun)
            assert server.running("worker", heavy=False) == 1, "the worker is busy until it ends"
            with worker:
                await asyncio.get_running_loop().sock_sendall(worker, frame(JobResult()))
                await read_to_the_end(worker)
            assert server.running("worker", heavy=False) == 0

    run(test())
    assert not errors


class FullOnce(socket.socket):
    """A listener whose process has no free descriptor for the first connection."""

    is_full = True

    def accept(self) -> tuple[socket.socket, Any]:
        if self.is_full:
            self.is_full = False
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_claims_are_accepted_again_after_descriptors_had_run_out(tmp_path: Path) -> None:
    async def test() -> None:
        listener = FullOnce(fileno=listen(tmp_path / "streams.sock").detach())
        async with opened(tmp_path, listener) as server:
            with server.offer(COLLECT), await claim(tmp_path) as worker:
                assert await reply(worker) == Granted(COLLECT)
            assert not listener.is_full

    run(test())


def test_a_process_whose_first_message_is_not_a_claim_is_disconnected(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path):
            with socket.socket(socket.AF_UNIX) as control:
                control.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(control, str(tmp_path / "streams.sock"))
                await loop.sock_sendall(control, frame(JobResult()))
                assert await loop.sock_recv(control, 1) == b""

    run(test())
