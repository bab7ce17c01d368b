"""The parts that all downloads of one store share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from gearworkers.cas.store import ObjectStore
from gearworkers.fetch.chunk_index import ChunkIndex
from gearworkers.fetch.delayed_calls import DelayedCalls
from gearworkers.fetch.failover import Failover
from gearworkers.fetch.partial_files import PartialFiles
from gearworkers.fetch.priority_pool import PriorityPool
from gearworkers.fetch.stats import FetchStats


@dataclass(frozen=True, slots=True)
class FetchContext:
    """The shared parts; created once by a `fetcher.Fetcher`, and used by any thread."""

    store: ObjectStore
    """Receives finished objects."""
    partial_files: PartialFiles
    """Holds objects until they are whole and verified."""
    chunk_index: ChunkIndex
    """Finds chunks in other objects of this host."""
    failover: Failover
    """Asks the sources."""
    stats: FetchStats
    pool: PriorityPool
    """Runs all work that blocks."""
    batch_wait: DelayedCalls
    """Delays a reader's own request for an object or chunk that a batch request is about to deliver."""
    is_referenced: Callable[[bytes], bool]
    """Returns whether an image or a pin still refers to the object with this digest; other objects are not stored."""
    wrong_layouts: set[bytes] = field(default_factory=set)
    """Digests of objects whose layout did not match their content: these are fetched whole."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Guards the table of downloads and the state of each download. No thread holds it while it fetches, reads or
    writes."""
