"""Bodies on a handed-over connection: each arrives complete, or reading it fails."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearworkers.errors import IntegrityError, InvalidInput, Unavailable
from gearworkers.workers.claim import ClaimedJob, claim
from gearworkers.workers.http_body import STALLED_S, CallerConnection, RequestBody
from gearworkers.workers.messages import (
    CHUNKED,
    ApplyDiff,
    FrameBuffer,
    Granted,
    HttpConnection,
    Message,
    Progress,
    Refused,
    frame,
)
from tests.support.processes import wait_until


@dataclass
class Pair:
    """The sockets of a claimed job, and their peers."""

    caller: socket.socket
    gateway: socket.socket
    connection: socket.socket
    control: socket.socket

    def claimed(
        self,
        received: bytes = b"",
        body_bytes: int = CHUNKED,
        *,
        idle_s: float = 60.0,
        stalled_s: float = STALLED_S,
    ) -> ClaimedJob:
        granted = Granted(ApplyDiff(gear_root="/gear"), HttpConnection(body_bytes, received))
        return ClaimedJob(granted, self.control, CallerConnection(self.connection, self.control, idle_s, stalled_s))

    def reports(self) -> list[Message]:
        """Return the messages that the gateway has received so far."""
        self.gateway.setblocking(False)
        frames = FrameBuffer()
        with suppress(BlockingIOError):
            frames.feed(self.gateway.recv(4096))
        return list(iter(frames.next, None))

    def close(self) -> None:
        for end in (self.caller, self.gateway, self.connection, self.control):
            end.close()


def connected() -> Pair:
    caller, connection = socket.socketpair()
    gateway, control = socket.socketpair()
    connection.setblocking(False)
    return Pair(caller, gateway, connection, control)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = connected()
    yield pair
    pair.close()


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def read_all(body: RequestBody, buffer_bytes: int = 4096) -> bytes:
    buffer = memoryview(bytearray(buffer_bytes))
    read = bytearray()
    while count := body.readinto(buffer):
        read += buffer[:count]
    return bytes(read)


@settings(deadline=None)
@given(
    parts=st.lists(st.binary(min_size=1, max_size=90), min_size=1, max_size=12),
    buffer_bytes=st.integers(1, 64),
    received_bytes=st.integers(0, 400),
)
def test_a_chunked_body_is_decoded_wherever_it_is_split(
    parts: list[bytes], buffer_bytes: int, received_bytes: int
) -> None:
    pair = connected()
    try:
        wire = chunked(parts)
        pair.caller.sendall(wire[received_bytes:])
        assert read_all(pair.claimed(wire[:received_bytes]).request_body(), buffer_bytes) == b"".join(parts)
    finally:
        pair.close()


@settings(deadline=None)
@given(parts=st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=4), data=st.data())
def test_a_chunked_body_that_ends_early_is_an_error(parts: list[bytes], data: st.DataObject) -> None:
    pair = connected()
    try:
        wire = chunked(parts)
        pair.caller.sendall(wire[: data.draw(st.integers(0, len(wire) - 1))])
        pair.caller.close()
        with pytest.raises(Unavailable, match="ended early"):
            read_all(pair.claimed().request_body())
    finally:
        pair.close()


def test_extensions_and_trailers_of_chunks_are_removed(pair: Pair) -> None:
    pair.caller.sendall(b'3;a="b"\r\nabc\r\n0\r\nX: y\r\n\r\n')
    assert read_all(pair.claimed().request_body()) == b"abc"


@pytest.mark.parametrize(
    "wire",
    [
        b"x\r\n",
        b"-1\r\nab",
        b"3\r\nabcd\r\n",
        b"\r\n",
        b"1" * 16 + b"\r\n",
        b"a" * 5000,
        b"0\r\n\r\nmore",
        b"+3\r\nabc",
    ],
)
def test_malformed_chunks_are_an_error(pair: Pair, wire: bytes) -> None:
    pair.caller.sendall(wire)
    with pytest.raises(IntegrityError, match="the request's body"):
        read_all(pair.claimed().request_body())


@pytest.mark.parametrize(("wire", "body_bytes"), [(b"0\r\n\r\n", CHUNKED), (b"", 0)])
def test_an_empty_body_ends(pair: Pair, wire: bytes, body_bytes: int) -> None:
    pair.caller.sendall(wire)
    assert read_all(pair.claimed(body_bytes=body_bytes).request_body()) == b""


def test_a_body_ends_at_its_length_and_an_earlier_end_is_an_error(pair: Pair) -> None:
    pair.caller.sendall(b"cdef")
    assert read_all(pair.claimed(b"ab", 6).request_body()) == b"abcdef"
    pair.caller.close()
    with pytest.raises(Unavailable, match="ended early"):
        read_all(pair.claimed(b"ab", 6).request_body())


def test_a_waiting_reader_notices_the_death_of_the_gateway(pair: Pair) -> None:
    pair.caller.sendall(b"1\r\na\r\n")
    source = pair.claimed().request_body()
    buffer = memoryview(bytearray(10))
    assert source.readinto(buffer) == 1
    threading.Timer(0.05, pair.gateway.shutdown, (socket.SHUT_RDWR,)).start()
    with pytest.raises(Unavailable, match="gateway has died"):
        source.readinto(buffer)


def test_a_body_that_ends_after_the_death_of_the_gateway_is_an_error(pair: Pair) -> None:
    pair.caller.sendall(chunked([b"abc"]))
    pair.gateway.close()
    with pytest.raises(Unavailable, match="gateway has died"):
        read_all(pair.claimed().request_body())


def test_written_bytes_arrive_as_one_complete_response(pair: Pair) -> None:
    sink = pair.claimed().response_body()
    parts: list[bytes | bytearray | memoryview] = [b"a" * 10, bytearray(b"b" * 100_000), memoryview(b"c" * 3)]
    for part in parts:
        sink.write(part)
    sink.finish()
    pair.connection.shutdown(socket.SHUT_WR)
    response = http.client.HTTPResponse(pair.caller)
    response.begin()
    assert response.status == 200
    assert response.read() == b"".join(parts)
    response.close()


def test_the_beginning_of_a_response_is_reported_just_before_its_first_byte(pair: Pair) -> None:
    sink = pair.claimed().response_body()
    sink.write(b"small")
    assert pair.reports() == []
    sink.write(bytes(100_000))
    assert pair.reports() == [Progress(response_begun=True)]


def test_a_stall_of_the_caller_and_its_end_are_reported(pair: Pair) -> None:
    reports: list[Message] = []

    def has_reported() -> bool:
        reports.extend(pair.reports())
        return bool(reports)

    def send_late() -> None:
        wait_until(has_reported, "the stall is reported")
        pair.caller.sendall(chunked([b"late"]))

    late = threading.Thread(target=send_late)
    late.start()
    assert read_all(pair.claimed().request_body()) == b"late"
    late.join()
    assert [*reports, *pair.reports()] == [Progress(stalled=True), Progress()]


def test_a_caller_that_sends_nothing_for_too_long_is_given_up(pair: Pair) -> None:
    pair.caller.sendall(b"3\r\nabc\r\n")
    with pytest.raises(Unavailable, match=r"nothing for 0\.01 s; GEAR_STREAM_IDLE_S"):
        read_all(pair.claimed(idle_s=0.01, stalled_s=0.01).request_body())


def test_a_caller_that_receives_nothing_for_too_long_is_given_up(pair: Pair) -> None:
    with pytest.raises(Unavailable, match="nothing for"):
        pair.claimed(idle_s=0.01, stalled_s=0.01).response_body().write(bytes(64 << 20))
    assert pair.reports() == [Progress(response_begun=True), Progress(response_begun=True, stalled=True)]


def test_the_limit_for_a_stalled_caller_may_be_infinite(pair: Pair) -> None:
    threading.Timer(0.1, pair.caller.sendall, (chunked([b"abc"]),)).start()
    assert read_all(pair.claimed(idle_s=float("inf"), stalled_s=0.01).request_body()) == b"abc"


def test_writing_fails_after_the_caller_has_closed_the_connection(pair: Pair) -> None:
    pair.caller.close()
    with pytest.raises(Unavailable, match="the caller closed the connection"):
        pair.claimed().response_body().write(bytes(100_000))


def test_a_waiting_writer_notices_the_death_of_the_gateway(pair: Pair) -> None:
    threading.Timer(0.05, pair.gateway.shutdown, (socket.SHUT_RDWR,)).start()
    sink = pair.claimed().response_body()
    with pytest.raises(Unavailable, match="gateway has died"):
        for _ in range(1000):
            sink.write(bytes(1 << 16))


def test_split_messages_are_decoded_and_malformed_ones_are_rejected() -> None:
    messages: list[Message] = [Granted(ApplyDiff(gear_root="/gear"), HttpConnection(received=b"abc")), Refused()]
    wire = b"".join(frame(message) for message in messages)
    frames = FrameBuffer()
    found = []
    for at in range(len(wire)):
        frames.feed(wire[at : at + 1])
        if (message := frames.next()) is not None:
            found.append(message)
    assert found == messages
    for malformed, why in ((b"\xff\xff\xff\x7f", "a message of"), (b"\1\0\0\0\x90", "Expected")):
        frames = FrameBuffer()
        frames.feed(malformed)
        with pytest.raises(InvalidInput, match=why):
            frames.next()


def test_a_caller_notices_the_death_of_a_gateway_in_the_middle_of_a_grant(pair: Pair, tmp_path: Path) -> None:
    def die(listener: socket.socket) -> None:
        control, _ = listener.accept()
        with control, pair.connection:
            control.recv(4096)
            granted = frame(Granted(ApplyDiff(gear_root="/gear"), HttpConnection(received=b"abc")))
            socket.send_fds(control, [granted[:-1]], [pair.connection.fileno()])

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "streams.sock"))
        listener.listen()
        gateway = threading.Thread(target=die, args=(listener,))
        gateway.start()
        with (
            pytest.raises(Unavailable, match="closed the connection"),
            claim(tmp_path / "streams.sock", "token", "worker"),
        ):
            pass
        gateway.join()
    pair.caller.settimeout(60)
    assert pair.caller.recv(1) == b""
