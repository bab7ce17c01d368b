"""The slow network of tests and benches is as slow as it says, and not slower."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.delay import delayed

SIZE_BYTES = 64 << 20


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it is sent, each connection on its own."""

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


def test_a_round_trip_takes_two_delays_and_the_first_one_also_the_handshake(echo: tuple[str, int]) -> None:
    with delayed(*echo, delay_s=0.05) as address, socket.create_connection(address) as connection:
        assert 0.2 <= _round_trip_s(connection) < 0.4
        assert 0.1 <= min(_round_trip_s(connection) for _ in range(3)) < 0.15


def test_a_delay_alone_does_not_limit_throughput(echo: tuple[str, int]) -> None:
    with delayed(*echo, delay_s=0.05) as address, socket.create_connection(address) as connection:
        assert _echoed_s(connection, SIZE_BYTES) < 5.0  # one window of 64 KiB a round trip would be 100 s


def test_a_rate_is_shared_by_all_connections(echo: tuple[str, int]) -> None:
    with (
        delayed(*echo, delay_s=0.0, rate_bytes_per_s=10e6) as address,
        socket.create_connection(address) as one,
        socket.create_connection(address) as other,
    ):
        began_s = time.monotonic()
        threads = [threading.Thread(target=_echoed_s, args=(connection, 5_000_000)) for connection in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0.99 <= time.monotonic() - began_s < 3.0


def test_ends_pass_through(echo: tuple[str, int]) -> None:
    with delayed(*echo, delay_s=0.01) as address, socket.create_connection(address) as connection:
        connection.sendall(b"last")
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(10):
            received += data
        assert received == b"last"


def test_a_server_that_refuses_is_seen(echo: tuple[str, int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with delayed("127.0.0.1", port, delay_s=0.01) as address, socket.create_connection(address) as connection:
        connection.settimeout(10)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
