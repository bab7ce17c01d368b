"""Asks sources in order: if one lacks an object, is unreachable or returns wrong bytes, the next one is asked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from gearworkers.errors import GearError, IntegrityError, NotFound
from gearworkers.fetch.source import Chunk, ObjectSource, checked_layout
from gearworkers.fetch.stats import FetchStats

T = TypeVar("T")


class Failover:
    """The sources of one store; any thread may call all methods, and all block."""

    def __init__(self, sources: Sequence[ObjectSource], stats: FetchStats) -> None:
        """
        Args:
            sources: The nearest first.
            stats: Counts received bytes and wrong answers.
        """
        self._sources = sources
        self._stats = stats
        self._unreachable: tuple[float, GearError] | None = None

    def ask(self, ask_source: Callable[[ObjectSource], T], digest: bytes, requested_s: float) -> T:
        """Return the first correct answer.

        Args:
            ask_source: Asks one source and verifies its answer; raises IntegrityError if it is wrong.
            digest: The object or chunk, for the error text.
            requested_s: Monotonic time of the request. A request made before a source became unreachable fails at
                once.

        Raises:
            NotFound: No source has it.
            GearError: The last error of a source that may have it.
        """
        self._fail_if_unreachable_since(requested_s)
        errors: list[GearError] = []
        for source in self._sources:
            try:
                answer = ask_source(source)
            except IntegrityError as exc:
                self._stats.note_corrupt(exc)
                errors.append(exc)
            except NotFound:
                continue
            except GearError as exc:
                errors.append(exc)
            else:
                self._unreachable = None
                return answer
        if not errors:
            raise NotFound(f"{digest.hex()}: none of the {len(self._sources)} sources has it")
        if errors[-1].retryable:
            self._unreachable = (time.monotonic(), errors[-1])
        raise errors[-1]

    def chunk(self, chunk: Chunk, requested_s: float) -> bytes:
        """Return the verified bytes of a chunk; arguments and errors are those of `ask`."""

        def verified(source: ObjectSource) -> bytes:
            data = source.chunk(chunk.digest)
            self._stats.received_bytes += len(data)
            verify_chunk(chunk, data)
            return data

        return self.ask(verified, chunk.digest, requested_s)

    def layout(self, digest: bytes, size_bytes: int, requested_s: float) -> Sequence[Chunk] | None:
        """Return the first layout of the right size; None if no source keeps the object in chunks.

        Raises:
            GearError: No source returned a layout, and the last failure was not a wrong layout.
        """

        def checked(source: ObjectSource) -> Sequence[Chunk]:
            layout = source.layout(digest)
            if layout is None:
                raise NotFound(f"object {digest.hex()}: not kept in chunks")
            return checked_layout(layout, size_bytes)

        try:
            return self.ask(checked, digest, requested_s)
        except (NotFound, IntegrityError):
            return None

    def _fail_if_unreachable_since(self, requested_s: float) -> None:
        """Raise the error of the unreachable source if it became unreachable after *requested_s*.

        Otherwise queued readers would wait for that source one after the other.
        """
        unreachable = self._unreachable
        if unreachable is not None and unreachable[0] > requested_s:
            raise unreachable[1]


def verify_chunk(chunk: Chunk, data: bytes) -> None:
    """Compare *data* with the size and digest of *chunk*.

    Raises:
        IntegrityError: They differ.
    """
    if len(data) != chunk.size_bytes or hashlib.sha256(data).digest() != chunk.digest:
        raise IntegrityError(f"chunk {chunk.digest.hex()}: received {len(data)} bytes that do not match its digest")
