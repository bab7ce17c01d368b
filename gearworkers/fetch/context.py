"""What all objects of one store that come share, whether they come whole or in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gearworkers.cas.store import ObjectStore
from gearworkers.fetch.batch import Patience
from gearworkers.fetch.failover import Asking
from gearworkers.fetch.partial_files import Staging
from gearworkers.fetch.priority_pool import WorkPool
from gearworkers.fetch.stats import Outcomes


@dataclass(frozen=True, slots=True)
class FetchContext:
    """Made once by a `fetch.Fetcher`; each part may be used from any thread."""

    store: ObjectStore
    """Where objects go."""
    staging: Staging
    """Where they lie until they are whole and verified."""
    asking: Asking
    """Who asks the sources."""
    outcomes: Outcomes
    """Told what came of it."""
    pool: WorkPool
    """Where the work is done."""
    patience: Patience
    """How long who waits for a stream waits before what he wants is fetched for him."""
    is_wanted: Callable[[bytes], bool]
    """Whether an image or a pin still has an object, given its digest; what comes too late is not kept."""
