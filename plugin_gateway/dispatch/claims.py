"""The streams socket: where offers lie until a process claims them, and what is known of those that did."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import structlog

from gearworkers.errors import InvalidInput
from gearworkers.workers.messages import CHUNKED, Answer, Claim, FrameBuffer, Grant, Order, Progress, frame
from plugin_gateway.metrics import Metrics
from plugin_gateway.sockets import listen

_log = structlog.stdlib.get_logger(__name__)

_CLAIM_TIMEOUT_S = 10.0
_GRANT_TIMEOUT_S = 30.0
_ACCEPT_AGAIN_S = 0.2


@dataclass(frozen=True, slots=True)
class Body:
    """A caller's connection to be handed over, and what was read of its body."""

    fd: int
    """A duplicate, closed with the offer."""
    body_bytes: int = CHUNKED
    head: bytes = b""


class Changes:
    """Wakes those who wait for the next change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def next(self) -> None:
        """Return when `tell` is called."""
        await self._event.wait()

    def tell(self) -> None:
        """Something has changed."""
        self._event.set()
        self._event.clear()


@dataclass(slots=True, eq=False)
class Offer:
    """One order, waiting for whoever claims its token first."""

    order: Order
    body: Body | None
    claimed: asyncio.Future[Claim] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    done: asyncio.Future[Answer | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """The answer; None if the process died without one."""
    started: bool = False
    """Whether the answer's first byte may have been written to the connection."""
    stalled: bool = False
    """Whether the process that does it waits for the caller."""
    withdrawn: bool = False
    """Whether nobody waits for it any more; its body is closed."""

    @property
    def heavy(self) -> bool:
        """Whether Docker waits for it."""
        return self.body is not None

    @property
    def kind(self) -> str:
        """``apply_diff``, ``diff`` or ``upkeep``."""
        return self.order.call if self.heavy else "upkeep"


class Desk:
    """Listens on the streams socket at *path*."""

    def __init__(self, path: Path, metrics: Metrics) -> None:
        self._path = path
        self._metrics = metrics
        self._offers: dict[str, Offer] = {}
        self._served: set[Offer] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.changes = Changes()
        """Of what is offered, claimed, stalled and ended."""
        self._is_open = False
        self.last_sign_s = 0.0
        """When a worker last claimed or ended an order, on the monotonic clock."""

    def open(self) -> None:
        """Begin to listen; FailedPrecondition if another gateway does."""
        listener = listen(self._path)
        self._is_open = True
        self._spawn(self._accept(listener))

    def close(self) -> None:
        """Stop listening, and let go of all that are served: they see it and give up."""
        for task in self._tasks:
            task.cancel()
        if self._is_open:
            self._path.unlink(missing_ok=True)

    def serving(self, by: str, *, heavy: bool) -> int:
        """How many orders processes of that kind are doing now."""
        return sum(offer.heavy == heavy and offer.claimed.result().by == by for offer in self._served)

    def stalled(self, by: str) -> int:
        """How many of them wait for their callers."""
        return sum(offer.stalled and offer.claimed.result().by == by for offer in self._served)

    @contextmanager
    def offer(self, order: Order, body: Body | None) -> Iterator[Offer]:
        """Lay *order* out for claims until the context ends."""
        offer = Offer(order, body)
        self._offers[order.token] = offer
        try:
            yield offer
        finally:
            offer.withdrawn = True
            self._offers.pop(order.token, None)
            if body is not None:
                os.close(body.fd)
            self.changes.tell()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    control, _ = await loop.sock_accept(listener)
                except OSError as exc:  # no descriptors or memory for now; who claims waits
                    _log.error("claims cannot be accepted", error=str(exc), again_s=_ACCEPT_AGAIN_S)
                    await asyncio.sleep(_ACCEPT_AGAIN_S)
                    continue
                control.setblocking(False)
                self._spawn(self._serve(control))

    def _spawn(self, work: asyncio._CoroutineLike[None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, control: socket.socket) -> None:
        """One process, from its claim to its answer or its death."""
        with control:
            try:
                frames = FrameBuffer()
                async with asyncio.timeout(_CLAIM_TIMEOUT_S):
                    message = await _next(control, frames)
                if message is not None:
                    await self._settle(control, frames, msgspec.json.decode(message, type=Claim))
            except (OSError, InvalidInput, msgspec.DecodeError) as exc:
                _log.warning("a claim went wrong", error=f"{type(exc).__name__}: {exc}")

    async def _settle(self, control: socket.socket, frames: FrameBuffer, claim: Claim) -> None:
        offer = self._offers.pop(claim.token, None)
        if offer is None:
            await asyncio.get_running_loop().sock_sendall(control, frame(Grant(False)))
            return
        try:
            async with asyncio.timeout(_GRANT_TIMEOUT_S):
                await _grant(control, offer.body)
        except OSError:
            if not offer.withdrawn:
                self._offers[claim.token] = offer  # it died before it had anything: the next may try
            raise
        if offer.withdrawn:
            return  # the end of its control connection tells it
        offer.claimed.set_result(claim)
        self._served.add(offer)
        self._metrics.orders.labels(offer.order.call, claim.by).inc()
        self._note_change(claim)
        try:
            await self._follow(control, frames, offer)
        finally:
            self._served.discard(offer)
            self._note_change(claim)
            if not offer.done.done():
                offer.done.set_result(None)

    async def _follow(self, control: socket.socket, frames: FrameBuffer, offer: Offer) -> None:
        while (message := await _next(control, frames)) is not None:
            news = msgspec.json.decode(message, type=Answer | Progress)
            if isinstance(news, Answer):
                if not offer.withdrawn:
                    offer.done.set_result(news)
                return
            offer.started, offer.stalled = news.started, news.stalled
            self._note_change(offer.claimed.result())

    def _note_change(self, claim: Claim) -> None:
        self._metrics.serving.labels(claim.by).set(sum(self.serving(claim.by, heavy=heavy) for heavy in (True, False)))
        self._metrics.stalled.labels(claim.by).set(self.stalled(claim.by))
        if claim.by == "worker":
            self.last_sign_s = time.monotonic()
        self.changes.tell()


async def _grant(control: socket.socket, body: Body | None) -> None:
    """Say yes; the frame is small and the socket's buffer empty, so it goes at once, and the descriptor with it."""
    if body is None:
        await asyncio.get_running_loop().sock_sendall(control, frame(Grant(True)))
        return
    grant = frame(Grant(True, True, body.body_bytes, len(body.head)))
    sent = socket.send_fds(control, [grant], [body.fd])
    await asyncio.get_running_loop().sock_sendall(control, grant[sent:] + body.head)


async def _next(control: socket.socket, frames: FrameBuffer) -> bytes | None:
    """The next frame; None at the connection's end."""
    while (message := frames.next()) is None:
        try:
            data = await asyncio.get_running_loop().sock_recv(control, 65536)
        except ConnectionResetError:
            return None
        if not data:
            return None
        frames.feed(data)
    return message
