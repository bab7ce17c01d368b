"""Unpacking images that are in containerd's content store already, with gearworkers and with overlayfs.

gearworkers writes unpacked layers to the disk before it answers; overlayfs does not. So the time of a sync after
overlayfs is measured as well.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from bench.containerd_sides import ContainerdSide, containerd_sides, erofs_side
from bench.frame import Figure, Pairs, fresh_disk, seconds
from bench.large_image import NAME, write_image
from tests.support.rootfs import TreeSize

TURNS = 3
_SECOND = "docker.io/library/second:1"
_ONE_LAYER = TreeSize(entries=70_000, content_bytes=1_500_000_000)


def unpack() -> list[Figure]:
    """Measure the unpacking of an image, of the same image in another namespace, and of one that shares 90 %."""
    first, again, shared, synced = Pairs(), Pairs(), Pairs(), list[float]()
    erofs_first, erofs_shared = list[float](), list[float]()
    with fresh_disk() as disk:
        archives = {NAME: disk / "image.tar", _SECOND: disk / "second.tar"}
        write_image(archives[NAME], NAME)
        write_image(archives[_SECOND], _SECOND, variant="second")
        for turn in range(TURNS):
            with containerd_sides(disk, turn) as sides:
                for side in sides:
                    for name, namespace in ((NAME, "one"), (NAME, "two"), (_SECOND, "one")):
                        import_image(side, archives[name], namespace)
                    first.add_value(side.is_ours, seconds(unpack_image, side, NAME, "one"))
                    if not side.is_ours:
                        synced.append(_seconds_of_sync())
                        if erofs := erofs_side(side):
                            erofs_first.append(seconds(unpack_image, erofs, NAME, "one"))
                            erofs_shared.append(seconds(unpack_image, erofs, _SECOND, "one"))
                    again.add_value(side.is_ours, seconds(unpack_image, side, NAME, "two"))
                    shared.add_value(side.is_ours, seconds(unpack_image, side, _SECOND, "one"))
    return [
        first.figure("unpack of 5 gzip layers, 1.5 GB, s", 0.45),
        shared.figure("unpack of an image that shares 90 %, s", 0.40),
        again.figure("unpack of the same image in another namespace, s", 0.02),
        Figure("sync after overlayfs's unpack, s", statistics.median(synced), None, None),
        *(
            Figure(f"the EROFS snapshotter: {work}, s", statistics.median(taken), None, None)
            for work, taken in (("first", erofs_first), ("shares 90 %", erofs_shared))
            if taken
        ),
    ]


def unpack_one() -> list[Figure]:
    """Measure the unpacking of one large gzip layer."""
    pairs = Pairs()
    with fresh_disk() as disk:
        archive = disk / "image.tar"
        write_image(archive, NAME, layers=1, layer=_ONE_LAYER)
        for turn in range(TURNS):
            with containerd_sides(disk, turn) as sides:
                for side in sides:
                    import_image(side, archive, "one")
                    pairs.add_value(side.is_ours, seconds(unpack_image, side, NAME, "one"))
    return [pairs.figure("unpack of one gzip layer, 1.5 GB, s", 0.60)]


def import_image(side: ContainerdSide, archive: Path, namespace: str) -> None:
    """Store the image in the content store; do not unpack it."""
    side.containerd.ctr("images", "import", "--no-unpack", str(archive), namespace=namespace)


def unpack_image(side: ContainerdSide, name: str, namespace: str) -> None:
    """Unpack an image of the content store."""
    digest = side.containerd.ctr("images", "ls", f"name=={name}", namespace=namespace).splitlines()[1].split()[2]
    side.containerd.ctr("snapshots", "unpack", "--snapshotter", side.snapshotter, digest, namespace=namespace)


def _seconds_of_sync() -> float:
    begin = time.perf_counter()
    os.sync()
    return time.perf_counter() - begin
