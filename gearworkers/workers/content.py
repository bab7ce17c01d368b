"""The streams of jobs for containerd: read a layer's blob, write one to the content store."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import zstandard

from gearworkers.errors import from_os_error
from gearworkers.images.layer_reader import UnpackedLayer, unpacked
from gearworkers.workers.messages import NewBlob, StoredBlob

if TYPE_CHECKING:
    from gearworkers.containerd.client import BlobWriter, StoredContent

_UNCOMPRESSED_LABEL = "containerd.io/uncompressed"
_GZIP_LEVEL = 6
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_ZSTD_LEVEL = 3
_CHECK_BYTES = 1 << 20


class _Compressor(Protocol):
    def compress(self, data: bytes | bytearray | memoryview, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _NoCompressor:
    def compress(self, data: bytes | bytearray | memoryview, /) -> bytes:
        return bytes(data)

    def flush(self) -> bytes:
        return b""


class BlobFile:
    """The file of a blob; `Readable`.

    Args:
        fd: The file's descriptor.
        path: Its path, for errors.
        check: Called before each read; raises if the job was withdrawn.
    """

    def __init__(self, fd: int, path: Path, check: Callable[[], None]) -> None:
        self._file = open(fd, "rb", buffering=0)
        self._path = path
        self._check = check

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill part of *buffer*; return the number of bytes, 0 at the end.

        Raises:
            GearError: The file cannot be read.
        """
        self._check()
        try:
            return self._file.readinto(buffer) or 0
        except OSError as exc:
            raise from_os_error(exc, f"read {self._path}") from exc

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def opened_blob(stream: StoredBlob, check: Callable[[], None]) -> Iterator[UnpackedLayer]:
    """Yield the tar in a blob of containerd's content store, decompressed in a thread.

    Args:
        stream: Names the blob.
        check: Raises if the job was withdrawn.

    Raises:
        NotFound: The blob is missing.
    """
    path = Path(stream.path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise from_os_error(exc, f"open {path}") from exc
    blob = BlobFile(fd, path, check)
    try:
        with unpacked(blob) as tar:
            yield tar
    finally:
        blob.close()


class NewBlobBody:
    """The tar of a new blob; `Writable`. It is compressed and sent to containerd's content store.

    Args:
        stream: Describes the blob.
        content: Sends its bytes.
        check: Called now and then; raises if the job was withdrawn.
    """

    def __init__(self, stream: NewBlob, content: BlobWriter, check: Callable[[], None]) -> None:
        self._labels = stream.labels
        self._content = content
        self._check = check
        self._hasher = hashlib.sha256()
        self._compressor = _compressor(stream.media_type)
        self._unchecked_bytes = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Write all of *data*.

        Raises:
            GearError: containerd refuses, or the job was withdrawn.
        """
        self._unchecked_bytes += len(data)
        if self._unchecked_bytes >= _CHECK_BYTES:
            self._unchecked_bytes = 0
            self._check()
        self._hasher.update(data)
        if found := self._compressor.compress(data):
            self._content.write(found)

    def finish(self) -> StoredContent:
        """End the tar and make the blob visible; errors as `write`."""
        self._check()
        if found := self._compressor.flush():
            self._content.write(found)
        return self._content.commit(self._labels | {_UNCOMPRESSED_LABEL: f"sha256:{self._hasher.hexdigest()}"})


@contextmanager
def new_blob(stream: NewBlob, check: Callable[[], None]) -> Iterator[NewBlobBody]:
    """Yield the body of a new blob. Nothing is stored unless `NewBlobBody.finish` is called.

    Raises:
        GearError: containerd refuses, or does not answer.
    """
    from gearworkers.containerd.client import BlobWriter, connected  # gRPC takes memory, and few jobs need it

    with connected(Path(stream.address), stream.namespace) as client:
        content = BlobWriter(client, stream.ref)
        try:
            yield NewBlobBody(stream, content, check)
        finally:
            content.abort()


def _compressor(media_type: str) -> _Compressor:
    if media_type.endswith("gzip"):
        return zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    if media_type.endswith("zstd"):
        return zstandard.ZstdCompressor(_ZSTD_LEVEL).compressobj()
    return _NoCompressor()
