"""The stream file is replayed exactly or rejected."""

from __future__ import annotations

import io

import pytest

from gearworkers.errors import IntegrityError
from gearworkers.tar.tar_split import ObjectBytes, RawBytes, TarSplitReader, TarSplitWriter

DIGEST = bytes(range(32))


def a_stream() -> bytes:
    file = io.BytesIO()
    log = TarSplitWriter(file)
    log.raw(b"header")
    log.content(DIGEST, 1 << 40)
    log.raw(memoryview(b"padding" * 1000))
    log.slice(DIGEST, 5, 7)
    log.close()
    return file.getvalue()


def test_pieces_are_read_in_the_order_of_the_tar() -> None:
    reader = TarSplitReader(io.BytesIO(a_stream()))
    pieces = [
        RawBytes(b"header"),
        ObjectBytes(DIGEST, 0, 1 << 40),
        RawBytes(b"padding" * 1000),
        ObjectBytes(DIGEST, 5, 7),
    ]
    assert list(reader) == pieces
    assert list(reader) == pieces, "a second iteration yields the same"
    assert reader.tar_bytes == (1 << 40) + 7013


def test_the_writer_returns_totals() -> None:
    file = io.BytesIO()
    log = TarSplitWriter(file)
    log.raw(b"12345")
    log.content(DIGEST, 100)
    log.close()
    assert log.size_bytes == 105


def test_an_empty_stream_is_valid() -> None:
    file = io.BytesIO()
    TarSplitWriter(file).close()
    assert list(TarSplitReader(file)) == []


def test_many_and_large_records_are_read_as_written() -> None:
    file = io.BytesIO()
    log = TarSplitWriter(file)
    expected = b""
    for number in range(3000):
        block = number.to_bytes(4, "big") * 100
        log.raw(block)
        log.content(DIGEST, number)
        expected += block
    large = bytes(range(256)) * 20_000
    log.raw(large)
    log.close()
    pieces = list(TarSplitReader(file))
    assert b"".join(piece.data for piece in pieces if isinstance(piece, RawBytes)) == expected + large
    assert [piece.length_bytes for piece in pieces if isinstance(piece, ObjectBytes)] == list(range(3000))
    assert max(len(piece.data) for piece in pieces if isinstance(piece, RawBytes)) <= 1 << 20


def test_a_truncated_file_is_detected_before_it_is_used() -> None:
    stream = a_stream()
    for length in range(len(stream)):
        with pytest.raises(IntegrityError):
            TarSplitReader(io.BytesIO(stream[:length]))


def test_a_flipped_bit_is_detected() -> None:
    stream = a_stream()
    pieces = list(TarSplitReader(io.BytesIO(stream)))
    undetected = []
    for bit in range(8 * len(stream)):
        altered = bytearray(stream)
        altered[bit // 8] ^= 1 << bit % 8
        try:
            assert list(TarSplitReader(io.BytesIO(bytes(altered)))) == pieces
        except IntegrityError:
            continue
        undetected.append(bit)
    assert not undetected
