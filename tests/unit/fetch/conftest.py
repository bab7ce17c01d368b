"""A node whose source the test controls; parametrize `batch_wait_s` and `limits` to change it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.fetch.batch import DEFAULT_LIMITS, BatchLimits
from gearworkers.fetch.fetcher import BATCH_WAIT_S
from tests.support.fetching import FetchNode, MemorySource


@pytest.fixture
def batch_wait_s() -> float:
    return BATCH_WAIT_S


@pytest.fixture
def limits() -> BatchLimits:
    return DEFAULT_LIMITS


@pytest.fixture
def node(tmp_path: Path, batch_wait_s: float, limits: BatchLimits) -> Iterator[FetchNode]:
    one = FetchNode(tmp_path, MemorySource(), batch_wait_s=batch_wait_s, limits=limits)
    yield one
    one.source.release()
    one.close()
