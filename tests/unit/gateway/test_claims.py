"""What becomes of an offer whose caller is gone before its worker has it, or has answered."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from gearworkers.workers.messages import Answer, Claim, FrameBuffer, Grant, Order, frame
from plugin_gateway.dispatch.claims import Body, Desk
from plugin_gateway.metrics import Metrics

ORDER = Order("apply_diff", "/gear", "token", "a")
CLAIM = frame(Claim("token", "worker", 1))
MORE_THAN_A_SOCKET_HOLDS = bytes(8 << 20)


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Desk]:
    """A desk that listens."""
    desk = Desk(directory / "streams.sock", Metrics())
    desk.open()
    try:
        async with asyncio.timeout(60):
            yield desk
    finally:
        desk.close()
        await asyncio.sleep(0)


async def claim(directory: Path) -> socket.socket:
    """A worker that has shown the token."""
    worker = socket.socket(socket.AF_UNIX)
    worker.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(worker, str(directory / "streams.sock"))
    await loop.sock_sendall(worker, CLAIM)
    return worker


async def granted(worker: socket.socket) -> Grant:
    """What the desk says to it."""
    frames = FrameBuffer()
    while (message := frames.next()) is None:
        frames.feed(await asyncio.get_running_loop().sock_recv(worker, 64))
    return msgspec.json.decode(message, type=Grant)


async def read_to_the_end(worker: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(worker, 1 << 20):
        pass


def body(head: bytes = b"") -> Body:
    """Of a caller whose other end is closed."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return Body(ours.detach(), head=head)


def test_a_worker_whose_grant_is_under_way_when_the_offer_ends_is_let_go_of(tmp_path: Path) -> None:
    async def end_early() -> None:
        async with opened(tmp_path) as desk:
            with desk.offer(ORDER, body(MORE_THAN_A_SOCKET_HOLDS)) as offer:
                worker = await claim(tmp_path)
                assert (await granted(worker)).accepted
            with worker:
                await read_to_the_end(worker)
            assert not offer.claimed.done()
            assert desk.serving("worker", heavy=True) == 0

    asyncio.run(end_early())


def test_an_offer_that_has_ended_is_given_to_nobody_else_when_its_worker_dies(tmp_path: Path) -> None:
    async def end_and_die() -> None:
        async with opened(tmp_path) as desk:
            with desk.offer(ORDER, body(MORE_THAN_A_SOCKET_HOLDS)):
                first = await claim(tmp_path)
                assert (await granted(first)).accepted
            first.close()
            while len(desk._tasks) > 1:  # the one that accepts stays
                await asyncio.sleep(0.001)
            with await claim(tmp_path) as second:
                assert not (await granted(second)).accepted

    asyncio.run(end_and_die())


def test_a_worker_that_answers_when_nobody_waits_is_heard_to_its_end(tmp_path: Path) -> None:
    errors: list[str] = []

    async def answer_late() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["message"]))
        async with opened(tmp_path) as desk:
            with desk.offer(ORDER, None) as offer:
                worker = await claim(tmp_path)
                assert (await granted(worker)).accepted
                await offer.claimed
                offer.done.cancel()  # as the end of who waits for it does
            with worker:
                await asyncio.get_running_loop().sock_sendall(worker, frame(Answer()))
                await read_to_the_end(worker)
            assert desk.serving("worker", heavy=False) == 0

    asyncio.run(answer_late())
    assert not errors
