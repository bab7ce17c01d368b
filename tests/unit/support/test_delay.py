"""The simulated slow network has the configured delay and rate."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.delay import delayed
from tests.support.ports import free_port

pytestmark = pytest.mark.slow

SIZE_BYTES = 64 << 20


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """Run an echo server; return its address."""

    def serve(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1 << 20):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)


def _round_trip_s(connection: socket.socket) -> float:
    began_s = time.monotonic()
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
    return time.monotonic() - began_s


def _echoed_s(connection: socket.socket, size_bytes: int) -> float:
    began_s = time.monotonic()
    sender = threading.Thread(target=connection.sendall, args=(bytes(size_bytes),))
    sender.start()
    left_bytes = size_bytes
    while left_bytes:
        left_bytes -= len(connection.recv(1 << 20))
    sender.join()
    return time.monotonic() - began_s


def _min_s(measure: Callable[[], float], limit_s: float) -> float:
    """Return the minimum of up to 20 measurements, since other work delays some; stop below *limit_s*."""
    min_s = measure()
    for _ in range(19):
        if min_s < limit_s:
            break
        min_s = min(min_s, measure())
    return min_s


def test_a_round_trip_takes_two_delays_and_a_handshake_two_more(echo: tuple[str, int]) -> None:
    with delayed(*echo, delay_s=0.05) as address:

        def first_s() -> float:
            with socket.create_connection(address) as connection:
                return _round_trip_s(connection)

        assert 0.2 <= _min_s(first_s, 0.4) < 0.4
        with socket.create_connection(address) as connection:
            _round_trip_s(connection)
            assert 0.1 <= _min_s(lambda: _round_trip_s(connection), 0.15) < 0.15


def test_a_delay_alone_does_not_limit_throughput(echo: tuple[str, int]) -> None:
    with delayed(*echo, delay_s=0.05) as address, socket.create_connection(address) as connection:
        assert _echoed_s(connection, SIZE_BYTES) < 50.0  # one window of 64 KiB per round trip would take 100 s


def test_all_connections_share_the_rate(echo: tuple[str, int]) -> None:
    with (
        delayed(*echo, delay_s=0.0, rate_bytes_per_s=10e6) as address,
        socket.create_connection(address) as one,
        socket.create_connection(address) as other,
    ):

        def both_s() -> float:
            began_s = time.monotonic()
            threads = [threading.Thread(target=_echoed_s, args=(connection, 5_000_000)) for connection in (one, other)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return time.monotonic() - began_s

        assert 0.99 <= _min_s(both_s, 3.0) < 3.0


def test_the_end_of_a_stream_is_forwarded(echo: tuple[str, int]) -> None:
    with delayed(*echo, delay_s=0.01) as address, socket.create_connection(address) as connection:
        connection.sendall(b"last")
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(10):
            received += data
        assert received == b"last"


def test_a_refused_connection_is_reset(echo: tuple[str, int]) -> None:
    with (
        delayed("127.0.0.1", free_port(), delay_s=0.01) as address,
        socket.create_connection(address) as connection,
    ):
        connection.settimeout(60)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
