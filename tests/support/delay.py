"""A simulated slow network: a TCP forwarder that delays bytes and can limit their rate.

`python -m tests.support.delay --to HOST:PORT --delay-ms 10` prints the address it listens on and forwards until it is
killed; `delayed` runs it as a context manager. The delay is one way: a round trip takes two of them. The forwarder
buffers bytes in flight, so a delay alone does not reduce the throughput. A new connection waits one round trip for
TCP's handshake before its first byte.
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
    """One direction, shared by all connections: bytes arrive in order, `delay_s` after they are sent."""

    delay_s: float
    rate_bytes_per_s: float | None = None
    _free_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def arrival_s(self, size_bytes: int) -> float:
        """Send *size_bytes* now; return when they arrive, by time.monotonic."""
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic())
            if self.rate_bytes_per_s:
                self._free_s += size_bytes / self.rate_bytes_per_s
            return self._free_s + self.delay_s

    @property
    def piece_bytes(self) -> int:
        """Maximum number of bytes read at once."""
        return _RATED_PIECE_BYTES if self.rate_bytes_per_s else _PIECE_BYTES

    @property
    def backlog_pieces(self) -> int:
        """Maximum number of pieces of one connection in flight."""
        if not self.rate_bytes_per_s:
            return _UNRATED_BACKLOG_PIECES
        return 2 + int(self.rate_bytes_per_s * (self.delay_s + _RATED_BACKLOG_S) / self.piece_bytes)


def forward(listener: socket.socket, target: tuple[str, int], request_link: Link, answer_link: Link) -> None:
    """Forward each connection that *listener* accepts to *target*; never return."""
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_connection, args=(client, target, request_link, answer_link), daemon=True).start()


def _connection(client: socket.socket, target: tuple[str, int], request_link: Link, answer_link: Link) -> None:
    try:
        server = socket.create_connection(target)
    except OSError:
        _reset(client)
        return
    for end in (client, server):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    handshake_end_s = time.monotonic() + request_link.delay_s + answer_link.delay_s
    threads = [
        _start_direction(client, server, request_link, handshake_end_s),
        _start_direction(server, client, answer_link, handshake_end_s),
    ]
    for thread in threads:
        thread.join()
    client.close()
    server.close()


def _start_direction(source: socket.socket, sink: socket.socket, link: Link, not_before_s: float) -> threading.Thread:
    """Start to move bytes in one direction; return the thread that ends when all have arrived."""
    in_flight: queue.Queue[tuple[float, bytes]] = queue.Queue(link.backlog_pieces)
    threading.Thread(target=_send_pieces, args=(source, in_flight, link, not_before_s), daemon=True).start()
    receiver = threading.Thread(target=_deliver_pieces, args=(source, sink, in_flight), daemon=True)
    receiver.start()
    return receiver


def _send_pieces(
    source: socket.socket, in_flight: queue.Queue[tuple[float, bytes]], link: Link, not_before_s: float
) -> None:
    while True:
        try:
            piece = source.recv(link.piece_bytes)
        except OSError:
            piece = _END
        wait_s = not_before_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        in_flight.put((link.arrival_s(len(piece)), piece))
        if piece == _END:
            return


def _deliver_pieces(source: socket.socket, sink: socket.socket, in_flight: queue.Queue[tuple[float, bytes]]) -> None:
    while True:
        arrival_s, piece = in_flight.get()
        wait_s = arrival_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        try:
            if piece == _END:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(piece)
        except OSError:
            _shut_down(source)  # the receiver has closed: stop the sender and the thread that reads from it
            while piece != _END:
                _, piece = in_flight.get()
            return


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


@contextmanager
def delayed(
    host: str, port: int, *, delay_s: float, rate_bytes_per_s: float | None = None, listen_host: str = "127.0.0.1"
) -> Iterator[tuple[str, int]]:
    """Run a forwarder to *host*:*port* in a process; yield the address to connect to.

    Args:
        delay_s: Delay of each direction; a round trip takes two of them.
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
        address = process.stdout.readline().strip()
        assert address, f"the forwarder to {host}:{port} did not start"
        yield _address(address)
    finally:
        process.terminate()
        process.communicate()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    """Run the forwarder."""
    parser = argparse.ArgumentParser(description="forward TCP with a delay")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--rate-bytes-per-s", type=float, help="of each direction, over all connections together")
    arguments = parser.parse_args()
    request_link, answer_link = (Link(arguments.delay_ms / 1000, arguments.rate_bytes_per_s) for _ in range(2))
    with socket.create_server(arguments.listen, backlog=512) as listener:
        host, port = listener.getsockname()[:2]
        print(f"{host}:{port}", flush=True)
        forward(listener, arguments.to, request_link, answer_link)


if __name__ == "__main__":
    main()
