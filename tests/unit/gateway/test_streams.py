"""A body comes out of a connection as it went in, or as an error; never shorter."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearworkers.errors import GearError, IntegrityError, Unavailable
from gearworkers.workers import http_body
from gearworkers.workers.claim import Stream, claimed
from gearworkers.workers.http_body import BodySource
from gearworkers.workers.messages import CHUNKED, FrameBuffer, Grant, Progress, frame
from tests.support.processes import wait_until


@dataclass
class Pair:
    """A stream with both of its far ends."""

    caller: socket.socket
    gateway: socket.socket
    connection: socket.socket
    control: socket.socket

    def stream(self, head: bytes = b"", body_bytes: int = CHUNKED, idle_s: float = 60.0) -> Stream:
        return Stream(self.control, self.connection, Grant(True, True, body_bytes, len(head)), head, idle_s)

    def told(self) -> list[Progress]:
        """What the gateway has heard so far."""
        self.gateway.setblocking(False)
        frames = FrameBuffer()
        with suppress(BlockingIOError):
            frames.feed(self.gateway.recv(4096))
        return [msgspec.json.decode(message, type=Progress) for message in iter(frames.next, None)]

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


def read_all(source: BodySource, buffer_bytes: int = 4096) -> bytes:
    buffer = memoryview(bytearray(buffer_bytes))
    body = bytearray()
    while count := source.readinto(buffer):
        body += buffer[:count]
    return bytes(body)


@settings(deadline=None)
@given(
    parts=st.lists(st.binary(min_size=1, max_size=90), min_size=1, max_size=12),
    buffer_bytes=st.integers(1, 64),
    head_bytes=st.integers(0, 400),
)
def test_a_chunked_body_is_the_same_however_it_is_cut(parts: list[bytes], buffer_bytes: int, head_bytes: int) -> None:
    pair = connected()
    try:
        wire = chunked(parts)
        pair.caller.sendall(wire[head_bytes:])
        assert read_all(pair.stream(wire[:head_bytes]).source(), buffer_bytes) == b"".join(parts)
    finally:
        pair.close()


@settings(deadline=None)
@given(parts=st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=4), data=st.data())
def test_a_chunked_body_cut_anywhere_is_an_error(parts: list[bytes], data: st.DataObject) -> None:
    pair = connected()
    try:
        wire = chunked(parts)
        pair.caller.sendall(wire[: data.draw(st.integers(0, len(wire) - 1))])
        pair.caller.close()
        with pytest.raises(Unavailable, match="broke off"):
            read_all(pair.stream().source())
    finally:
        pair.close()


def test_extensions_and_trailers_of_chunks_are_taken_off(pair: Pair) -> None:
    pair.caller.sendall(b'3;a="b"\r\nabc\r\n0\r\nX: y\r\n\r\n')
    assert read_all(pair.stream().source()) == b"abc"


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
        read_all(pair.stream().source())


@pytest.mark.parametrize(("wire", "body_bytes"), [(b"0\r\n\r\n", CHUNKED), (b"", 0)])
def test_a_body_of_no_bytes_has_an_end(pair: Pair, wire: bytes, body_bytes: int) -> None:
    pair.caller.sendall(wire)
    assert read_all(pair.stream(body_bytes=body_bytes).source()) == b""


def test_a_body_with_a_length_is_read_to_that_length_and_an_early_end_is_an_error(pair: Pair) -> None:
    pair.caller.sendall(b"cdef")
    assert read_all(pair.stream(b"ab", 6).source()) == b"abcdef"
    pair.caller.close()
    with pytest.raises(Unavailable, match="broke off"):
        read_all(pair.stream(b"ab", 6).source())


def test_a_reader_that_waits_learns_that_the_gateway_is_gone(pair: Pair) -> None:
    pair.caller.sendall(b"1\r\na\r\n")
    source = pair.stream().source()
    buffer = memoryview(bytearray(10))
    assert source.readinto(buffer) == 1
    threading.Timer(0.05, pair.gateway.shutdown, (socket.SHUT_RDWR,)).start()
    with pytest.raises(Unavailable, match="gateway is gone"):
        source.readinto(buffer)


def test_a_body_that_ends_after_the_gateway_is_not_taken_as_whole(pair: Pair) -> None:
    pair.caller.sendall(chunked([b"abc"]))
    pair.gateway.close()
    with pytest.raises(Unavailable, match="gateway is gone"):
        read_all(pair.stream().source())


def test_what_is_written_arrives_as_one_response_with_its_clean_end(pair: Pair) -> None:
    sink = pair.stream().sink()
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


def test_the_gateway_is_told_before_the_first_byte_is_written_and_not_earlier(pair: Pair) -> None:
    sink = pair.stream().sink()
    sink.write(b"small")
    assert pair.told() == []
    sink.write(bytes(100_000))
    assert pair.told() == [Progress(started=True)]


def test_the_gateway_is_told_of_a_caller_that_sends_nothing_and_that_it_goes_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_body, "_STALLED_S", 0.01)
    told: list[Progress] = []

    def hears() -> bool:
        told.extend(pair.told())
        return bool(told)

    def send_late() -> None:
        wait_until(hears, "the gateway hears of it")
        pair.caller.sendall(chunked([b"late"]))

    late = threading.Thread(target=send_late)
    late.start()
    assert read_all(pair.stream().source()) == b"late"
    late.join()
    assert [*told, *pair.told()] == [Progress(stalled=True), Progress()]


def test_a_caller_that_sends_nothing_for_too_long_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_body, "_STALLED_S", 0.01)
    pair.caller.sendall(b"3\r\nabc\r\n")
    with pytest.raises(Unavailable, match=r"nothing for 0\.01 s; GEAR_STREAM_IDLE_S"):
        read_all(pair.stream(idle_s=0.01).source())


def test_a_caller_that_takes_nothing_for_too_long_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_body, "_STALLED_S", 0.01)
    with pytest.raises(Unavailable, match="nothing for"):
        pair.stream(idle_s=0.01).sink().write(bytes(64 << 20))
    assert pair.told() == [Progress(started=True), Progress(started=True, stalled=True)]


def test_a_caller_may_be_given_all_the_time_there_is(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_body, "_STALLED_S", 0.01)
    threading.Timer(0.1, pair.caller.sendall, (chunked([b"abc"]),)).start()
    assert read_all(pair.stream(idle_s=float("inf")).source()) == b"abc"


def test_a_writer_whose_caller_is_gone_ends_with_an_error(pair: Pair) -> None:
    pair.caller.close()
    with pytest.raises(Unavailable, match="the caller is gone"):
        pair.stream().sink().write(bytes(100_000))


def test_a_writer_that_waits_learns_that_the_gateway_is_gone(pair: Pair) -> None:
    threading.Timer(0.05, pair.gateway.shutdown, (socket.SHUT_RDWR,)).start()
    sink = pair.stream().sink()
    with pytest.raises(Unavailable, match="gateway is gone"):
        for _ in range(1000):
            sink.write(bytes(1 << 16))


def test_frames_come_whole_however_they_are_cut_and_absurd_ones_are_refused() -> None:
    frames = FrameBuffer()
    wire = frame(Grant(True)) + frame(Grant(False))
    found = []
    for at in range(len(wire)):
        frames.feed(wire[at : at + 1])
        if (message := frames.next()) is not None:
            found.append(message)
    assert [msgspec.json.decode(message, type=Grant).accepted for message in found] == [True, False]
    absurd = FrameBuffer()
    absurd.feed(b"\xff\xff\xff\x7f")
    with pytest.raises(GearError, match="a message of"):
        absurd.next()


def test_a_caller_sees_the_end_of_a_gateway_that_dies_while_it_hands_over(pair: Pair, tmp_path: Path) -> None:
    def die(listener: socket.socket) -> None:
        control, _ = listener.accept()
        with control, pair.connection:
            control.recv(4096)
            socket.send_fds(control, [frame(Grant(True, True, head_bytes=10)) + b"half"], [pair.connection.fileno()])

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "streams.sock"))
        listener.listen()
        gateway = threading.Thread(target=die, args=(listener,))
        gateway.start()
        with pytest.raises(Unavailable, match="broke off"), claimed(tmp_path / "streams.sock", "token", "worker"):
            pass
        gateway.join()
    pair.caller.settimeout(60)
    assert pair.caller.recv(1) == b""
