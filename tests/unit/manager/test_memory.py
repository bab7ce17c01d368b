"""Limit the memory of a manager while many clients push slowly."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from gearworkers.errors import InvalidInput
from gearworkers.manager.async_remote import AsyncRemote, ReceivedBlob
from gearworkers.manager.memory_budget import MemoryBudget
from gearworkers.remote import blob_stream, encoding
from gearworkers.remote.directory import DirectoryStore
from gearworkers.remote.manager import ManagerStore
from gearworkers.remote.remote import Remote
from gearworkers.settings import RemoteSettings
from tests.support.manager_calls import peak_bytes
from tests.support.remotes import Service, figures, manager_server

MIB = 1 << 20
CLIENTS = 24
SENT_BYTES = 12 * MIB
MAX_GROWTH_BYTES = 64 * MIB


def begun(server: Service, head: str, before: bytes = b"") -> socket.socket:
    """Return a client that sends all but the last byte of a large body, and then stalls."""
    parts = urlsplit(server.url)
    client = socket.create_connection((parts.hostname or "", parts.port or 0))
    head = f"{head} HTTP/1.1\r\nHost: m\r\nContent-Length: {len(before) + SENT_BYTES + 1}\r\n\r\n"
    client.sendall(head.encode() + before + bytes(SENT_BYTES))
    return client


def layout_begun(server: Service) -> socket.socket:
    return begun(server, "POST /v1/push", blob_stream.HEADER.pack(b"d" * 32, SENT_BYTES + 1))


def document_begun(server: Service) -> socket.socket:
    return begun(server, "PUT /v1/documents/slow")


@pytest.mark.slow
@pytest.mark.parametrize("begin", [layout_begun, document_begun])
def test_slow_clients_with_large_bodies_use_little_memory_and_do_not_delay_others(
    begin: Callable[[Service], socket.socket], tmp_path: Path
) -> None:
    with manager_server(tmp_path) as server, ExitStack() as clients:
        store = ManagerStore(server.url, RemoteSettings(), "test")
        put(store, b"warm" * 1000)
        before_bytes = peak_bytes(server)
        received = received_bytes(server)
        for _ in range(CLIENTS):
            clients.enter_context(begin(server))
        while received_bytes(server) - received < CLIENTS * SENT_BYTES:
            pass
        put(store, b"quick" * 1000)
        grown_bytes = peak_bytes(server) - before_bytes
        store.close()
    assert grown_bytes < MAX_GROWTH_BYTES


def put(store: ManagerStore, content: bytes) -> None:
    digest = hashlib.sha256(content).digest()
    store.put_many([(digest, encoding.encode(content))])
    assert store.present([digest])


def received_bytes(server: Service) -> float:
    return figures(server)["gear_manager_received_bytes_total"]


class BlockingStore(DirectoryStore):
    """A store whose puts wait for `released`; it records the largest number of bytes in its puts at one time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.released = threading.Event()
        self.pending_bytes = self.peak_bytes = 0
        self._lock = threading.Lock()

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        size_bytes = sum(len(blob) for _, blob in blobs)
        with self._lock:
            self.pending_bytes += size_bytes
            self.peak_bytes = max(self.peak_bytes, self.pending_bytes)
        self.released.wait()
        super().put_many(blobs)
        with self._lock:
            self.pending_bytes -= size_bytes


def test_contents_that_are_stored_at_once_fit_into_the_budget(tmp_path: Path) -> None:
    """Of twenty pushes of 1 MiB into a slow store, two fit at once."""
    slow = BlockingStore(tmp_path)
    store = AsyncRemote(Remote(slow), 1 << 30, budget_bytes=4 * MIB + 100)
    loaded = 0

    def load(blob: ReceivedBlob) -> bytes:
        nonlocal loaded
        loaded += blob.size_bytes > 1
        return contents[blob.digest][: blob.size_bytes]

    contents = {hashlib.sha256(raw).digest(): b"R" + raw for raw in (bytes([at]) * MIB for at in range(20))}

    async def push_all() -> list[int]:
        pushes = [
            asyncio.ensure_future(store.put_blobs([ReceivedBlob(digest, 0, len(blob))], load))
            for digest, blob in contents.items()
        ]
        while slow.pending_bytes < 2 * MIB:
            await asyncio.sleep(0)
        for _ in range(100):
            await store.run(lambda: None)  # every push that fits has started by now
        assert loaded == 2
        slow.released.set()
        return await asyncio.gather(*pushes)

    assert asyncio.run(push_all()) == [1] * 20
    assert slow.peak_bytes <= 2 * (MIB + 1)
    assert slow.present(list(contents)) == set(contents)
    store.close()


def test_a_too_large_content_is_rejected_before_it_is_read(tmp_path: Path) -> None:
    store = AsyncRemote(Remote(DirectoryStore(tmp_path)), 1 << 30)
    read = []

    def load(blob: ReceivedBlob) -> bytes:
        read.append(blob.size_bytes)
        return b"R"

    with pytest.raises(InvalidInput, match="needs a layout"):
        asyncio.run(store.put_blobs([ReceivedBlob(bytes(32), 0, 75 * MIB)], load))
    assert read == [1]
    store.close()


def test_reservations_are_granted_in_turn_and_a_too_large_reservation_gets_the_whole_budget() -> None:
    async def take() -> list[str]:
        budget, events, end = MemoryBudget(10), list[str](), asyncio.Event()

        async def taker(name: str, size_bytes: int) -> None:
            async with budget.reserved(size_bytes):
                events.append(name)
                await end.wait()
            events.append(f"{name} ended")

        tasks = [asyncio.ensure_future(taker(name, size)) for name, size in (("a", 6), ("all", 1000), ("b", 1))]
        for _ in range(10):
            await asyncio.sleep(0)
        assert events == ["a"], "b would fit, but does not overtake the pending reservation"
        tasks[1].cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert events == ["a", "b"], "a cancelled reservation does not delay others"
        end.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with budget.reserved(1000):
            pass
        return events

    assert asyncio.run(take()) == ["a", "b", "a ended", "b ended"]
