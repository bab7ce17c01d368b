"""What the lazy file system's tree is told, without a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.digest import object_name
from gearworkers.errors import GearError
from gearworkers.layers.wanted import WantedObjects
from gearworkers.mounts.lazy.tree import Found, node_of
from gearworkers.objects.arrivals import Arrivals
from gearworkers.objects.fetch import Fetcher
from gearworkers.objects.store import ObjectStore
from gearworkers.objects.workpool import WorkPool
from gearworkers.services.lazyfs_contents import LazyContents

NAME = object_name(bytes(32))


@pytest.fixture
def contents(tmp_path: Path) -> Iterator[LazyContents]:
    store = ObjectStore(tmp_path / "public")
    pool = WorkPool(2, for_background=1)
    fetcher = Fetcher(store, tmp_path / "fetching", [], pool, large_bytes=1 << 20)
    yield LazyContents(
        store,
        Arrivals(tmp_path / "arrivals", store),
        WantedObjects(tmp_path / "images"),
        fetcher,
        lambda digest, size_bytes: None,
        large_bytes=1 << 20,
        served_bytes=2 << 20,
    )
    pool.close()


def test_lists_that_cannot_be_read_are_an_error_of_who_looks_and_not_of_the_server(
    contents: LazyContents, tmp_path: Path
) -> None:
    (tmp_path / "images").write_text("no directory")
    told: list[Found | bytes] = []
    contents.want(NAME, told.append)
    contents.read(node_of(bytes(32)), 0, 10, told.append)
    assert [isinstance(one, GearError) for one in told] == [True, True]
    assert isinstance(contents.size_bytes(node_of(bytes(32))), GearError)
    assert contents.whole(node_of(bytes(32))) is None
    assert contents.is_wanted(NAME)
