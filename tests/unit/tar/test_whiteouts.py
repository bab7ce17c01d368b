"""The names of whiteouts and opaque markers."""

from __future__ import annotations

import pytest

from gearworkers.errors import InvalidInput
from gearworkers.tar import whiteouts


@pytest.mark.parametrize("name", [b"a", b".hidden", b".wh", b"x.wh.y", b"\xff"])
def test_an_ordinary_name_removes_nothing_and_its_whiteout_removes_the_name(name: bytes) -> None:
    assert whiteouts.removed_name(name) is None
    assert whiteouts.removed_name(whiteouts.whiteout_name(name)) == name


def test_the_opaque_marker_is_not_a_whiteout() -> None:
    assert whiteouts.is_opaque(b".wh..wh..opq")
    assert whiteouts.removed_name(b".wh..wh..opq") is None


def test_aufs_metadata_files_remove_nothing() -> None:
    assert whiteouts.removed_name(b".wh..wh.plnk") is None
    assert not whiteouts.is_opaque(b".wh..wh.plnk")


@pytest.mark.parametrize("base", [b".wh.", b".wh..", b".wh..."])
def test_a_whiteout_of_its_own_directory_or_the_parent_is_rejected(base: bytes) -> None:
    with pytest.raises(InvalidInput):
        whiteouts.removed_name(base)
