"""The manager's way to what it keeps: a remote that blocks, asked from threads so that no client waits for another."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from gearworkers.errors import IntegrityError, InvalidInput, NotFound
from gearworkers.objects import profile
from gearworkers.objects.remotes import codec
from gearworkers.objects.remotes.remote import Remote

T = TypeVar("T")

_THREADS = 32
_WINDOW_BYTES = 4 << 20
_FIRST_WINDOW = 32
_LEAST_WINDOW, _MOST_WINDOW = 4, 256
_STEP_PIECES = 4
_MOST_NAMED = 100_000


class Store:
    """A `Remote` for coroutines."""

    def __init__(self, remote: Remote, most_object_bytes: int) -> None:
        self.remote = remote
        self.most_object_bytes = most_object_bytes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")

    async def run(self, call: Callable[[], T]) -> T:
        """What *call* gives; it may block."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def blobs(self, digests: Sequence[bytes]) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """(digest, blob) of those that are there, in the order asked for; a few MiB of them at a time."""
        at, window = 0, _FIRST_WINDOW
        while at < len(digests):
            part = digests[at : at + window]
            found = await self.run(lambda part=part: dict(self.remote.blobs.get_many(part)))  # type: ignore[misc]
            yield [(digest, found[digest]) for digest in part if digest in found]
            at += len(part)
            mean_bytes = sum(map(len, found.values())) // max(len(found), 1)
            window = min(max(_WINDOW_BYTES // max(mean_bytes, 1), _LEAST_WINDOW), _MOST_WINDOW)

    async def steps(self, pieces: Iterator[T]) -> AsyncIterator[T]:
        """The items of an iterator that blocks, a few asked for at a time."""
        while part := await self.run(lambda: list(islice(pieces, _STEP_PIECES))):
            for piece in part:
                yield piece

    def named_by(self, document: str) -> list[bytes]:
        """The blobs of a start-up profile in its order: objects, after a large one the chunks of its ranges. Blocks.

        Raises:
            NotFound: There is no such document.
            InvalidInput: It is no profile.
        """
        data = self.remote.document(document)
        if data is None:
            raise NotFound(f"document {document} is not there")
        try:
            opened = profile.unpack(data).objects
        except IntegrityError as exc:
            raise InvalidInput(f"document {document} is no profile: {exc}") from exc
        found = (digest for one in opened for digest in self._blobs_of(one))
        return list(dict.fromkeys(islice(found, _MOST_NAMED)))

    def _blobs_of(self, opened: profile.Opened) -> Iterator[bytes]:
        digest = bytes.fromhex(opened.digest)
        yield digest
        for chunk in (self.remote.layout(digest) or ()) if opened.ranges else ():
            end = chunk.offset + chunk.size_bytes
            if any(offset < end and chunk.offset < offset + length for offset, length in opened.ranges):
                yield chunk.digest

    def put_blobs(self, blobs: Sequence[tuple[bytes, bytes]]) -> int:
        """Verify and store blobs that a client has made; how many were new. Blocks.

        Raises:
            IntegrityError: One is not what its digest says; those before it may be stored, it is not.
            InvalidInput: A layout names chunks that are not there.
        """
        present = self.remote.blobs.present([digest for digest, _ in blobs])
        new = {digest: blob for digest, blob in blobs if digest not in present}
        contents = [(digest, blob) for digest, blob in new.items() if not codec.is_layout(blob)]
        for digest, blob in contents:
            codec.decode(digest, blob)
        if contents:
            self.remote.blobs.put_many(contents)
        for digest, blob in new.items():
            if codec.is_layout(blob):
                self._check_layout(digest, blob)
                self.remote.blobs.put_many([(digest, blob)])
        return len(new)

    def _check_layout(self, digest: bytes, blob: bytes) -> None:
        if codec.layout_bytes(digest, blob) > self.most_object_bytes:
            raise InvalidInput(f"object {digest.hex()}: larger than {self.most_object_bytes} bytes")
        hasher = hashlib.sha256()
        try:
            for _, piece in self.remote.pieces(codec.chunks_in(digest, blob)):
                hasher.update(piece)
        except NotFound as exc:
            raise InvalidInput(f"layout of {digest.hex()}: {exc}; chunks go first") from exc
        if hasher.digest() != digest:
            raise IntegrityError(f"layout of {digest.hex()}: its chunks make up {hasher.hexdigest()}")

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False)
        self.remote.close()
