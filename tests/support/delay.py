"""A slow network on a fast machine: a TCP forwarder that delays bytes and can limit their rate.

`python -m tests.support.delay --to HOST:PORT --delay-ms 10` prints the address it listens on and forwards until it is
ended. *delay* is one way: a round trip takes two of them. Bytes in flight are kept, so that a delay alone costs no
throughput; a new connection pays the round trip of TCP's handshake before its first byte. `delayed` runs it for you.
"""

from __future__ import annotations

import argparse
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_PIECE_BYTES = 256 << 10
_RATED_PIECE_BYTES = 16 << 10
_RATED_BACKLOG_S = 0.02
"""Bytes that a link with a rate buffers, as a switch does. With more, small answers wait behind large ones."""
_UNRATED_BACKLOG_PIECES = 512
_END = b""


@dataclass
class Link:
    """One direction, shared by all connections: bytes arrive in order, `delay_s` after they were sent."""

    delay_s: float
    rate_bytes_per_s: float | None = None
    _free_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def arrival_s(self, size_bytes: int) -> float:
        """When so many bytes that are sent now arrive, by time.monotonic."""
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic())
            if self.rate_bytes_per_s:
                self._free_s += size_bytes / self.rate_bytes_per_s
            return self._free_s + self.delay_s

    @property
    def piece_bytes(self) -> int:
        """How much is read at once."""
        return _RATED_PIECE_BYTES if self.rate_bytes_per_s else _PIECE_BYTES

    @property
    def backlog_pieces(self) -> int:
        """How many pieces of one connection may be on their way."""
        if not self.rate_bytes_per_s:
            return _UNRATED_BACKLOG_PIECES
        return 2 + int(self.rate_bytes_per_s * (self.delay_s + _RATED_BACKLOG_S) / self.piece_bytes)


def forward(listener: socket.socket, target: tuple[str, int], there: Link, back: Link) -> None:
    """Forward each connection that *listener* accepts to *target*, for ever."""
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_connection, args=(client, target, there, back), daemon=True).start()


def _connection(client: socket.socket, target: tuple[str, int], there: Link, back: Link) -> None:
    try:
        server = socket.create_connection(target)
    except OSError:
        _reset(client)
        return
    for end in (client, server):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    handshaken_s = time.monotonic() + there.delay_s + back.delay_s
    ways = [_way(client, server, there, handshaken_s), _way(server, client, back, handshaken_s)]
    for thread in ways:
        thread.join()
    client.close()
    server.close()


def _way(source: socket.socket, sink: socket.socket, link: Link, not_before_s: float) -> threading.Thread:
    """Start moving bytes one way; the thread ends when all have arrived."""
    under_way: queue.Queue[tuple[float, bytes]] = queue.Queue(link.backlog_pieces)
    threading.Thread(target=_depart, args=(source, under_way, link, not_before_s), daemon=True).start()
    arriving = threading.Thread(target=_arrive, args=(source, sink, under_way), daemon=True)
    arriving.start()
    return arriving


def _depart(
    source: socket.socket, under_way: queue.Queue[tuple[float, bytes]], link: Link, not_before_s: float
) -> None:
    while True:
        try:
            piece = source.recv(link.piece_bytes)
        except OSError:
            piece = _END
        wait_s = not_before_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        under_way.put((link.arrival_s(len(piece)), piece))
        if piece == _END:
            return


def _arrive(source: socket.socket, sink: socket.socket, under_way: queue.Queue[tuple[float, bytes]]) -> None:
    while True:
        arrival_s, piece = under_way.get()
        wait_s = arrival_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        try:
            if piece == _END:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(piece)
        except OSError:
            _end(source)  # the receiver is gone: tell the sender, and let its reader end
            while piece != _END:
                _, piece = under_way.get()
            return


def _end(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    end.close()


@contextmanager
def delayed(
    host: str, port: int, *, delay_s: float, rate_bytes_per_s: float | None = None, listen_host: str = "127.0.0.1"
) -> Iterator[tuple[str, int]]:
    """A forwarder to *host*:*port* in a process of its own; the address to connect to.

    Args:
        delay_s: One way, both ways; a round trip takes two of them.
        rate_bytes_per_s: Limit of each direction, over all connections together.
    """
    command = [sys.executable, "-m", "tests.support.delay", "--to", f"{host}:{port}", "--listen", f"{listen_host}:0"]
    command += ["--delay-ms", str(delay_s * 1000)]
    if rate_bytes_per_s is not None:
        command += ["--rate-bytes-per-s", str(rate_bytes_per_s)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        assert process.stdout is not None
        listens = process.stdout.readline().strip()
        assert listens, f"the forwarder to {host}:{port} did not start"
        yield _address(listens)
    finally:
        process.terminate()
        process.communicate()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="forward TCP, late")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--rate-bytes-per-s", type=float, help="of each direction, over all connections together")
    asked = parser.parse_args()
    there, back = (Link(asked.delay_ms / 1000, asked.rate_bytes_per_s) for _ in range(2))
    with socket.create_server(asked.listen, backlog=512) as listener:
        host, port = listener.getsockname()[:2]
        print(f"{host}:{port}", flush=True)
        forward(listener, asked.to, there, back)


if __name__ == "__main__":
    main()
