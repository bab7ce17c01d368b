"""Builds and their output: small steps, save, chown of a large tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.frame import Figure, Pairs, Side, both_sides, fresh_disk, seconds
from tests.support import rootfs
from tests.support.dockerd import CLIENT
from tests.support.rootfs import TreeSize

TURNS = 5
STEPS = 10
_HALF_GB = TreeSize(entries=26_000, content_bytes=500_000_000)


def build_steps() -> list[Figure]:
    """Measure `docker build` of ten small steps."""
    pairs = Pairs()
    with fresh_disk() as disk, both_sides(disk) as sides:
        for side in sides:
            side.dockerd.docker("import", str(rootfs.debian()), "debian")
        for turn in range(TURNS):
            for side in sides if turn % 2 else reversed(sides):
                pairs.add(side, seconds(_build, side, f"turn {turn}"))
    return [pairs.figure("build of 10 small steps, s", 1.00)]


def save() -> list[Figure]:
    """Measure `docker save` of an image built in ten steps."""
    pairs = Pairs()
    with fresh_disk() as disk, both_sides(disk) as sides:
        for side in sides:
            side.dockerd.docker("import", str(rootfs.debian()), "debian")
            _build(side, "saved")
        for turn in range(TURNS):
            for side in sides if turn % 2 else reversed(sides):
                pairs.add(side, seconds(_save, side))
    return [pairs.figure("save, s", 1.00)]


def chown_tree() -> list[Figure]:
    """Measure `RUN chown -R` of a tree of 500 MB: time, and bytes added on disk."""
    times, added = Pairs(), Pairs()
    with fresh_disk() as disk:
        tar = disk / "tree.tar"
        rootfs.write_unshared_tree(tar, "chown", _HALF_GB)
        with both_sides(disk) as sides:
            for side in sides:
                side.dockerd.docker("import", str(rootfs.debian()), "debian")
                side.dockerd.docker(
                    "build", "-t", "tree", "-f", "-", str(_context(tar)), stdin=b"FROM debian\nADD tree.tar /\n"
                )
            for turn in range(3):
                for side in sides if turn % 2 else reversed(sides):
                    before = side.stored_bytes()
                    text = f"FROM tree\nRUN chown -R {1000 + turn}:{1000 + turn} /tree\n".encode()
                    times.add(side, seconds(side.dockerd.docker, "build", "-", stdin=text))
                    added.add(side, side.stored_bytes() - before)
    return [times.figure("chown -R of 500 MB, s", 0.50), added.figure("chown -R of 500 MB, bytes added", 0.02)]


def _context(tar: Path) -> Path:
    """Return a build context that contains only the tar."""
    context = tar.parent / "context"
    context.mkdir(exist_ok=True)
    if not (context / tar.name).exists():
        (context / tar.name).hardlink_to(tar)
    return context


def _build(side: Side, text: str) -> None:
    steps = [f"RUN echo {text} {step} > /step{step}" for step in range(STEPS)]
    side.dockerd.docker("build", "-t", "built", "-", stdin="\n".join(["FROM debian", *steps]).encode())


def _save(side: Side) -> None:
    subprocess.run([CLIENT, "save", "built"], env=side.dockerd.environ(), stdout=subprocess.DEVNULL, check=True)
