"""A running manager."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.remotes import Service, manager_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("manager")
    limits = {"GEAR_MANAGER_CLIENT_TIMEOUT_S": "600", "GEAR_MANAGER_MOST_OBJECT_BYTES": str(8 << 20)}
    with manager_server(directory, limits) as server:
        yield server
