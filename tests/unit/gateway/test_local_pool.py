"""The gateway's own processes: how many there are, whom they keep waiting, and that they end with the gateway."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gearworkers.settings import Settings
from gearworkers.workers.messages import Claim, Order
from plugin_gateway.dispatch import local_pool as module
from plugin_gateway.dispatch.claims import Body, Changes, Offer
from plugin_gateway.dispatch.dispatcher import make_order
from plugin_gateway.dispatch.local_pool import OwnPool

CORES = 2


def an_offer(call: str, settings: Settings | None = None) -> Offer:
    return Offer(make_order(call, settings or Settings()), None if call == "push" else Body(-1))


@dataclass
class Threads:
    """Instead of processes: each order is at work until it is finished."""

    pool: OwnPool
    changes: Changes
    begun: list[Order] = field(default_factory=list)
    ends: dict[str, threading.Event] = field(default_factory=dict)

    def work(self, settings: Settings, order: Order) -> None:
        self.begun.append(order)
        assert self.ends.setdefault(order.token, threading.Event()).wait(60)

    def perform(self, call: str) -> tuple[Offer, asyncio.Task[None]]:
        offer = an_offer(call)
        return offer, asyncio.ensure_future(self.pool.perform(offer))

    def stall(self, offer: Offer) -> None:
        offer.stalled = True
        self.changes.tell()

    def finish(self, *offers: Offer) -> None:
        for offer in offers:
            self.ends.setdefault(offer.order.token, threading.Event()).set()

    async def begins(self, *offers: Offer) -> None:
        async with asyncio.timeout(60):
            while not {offer.order.token for offer in offers} <= {order.token for order in self.begun}:
                await asyncio.sleep(0.001)

    def has_begun(self, offer: Offer) -> bool:
        return offer.order in self.begun


def with_threads(monkeypatch: pytest.MonkeyPatch, test: Callable[[Threads], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        changes = Changes()
        threads = Threads(OwnPool(Settings(), changes), changes)
        monkeypatch.setattr(module, "_perform", threads.work)
        await test(threads)
        threads.pool.close()

    monkeypatch.setattr(os, "cpu_count", lambda: CORES)
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda processes, *_: ThreadPoolExecutor(processes))
    asyncio.run(run())


def test_as_many_are_at_work_as_there_are_cores_and_the_next_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(threads: Threads) -> None:
        offers, tasks = zip(*(threads.perform("apply_diff") for _ in range(CORES + 2)), strict=True)
        await threads.begins(*offers[:CORES])
        threads.finish(offers[0])
        await threads.begins(offers[CORES])
        assert not threads.has_begun(offers[-1])
        threads.finish(*offers)
        await asyncio.gather(*tasks)
        assert len(threads.pool._processes) == CORES

    with_threads(monkeypatch, test)


def test_one_that_waits_for_its_caller_makes_room_for_another_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(threads: Threads) -> None:
        most = CORES * module._MOST_PER_CORE
        offers, tasks = zip(*(threads.perform("apply_diff") for _ in range(most + 1)), strict=True)
        for offer in offers[:most]:
            await threads.begins(offer)
            threads.stall(offer)
        assert not threads.has_begun(offers[most])
        threads.finish(offers[3])
        await threads.begins(offers[most])
        threads.finish(*offers)
        await asyncio.gather(*tasks)

    with_threads(monkeypatch, test)


def test_diffs_and_upkeep_keep_no_apply_diff_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(threads: Threads) -> None:
        others, tasks = zip(*(threads.perform(call) for call in ("diff", "push") * (CORES + 1)), strict=True)
        offer, task = threads.perform("apply_diff")
        await threads.begins(offer)
        threads.finish(offer, *others)
        await asyncio.gather(task, *tasks)

    with_threads(monkeypatch, test)


@pytest.mark.parametrize("how", ["claimed", "withdrawn"])
def test_one_that_nobody_has_to_do_any_more_is_left_alone(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async def test(threads: Threads) -> None:
        offers, tasks = zip(*(threads.perform("diff") for _ in range(CORES)), strict=True)
        late, waiting = threads.perform("diff")
        await threads.begins(*offers)
        if how == "claimed":
            late.claimed.set_result(Claim("", "worker", 1))
        else:
            late.withdrawn = True
        threads.changes.tell()
        await waiting
        assert not threads.has_begun(late)
        threads.finish(*offers)
        await asyncio.gather(*tasks)

    with_threads(monkeypatch, test)


# -- with processes


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path)


@pytest.fixture
def listener(settings: Settings) -> Iterator[socket.socket]:
    """The streams socket, which grants nothing: whoever claims waits."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(str(settings.streams_socket))
        listener.listen()
        yield listener
    for process in multiprocessing.active_children():
        process.join(60)
    assert not multiprocessing.active_children()


async def read_to_the_end(control: socket.socket) -> None:
    async with asyncio.timeout(60):
        while await asyncio.get_running_loop().sock_recv(control, 4096):
            pass


def test_what_is_under_way_ends_when_the_pool_is_closed(settings: Settings, listener: socket.socket) -> None:
    async def close_while_busy() -> None:
        pool = OwnPool(settings, Changes())
        working = asyncio.ensure_future(pool.perform(an_offer("push", settings)))
        control, _ = await asyncio.get_running_loop().sock_accept(listener)
        with control:
            pool.close()
            await read_to_the_end(control)
            with pytest.raises(BrokenProcessPool):
                await working

    asyncio.run(close_while_busy())


def test_a_process_that_dies_takes_no_other_with_it(settings: Settings, listener: socket.socket) -> None:
    async def kill_one() -> None:
        loop, pool = asyncio.get_running_loop(), OwnPool(settings, Changes())
        working = {asyncio.ensure_future(pool.perform(an_offer(call, settings))) for call in ("diff", "apply_diff")}
        (first, _), (second, _) = [await loop.sock_accept(listener) for _ in range(2)]
        with first, second:
            credentials = first.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            os.kill(int.from_bytes(credentials[:4], "little"), signal.SIGKILL)
            await read_to_the_end(first)
            (ended,), (other,) = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
            assert isinstance(ended.exception(), BrokenProcessPool)
            assert await loop.sock_recv(second, 4096)  # its claim, and no end behind it
            with pytest.raises(BlockingIOError):
                second.recv(1)
            pool.close()
            await read_to_the_end(second)
            with pytest.raises(BrokenProcessPool):
                await other

    asyncio.run(kill_one())
