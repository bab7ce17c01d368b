"""Sources are asked in order: what lacks something, does not answer or gives wrong bytes is followed by the next."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from gearworkers.errors import GearError, IntegrityError, NotFound
from gearworkers.fetch.source import Chunk, Source, checked_layout
from gearworkers.fetch.stats import Outcomes

T = TypeVar("T")


class Asking:
    """Asks the sources of one store; all methods from any thread, and all block."""

    def __init__(self, sources: Sequence[Source], outcomes: Outcomes) -> None:
        """
        Args:
            sources: The nearest first.
            outcomes: Told what was wrong, and how much came.
        """
        self._sources = sources
        self._outcomes = outcomes
        self._away: tuple[float, GearError] | None = None

    def first(self, ask: Callable[[Source], T], digest: bytes, asked_s: float) -> T:
        """What the first source gives that has it right.

        Args:
            ask: Gets it from a source, and verifies it: IntegrityError if it is wrong.
            digest: What is asked for.
            asked_s: The monotonic time since when it is wanted.

        Raises:
            NotFound: None has it.
            GearError: What the last one said that did not give it, though it may have it.
        """
        self._give_up_if_away(asked_s)
        errors: list[GearError] = []
        for source in self._sources:
            try:
                found = ask(source)
            except IntegrityError as exc:
                self._outcomes.note_corrupt(exc)
                errors.append(exc)
            except NotFound:
                continue
            except GearError as exc:
                errors.append(exc)
            else:
                self._away = None
                return found
        if not errors:
            raise NotFound(f"{digest.hex()}: none of the {len(self._sources)} sources has it")
        if errors[-1].retryable:
            self._away = (time.monotonic(), errors[-1])
        raise errors[-1]

    def chunk(self, chunk: Chunk, asked_s: float) -> bytes:
        """The chunk's bytes, verified; arguments and errors as of `first`."""

        def verified(source: Source) -> bytes:
            data = source.chunk(chunk.digest)
            self._outcomes.received_bytes += len(data)
            if len(data) != chunk.size_bytes or hashlib.sha256(data).digest() != chunk.digest:
                raise IntegrityError(f"chunk {chunk.digest.hex()}: {len(data)} bytes of another content came")
            return data

        return self.first(verified, chunk.digest, asked_s)

    def layout(self, digest: bytes, size_bytes: int, asked_s: float) -> Sequence[Chunk] | None:
        """From the first source that has one that can be right; None if no source keeps the object in chunks.

        Raises:
            GearError: None gave one, and the last one did not answer.
        """

        def checked(source: Source) -> Sequence[Chunk]:
            layout = source.layout(digest)
            if layout is None:
                raise NotFound(f"object {digest.hex()}: not kept in chunks")
            return checked_layout(layout, size_bytes)

        try:
            return self.first(checked, digest, asked_s)
        except (NotFound, IntegrityError):
            return None

    def _give_up_if_away(self, asked_s: float) -> None:
        """Fail at once if a source was found unavailable after this was asked for: one wait is enough for all.

        Without it a queue of readers would wait one after the other for a remote that is away.
        """
        away = self._away
        if away is not None and away[0] > asked_s:
            raise away[1]
