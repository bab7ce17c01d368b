"""SOURCE_DATE_EPOCH: a limit for the times in a layer's tar."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from gearworkers.layers.diff.export import write_diff, write_tree_diff
from gearworkers.layers.idmap import IdMaps
from tests.support.overlays import mounted

LIMIT_S = 1_600_000_000


def lower(tree: Path) -> None:
    (tree / "removed").touch()
    (tree / "kept").touch()


def times(tar: bytes) -> dict[str, float]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return {member.name: float(member.mtime) for member in archive}


def test_later_times_become_the_limit_and_earlier_times_stay(tmp_path: Path) -> None:
    with mounted(tmp_path, [lower]) as overlay:
        (overlay.merged / "new").touch()
        (overlay.merged / "old").touch()
        os.utime(overlay.merged / "old", (1, 1))
        (overlay.merged / "removed").unlink()
        own, tree = io.BytesIO(), io.BytesIO()
        limit_ns = LIMIT_S * 10**9
        write_diff(overlay.upper, overlay.merged_fd, overlay.parent_fd, own, IdMaps(), limit_ns)
        write_tree_diff(overlay.merged_fd, overlay.parent_fd, tree, IdMaps(), limit_ns)
    expected = {"new": LIMIT_S, "old": 1, ".wh.removed": LIMIT_S}
    assert times(own.getvalue()) == expected
    assert expected.items() <= times(tree.getvalue()).items()
