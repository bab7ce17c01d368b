"""Blobs: every byte verified, every compression undone, in bounded memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import threading
from collections.abc import Callable

import pytest
import zstandard

from gearworkers.errors import IntegrityError
from gearworkers.images.layer_reader import VerifiedBlob, read_all, unpacked
from tests.support.tars import Trickle

CONTENT = b"".join(hashlib.sha256(b"%d" % number).digest() * 3 for number in range(20_000))


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def unpack(blob: bytes, content: bytes = CONTENT, step_bytes: int = 1 << 20) -> bytes:
    with unpacked(Trickle(blob, step_bytes), digest(content)) as tar:
        return read_all(tar)


@pytest.mark.parametrize(
    "blob",
    [
        CONTENT,
        gzip.compress(CONTENT),
        zstandard.compress(CONTENT),
        gzip.compress(CONTENT[:1000]) + gzip.compress(CONTENT[1000:]),
        gzip.compress(CONTENT[:1000]) + bytes(700) + gzip.compress(CONTENT[1000:]) + bytes(513),
        zstandard.compress(CONTENT[:1000]) + zstandard.compress(CONTENT[1000:]),
    ],
    ids=["plain", "gzip", "zstd", "members", "padded members", "frames"],
)
@pytest.mark.parametrize("step_bytes", [37, 1000, 1 << 20])
@pytest.mark.slow
def test_what_was_compressed_comes_out(blob: bytes, step_bytes: int) -> None:
    assert unpack(blob, step_bytes=step_bytes) == CONTENT


def test_frames_that_are_to_be_skipped_are() -> None:
    for kind in (b"\x50", b"\x5e"):
        skipped = kind + b"\x2a\x4d\x18\x07\0\0\0ignored"
        parts = (zstandard.compress(CONTENT[:1000]), zstandard.compress(CONTENT[1000:]), b"")
        assert unpack(skipped + skipped.join(parts)) == CONTENT


@pytest.mark.parametrize("blob", [b"", b"x", b"abc"])
def test_a_blob_shorter_than_any_mark_is_plain(blob: bytes) -> None:
    assert unpack(blob, blob) == blob


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_cut_blob_is_an_error(compress: Callable[[bytes], bytes]) -> None:
    with pytest.raises(IntegrityError):
        unpack(compress(CONTENT)[:-20])


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_damaged_blob_is_an_error(compress: Callable[[bytes], bytes]) -> None:
    blob = bytearray(compress(CONTENT))
    blob[len(blob) // 2] ^= 0xFF
    with pytest.raises(IntegrityError):
        unpack(bytes(blob))


def test_a_tar_other_than_the_config_says_is_an_error() -> None:
    with pytest.raises(IntegrityError, match="config"):
        unpack(gzip.compress(CONTENT), b"something else")


@pytest.mark.slow
@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_bomb_comes_in_small_pieces(compress: Callable[[bytes], bytes]) -> None:
    zeros = bytes(200 << 20)
    hasher = hashlib.sha256()
    with unpacked(io.BytesIO(compress(zeros)), digest(zeros)) as tar:
        del zeros
        buffer = memoryview(bytearray(64 << 20))
        while count := tar.readinto(buffer):
            assert count <= 1 << 20
            hasher.update(buffer[:count])
    assert hasher.hexdigest() == hashlib.sha256(bytes(200 << 20)).hexdigest()


def test_what_is_not_read_to_its_end_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with unpacked(io.BytesIO(gzip.compress(bytes(64 << 20))), digest(b"")) as tar:
        assert tar.readinto(memoryview(bytearray(10))) == 10
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("blob", "size_bytes"), [(CONTENT[:-1], len(CONTENT)), (CONTENT + b"x", len(CONTENT)), (b"", len(CONTENT))]
)
def test_a_blob_of_another_length_is_an_error(blob: bytes, size_bytes: int) -> None:
    with pytest.raises(IntegrityError):
        read_all(VerifiedBlob(io.BytesIO(blob), digest(CONTENT), size_bytes))


def test_a_blob_of_other_bytes_is_an_error() -> None:
    other = bytes(len(CONTENT))
    with pytest.raises(IntegrityError):
        read_all(VerifiedBlob(io.BytesIO(other), digest(CONTENT), len(CONTENT)))


def test_a_blob_that_is_what_it_says_comes_whole() -> None:
    assert read_all(VerifiedBlob(io.BytesIO(CONTENT), digest(CONTENT), len(CONTENT))) == CONTENT
