"""Objects are brought here: verified, once however many wait, what is read before what is prefetched.

Crash: leaves files in staging, which the next process removes or goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError
from gearworkers.fetch.batch import PATIENCE_S, Patience
from gearworkers.fetch.chunked import ChunkedObjects, Opened
from gearworkers.fetch.context import FetchContext
from gearworkers.fetch.download import Done, WholeObjects
from gearworkers.fetch.failover import Asking
from gearworkers.fetch.partial_files import Staging
from gearworkers.fetch.priority_pool import Urgency, WorkPool
from gearworkers.fetch.source import Source
from gearworkers.fetch.stats import Outcomes
from gearworkers.util.open_file import File


class Fetcher:
    """Brings objects of one store from its sources; all methods from any thread.

    Attributes:
        whole: Those that come in one piece.
        chunked: Those that come in chunks.
        outcomes: What came of all of them.
    """

    def __init__(
        self,
        store: ObjectStore,
        staging: Path,
        sources: Sequence[Source],
        pool: WorkPool,
        *,
        large_bytes: int,
        is_wanted: Callable[[bytes], bool] = lambda _: True,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """
        Args:
            store: Where objects go.
            staging: A directory of this process's own, on the store's file system.
            sources: The nearest first.
            pool: Where the work is done.
            large_bytes: From this size on an object comes by chunks, if its source keeps it so.
            is_wanted: Whether an image or a pin still has an object, given its digest; what comes too late is not kept.
            patience_s: How long who waits for a stream waits before what he wants is fetched for him.
        """
        self._store = store
        self._large_bytes = large_bytes
        self._staging = Staging(staging)
        self.outcomes = Outcomes()
        asking = Asking(sources, self.outcomes)
        context = FetchContext(store, self._staging, asking, self.outcomes, pool, Patience(patience_s), is_wanted)
        self.whole = WholeObjects(context)
        self.chunked = ChunkedObjects(context)

    def prepare(self) -> None:
        """Make staging; remove what a crash left there, but for large objects on their way.

        Raises:
            GearError: It cannot be used.
        """
        self._staging.prepare()
        self.chunked.prepare()

    def close(self) -> None:
        """Let go of what `prepare` opened; the pool has ended."""
        self.chunked.close()

    @property
    def arriving(self) -> int:
        """How many objects are on their way."""
        return len(self.whole) + len(self.chunked)

    def fetch(self, digest: bytes, size_bytes: int, urgency: Urgency, done: Done) -> None:
        """Have the object in the store; *done* is told, now or later: IntegrityError if another stands at its name."""
        try:
            is_here = self._store.has(digest)
        except GearError as exc:
            done(exc)
            return
        if is_here:
            done(None)
        elif size_bytes < self._large_bytes:
            self.whole.fetch(digest, size_bytes, urgency, done)
        else:

            def opened(result: Opened) -> None:
                if isinstance(result, GearError):
                    done(result)
                elif isinstance(result, File):
                    done(None)
                elif result is None:
                    self.whole.fetch(digest, size_bytes, urgency, done)
                else:
                    self.chunked.fill(digest, result, done)

            self.chunked.open(digest, size_bytes, urgency, opened)
