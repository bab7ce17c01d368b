"""Mapping of ids between containers and the host."""

from __future__ import annotations

import pytest

from gearworkers.errors import InvalidInput
from gearworkers.layers.idmap import IdMaps, IdRange, parse_ranges, to_container, to_host

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


def test_ranges_are_parsed() -> None:
    assert parse_ranges("0:100000:1000,1000:500000:10") == TWO_RANGES


@pytest.mark.parametrize(
    "text", ["", "a:1:1", "0:1", "0:1:1:1", "0:1:0", "0:4294967295:1", "0:5:2,1:9:1", "0:5:2,9:6:1"]
)
def test_malformed_ranges_are_rejected(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_ranges(text)


def test_maps_are_inverted_and_composed() -> None:
    maps, other = IdMaps(TWO_RANGES, ()), IdMaps((IdRange(0, 300_000, 1005),), (IdRange(0, 7, 1),))
    assert maps.inverse.uids == (IdRange(100_000, 0, 1000), IdRange(500_000, 1000, 10))
    composed = other.after(maps.inverse)
    assert composed.uids == (IdRange(100_000, 300_000, 1000), IdRange(500_000, 301_000, 5))
    assert composed.gids == other.gids
    for stored, shown in ((100_999, 300_999), (500_004, 301_004)):
        assert composed.to_host(stored, 0) == (shown, 7)
