"""How unpacking grows with workers, which processes take CPU time and memory, and how many cores one layer uses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.containerd_sides import ContainerdSide
from bench.frame import Figure, fresh_disk, seconds
from bench.large_image import NAME, write_image
from bench.processes import cpu_seconds, resident_sizes, watched
from bench.unpack import import_image, unpack_image
from tests.support.containerd_host import Containerd, ContainerdDocker, stack_for_containerd
from tests.support.rootfs import TreeSize

TURNS = 3
WORKERS = ("1", "2", "3")
_LARGE_LAYER = TreeSize(entries=230_000, content_bytes=5_000_000_000)
_PROCESSES = ("import", "gateway", "lazyfs", "redis")
_MIB = 1 << 20


def growth() -> list[Figure]:
    """Measure unpacking with 1, 2 and 3 worker processes, its CPU time and memory, and one layer of 5 GB."""
    with fresh_disk() as disk:
        archive = disk / "image.tar"
        write_image(archive, NAME)
        found = _by_workers(disk, archive)
        found += _by_process(disk, archive)
        write_image(archive, NAME, layers=1, layer=_LARGE_LAYER)
        return found + _large_layer(disk, archive)


def _by_workers(disk: Path, archive: Path) -> list[Figure]:
    taken: dict[str, list[float]] = {workers: [] for workers in WORKERS}
    for turn in range(TURNS):
        for workers in WORKERS:
            with _side(disk / f"workers{workers}-{turn}", archive, GEAR_WORKER_PROCESSES=workers) as side:
                taken[workers].append(seconds(unpack_image, side, NAME, "one"))
    work = "unpack of 5 gzip layers, 1.5 GB, worker processes at most"
    return [Figure(f"{work} {workers}, s", statistics.median(taken[workers]), None, None) for workers in WORKERS]


def _by_process(disk: Path, archive: Path) -> list[Figure]:
    with _side(disk / "processes", archive) as side:
        stack = side.containerd.stack
        assert stack is not None
        leaders = {name: stack.daemons[name].pid for name in _PROCESSES} | {"containerd": side.containerd.daemon.pid}
        before = {name: cpu_seconds(pid) for name, pid in leaders.items()}
        with watched(stack) as workers:
            unpack_image(side, NAME, "one")
        gateway, _ = resident_sizes(stack.daemons["gateway"].pid)
        used = {name: cpu_seconds(pid) - before[name] for name, pid in leaders.items()}
    return [
        *(Figure(f"CPU time of it: {name}, s", spent, None, None) for name, spent in used.items()),
        Figure("resident memory of the gateway after it, MiB", gateway / _MIB, None, 100e6 / _MIB),
        Figure("the same, largest import process, MiB", workers.peak_bytes / _MIB, None, None),
        Figure("the same, all import processes together, MiB", workers.together_bytes / _MIB, None, None),
    ]


def _large_layer(disk: Path, archive: Path) -> list[Figure]:
    with _side(disk / "large", archive) as side:
        assert side.containerd.stack is not None
        leader = side.containerd.stack.daemons["import"].pid
        before_s, begin_s = cpu_seconds(leader), time.perf_counter()
        unpack_image(side, NAME, "one")
        taken_s = time.perf_counter() - begin_s
        used = (cpu_seconds(leader) - before_s) / taken_s
    return [
        Figure("unpack of one gzip layer, 5 GB, s", taken_s, None, None),
        Figure("cores that the import worker uses for it", used, None, None),
    ]


@contextmanager
def _side(directory: Path, archive: Path, **settings: str) -> Iterator[ContainerdSide]:
    """Run a containerd with gearworkers that has the image in its content store."""
    with stack_for_containerd(directory / "stack", directory.name, settings) as stack:
        containerd = Containerd(directory / "containerd", stack)
        containerd.start()
        try:
            side = ContainerdSide(containerd, ContainerdDocker(containerd))
            import_image(side, archive, "one")
            yield side
        finally:
            containerd.stop()
