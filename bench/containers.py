"""Containers: start-up, and reads of a whole tree, cold and warm."""

from __future__ import annotations

from pathlib import Path

from bench.frame import Figure, Pairs, Side, both_sides, drop_caches, fresh_disk, seconds
from tests.support import rootfs
from tests.support.rootfs import TreeSize

RUNS = 21
READS = 5
_TREE = TreeSize(entries=24_000, content_bytes=450_000_000)
_STATS = 20_000
_TAR = (
    "import subprocess,time; t=time.monotonic(); "
    "subprocess.run('tar -cf - /tree | cat > /dev/null', shell=True, check=True)"
)
_STAT = (
    "import os,time; p=[d+'/'+n for d,_,f in os.walk('/tree') for n in f][:{count}]; "
    "assert len(p) == {count}; t=time.monotonic(); [os.lstat(n) for n in p]"
)
_PRINT = "; print(time.monotonic()-t)"


def run_true() -> list[Figure]:
    """Measure `docker run --rm` of `true`, warm."""
    pairs = Pairs()
    with fresh_disk() as disk, both_sides(disk) as sides:
        for side in sides:
            side.dockerd.docker("import", str(rootfs.debian()), "debian")
            side.dockerd.run("debian", "true")
        for turn in range(RUNS):
            for side in sides if turn % 2 else reversed(sides):
                pairs.add(side, seconds(side.dockerd.run, "debian", "true"))
    return [pairs.figure("run --rm of true, s", 1.10)]


def read_tree() -> list[Figure]:
    """Measure reads of a whole tree in a container, cold and warm, and stat of 20,000 files before and after reads."""
    cold, warm, stats, unread = Pairs(), Pairs(), Pairs(), Pairs()
    stat = _STAT.format(count=_STATS)
    with fresh_disk() as disk:
        rootfs.write_unshared_tree(disk / "tree.tar", "read", _TREE)
        with both_sides(disk) as sides:
            containers = [(side, _tree_container(side, disk)) for side in sides]
            for side, container in containers:
                _timed(side, container, stat)
            for turn in range(READS):
                for side, container in containers if turn % 2 else reversed(containers):
                    unread.add(side, _timed(side, container, stat))
            for turn in range(READS):
                for side, container in containers if turn % 2 else reversed(containers):
                    drop_caches()
                    cold.add(side, _timed(side, container, _TAR))
                    warm.add(side, _timed(side, container, _TAR))
                    stats.add(side, _timed(side, container, stat))
    return [
        cold.figure("read of a tree, cold, s", 1.05),
        warm.figure("read of a tree, warm, s", 1.05),
        unread.figure("stat of 20,000 files that were never read, s", 1.05),
        stats.figure("stat of 20,000 files that were read, s", 1.05),
    ]


def _tree_container(side: Side, disk: Path) -> str:
    """Start a Debian container that contains the tree; return its id."""
    context = disk / "context"
    context.mkdir(exist_ok=True)
    if not (context / "tree.tar").exists():
        (context / "tree.tar").hardlink_to(disk / "tree.tar")
    side.dockerd.docker("import", str(rootfs.debian()), "debian")
    text = b"FROM debian\nADD tree.tar /\n"
    side.dockerd.docker("build", "-t", "tree", "-f", "-", str(context), stdin=text)
    return side.dockerd.run("tree", "sleep", "100000", options=("-d",))


def _timed(side: Side, container: str, script: str) -> float:
    """Run a Python script in the container; return its seconds, without those of `docker exec`."""
    return float(side.dockerd.docker("exec", container, "python3", "-c", script + _PRINT))
