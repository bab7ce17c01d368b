"""Mapping of ids between containers and the host."""

from __future__ import annotations

import pytest

from gearworkers.errors import InvalidInput
from gearworkers.layers.idmap import IdMaps, IdRange, to_container, to_host

TWO_RANGES = (IdRange(0, 100_000, 1000), IdRange(1000, 500_000, 10))


@pytest.mark.parametrize(("inside", "outside"), [(0, 100_000), (999, 100_999), (1000, 500_000), (1009, 500_009)])
def test_an_id_is_mapped_and_mapped_back(inside: int, outside: int) -> None:
    assert to_host(inside, TWO_RANGES) == outside
    assert to_container(outside, TWO_RANGES) == inside


def test_ids_are_unchanged_without_ranges() -> None:
    assert IdMaps().to_host(7, 9) == (7, 9)
    assert IdMaps().to_container(7, 9) == (7, 9)
    assert IdMaps().root == (0, 0)


def test_users_and_groups_have_their_own_ranges() -> None:
    maps = IdMaps(TWO_RANGES, (IdRange(0, 300_000, 5),))
    assert maps.root == (100_000, 300_000)
    assert maps.to_container(500_001, 300_004) == (1001, 4)


@pytest.mark.parametrize("outside", [0, 99_999, 101_000, 500_010])
def test_an_id_outside_all_ranges_is_rejected_with_its_number(outside: int) -> None:
    with pytest.raises(InvalidInput, match=str(outside)):
        to_container(outside, TWO_RANGES)
    with pytest.raises(InvalidInput, match="1010"):
        to_host(1010, TWO_RANGES)
