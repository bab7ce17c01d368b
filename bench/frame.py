"""Common code of the benchmarks: two sides on one fresh disk, measured in turns; figures are ratios."""

from __future__ import annotations

import json
import mmap
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec

from rich.console import Console
from rich.table import Table

from tests.support import sandbox
from tests.support.disk import mount_fresh, tree_bytes
from tests.support.dockerd import Dockerd
from tests.support.stack import Stack

DISK_BYTES = 60 << 30
_P = ParamSpec("_P")
_MAX_WARM_BYTES = 10 << 30


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Args:
        work: The measured work, with the unit.
        ours: gearworkers' median.
        peer: The median of overlay2, or of containerd's overlayfs; None where the goal is absolute.
        goal: The highest ratio (the highest value, without a peer) that meets the goal; None if there is none.
    """

    work: str
    ours: float
    peer: float | None
    goal: float | None

    @property
    def ratio(self) -> float | None:
        """Ours ÷ peer; None without a peer."""
        return None if self.peer is None else self.ours / self.peer

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if there is none."""
        if self.goal is None:
            return None
        return (self.ours if self.ratio is None else self.ratio) <= self.goal

    def json(self) -> str:
        """Return the figure as one line of JSON."""
        ratio = None if self.ratio is None else round(self.ratio, 3)
        peer = None if self.peer is None else round(self.peer, 4)
        fields = {"work": self.work, "ours": round(self.ours, 4), "peer": peer, "ratio": ratio}
        return json.dumps(fields | {"goal": self.goal, "met": self.met})


@dataclass
class Side:
    """A dockerd with one driver, and for gearworkers the stack that serves it."""

    dockerd: Dockerd
    stack: Stack | None

    @property
    def is_ours(self) -> bool:
        """Whether this is gearworkers."""
        return self.stack is not None

    def start(self) -> None:
        """Start the stack, then dockerd."""
        if self.stack is not None:
            self.stack.start()
        self.dockerd.start()

    def stop(self) -> None:
        """Stop dockerd, then the stack."""
        self.dockerd.stop()
        if self.stack is not None:
            self.stack.stop()

    def stored_bytes(self) -> int:
        """Return the bytes on disk of images, containers and metadata."""
        os.sync()
        ours = tree_bytes(self.stack.root) if self.stack is not None else 0
        return ours + tree_bytes(self.dockerd.data_root)


@dataclass
class Pairs:
    """Values of both sides, collected in turns."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def add(self, side: Side, value: float) -> None:
        """Record one value."""
        self.add_value(side.is_ours, value)

    def add_value(self, is_ours: bool, value: float) -> None:
        """Record one value of gearworkers or of the peer."""
        (self.ours if is_ours else self.peer).append(value)

    def figure(self, work: str, goal: float | None) -> Figure:
        """Return the medians as a figure."""
        return Figure(work, statistics.median(self.ours), statistics.median(self.peer), goal)


@contextmanager
def fresh_disk() -> Iterator[Path]:
    """Mount a new ext4 for the duration of the context; yield its path."""
    image, path = sandbox.scratch() / "bench.img", sandbox.scratch() / "bench"
    mount_fresh(image, path, DISK_BYTES)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
        image.unlink()


def make_sides(directory: Path, settings: Mapping[str, str] | None = None) -> tuple[Side, Side]:
    """Return gearworkers and the peer, not started, with empty data roots below *directory*.

    Args:
        directory: Must not exist yet.
        settings: Further GEAR_… variables of the gearworkers stack.
    """
    directory.mkdir()
    stack = Stack(directory / "stack", "gear", dict(settings or {}))
    ours = Side(Dockerd("ours", directory / "ours", "gear"), stack)
    return ours, Side(Dockerd("peer", directory / "peer", "overlay2"), None)


@contextmanager
def both_sides(disk: Path, turn: int = 0) -> Iterator[tuple[Side, Side]]:
    """Run both sides with empty data roots; yield gearworkers first in even turns, the peer first in odd ones."""
    ours, peer = make_sides(disk / f"turn{turn}")
    try:
        ours.start()
        peer.start()
        yield (peer, ours) if turn % 2 else (ours, peer)
    finally:
        ours.stop()
        peer.stop()


def seconds(work: Callable[_P, object], *arguments: _P.args, **options: _P.kwargs) -> float:
    """Write all dirty pages, then do *work*; return the seconds that *work* took."""
    os.sync()
    begin = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - begin


def drop_caches() -> None:
    """Drop the page cache, so that the next reads are cold."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def is_fetching_done(side: Side) -> bool:
    """Return whether gearworkers has finished all fetches it began."""
    assert side.stack is not None
    return side.stack.lazy_status().arriving == 0


def warm_memory() -> None:
    """Touch free memory once: on a virtual machine the first touch of a page is far slower than later ones."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free_bytes = int(fields["MemFree"].split()[0]) * 1024
    with mmap.mmap(-1, min(free_bytes * 3 // 4, _MAX_WARM_BYTES)) as area:
        for offset in range(0, len(area), mmap.PAGESIZE):
            area[offset] = 1


def show(figures: list[Figure]) -> None:
    """Print a table, then one JSON line for each figure."""
    table = Table("work", "gearworkers", "overlayfs", "ratio", "goal", "met")
    for figure in figures:
        peer = "" if figure.peer is None else f"{figure.peer:.4g}"
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        goal = "" if figure.goal is None else f"≤ {figure.goal:g}"
        met = {True: "yes", False: "no", None: ""}[figure.met]
        table.add_row(figure.work, f"{figure.ours:.4g}", peer, ratio, goal, met)
    Console(width=110).print(table)
    for figure in figures:
        print(figure.json(), flush=True)
