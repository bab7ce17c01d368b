"""Five applications started on an empty host: the time until they answer, and the bytes they fetch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from bench.frame import Figure, Side, drop_caches, fresh_disk, make_sides, nothing_arrives
from bench.servers import Held, Servers, far, near
from tests.support.applications import APPLICATIONS, Application
from tests.support.disk import file_bytes, tree_bytes
from tests.support.processes import wait_until

TURNS = 3
OLD = "1"
VERSIONS = ("1", "2", "3")
_NO_RECORDING = {"GEAR_PROFILE_WINDOW_S": "0"}
_PROFILES = Path("documents/profiles")


@dataclass(frozen=True)
class Start:
    """One start."""

    seconds: float
    """From the pull until the first answer."""
    received_bytes: int
    answer: bytes


@dataclass
class Starts:
    """Of one application, by side."""

    ours: list[Start] = field(default_factory=list)
    peer: list[Start] = field(default_factory=list)

    def figure(self, work: str, goal: float | None, value: Callable[[Start], float]) -> Figure:
        """Medians of *value*."""
        ours = statistics.median(value(start) for start in self.ours)
        return Figure(work, ours, statistics.median(value(start) for start in self.peer), goal)


@dataclass(frozen=True)
class Measured:
    """All starts over one network; *cold* ones had no profile of a start elsewhere."""

    cold: Mapping[str, Starts]
    profiled: Mapping[str, Starts]


def lazy() -> list[Figure]:
    """Seconds over the slow network."""
    return _times("100 Mbit/s and 20 ms", _measured_far(), 0.2, statistics.median, "median")


def local() -> list[Figure]:
    """Seconds over loopback."""
    return _times("loopback", _measure(near), 1.0, max, "slowest")


def received() -> list[Figure]:
    """Bytes over the slow network."""
    found = []
    for name, starts in _kinds(_measured_far()):
        figures = [
            starts[app.name].figure(f"bytes: {app.name} until it answers, {name} (MB)", None, _megabytes)
            for app in APPLICATIONS
        ]
        ratio = statistics.median(figure.ratio or 0.0 for figure in figures)
        found += [*figures, Figure(f"bytes: median of the five ratios, {name}", ratio, None, 0.16)]
    return found


def second() -> list[Figure]:
    """Bytes of versions 2 and 3 on a host where the previous version has answered and its opened files have arrived."""
    names = [f"{app.name}:{version}" for app in APPLICATIONS for version in VERSIONS]
    received: dict[str, dict[str, float]] = {version: {} for version in VERSIONS}
    with fresh_disk() as disk:
        held = Held(disk / "held")
        held.add(names, originals=False)
        with far(held) as servers:
            for app in APPLICATIONS:
                for version in VERSIONS:
                    _record(disk / f"record-{app.name}-{version}", servers, held, app, version)
                with _running(_sides(disk / app.name, servers, _NO_RECORDING)[0]) as ours:
                    for version in VERSIONS:
                        received[version][app.name] = _megabytes(_start(ours, servers, app, version))
                        wait_until(lambda: nothing_arrives(ours), "the opened files have arrived", 120.0)
    found = []
    for version, what in (("2", "all updated but the program"), ("3", "the program updated")):
        figures = [
            Figure(f"second: {name} {version} ({what}) until it answers, to version 1 (MB)", megabytes, first, None)
            for (name, megabytes), first in zip(received[version].items(), received[OLD].values(), strict=True)
        ]
        ratio = statistics.median(figure.ratio or 0.0 for figure in figures)
        found += [*figures, Figure(f"second: median of the five ratios, version {version} ({what})", ratio, None, 0.40)]
    return found


def storage() -> list[Figure]:
    """Bytes that three versions of each image take in registry and object store."""
    names = [f"{app.name}:{version}" for version in VERSIONS for app in APPLICATIONS]
    with fresh_disk() as disk:
        originals, converted = Held(disk / "originals"), Held(disk / "converted")
        originals.add(names, converted=False)
        converted.add(names, originals=False)
        work = "storage: registry and objects, three versions of each image"
        return [
            Figure(f"{work}, {what} (MB)", size(converted.directory) / 1e6, size(originals.registry) / 1e6, 0.46)
            for what, size in (("sizes of files", file_bytes), ("disk blocks of ext4", tree_bytes))
        ]


# -- starts


@cache
def _measured_far() -> Measured:
    """For two rows, measured once."""
    return _measure(far)


def _measure(network: Callable[[Held], AbstractContextManager[Servers]]) -> Measured:
    with fresh_disk() as disk:
        held = Held(disk / "held")
        held.add([f"{app.name}:{OLD}" for app in APPLICATIONS])
        cold = {app.name: Starts() for app in APPLICATIONS}
        profiled = {app.name: Starts() for app in APPLICATIONS}
        with network(held) as servers:
            for app in APPLICATIONS:
                for turn in range(TURNS):
                    _both(disk / f"{app.name}-cold-{turn}", servers, app, turn, cold[app.name])
                _record(disk / f"{app.name}-record", servers, held, app, OLD)
                profiled[app.name].peer = cold[app.name].peer
                for turn in range(TURNS):
                    ours, _ = _sides(disk / f"{app.name}-{turn}", servers, _NO_RECORDING)
                    with _running(ours):
                        profiled[app.name].ours.append(_start(ours, servers, app, OLD))
        for starts in (*cold.values(), *profiled.values()):
            assert len({start.answer for start in (*starts.ours, *starts.peer)}) == 1, "answers differ"
        return Measured(cold, profiled)


def _both(directory: Path, servers: Servers, app: Application, turn: int, starts: Starts) -> None:
    """One start on each side, one after the other, so that neither takes the network from the other."""
    sides = _sides(directory, servers, _NO_RECORDING)
    for side in sides if turn % 2 else reversed(sides):
        with _running(side):
            (starts.ours if side.is_ours else starts.peer).append(_start(side, servers, app, OLD))


def _record(directory: Path, servers: Servers, held: Held, app: Application, version: str) -> None:
    """Start it on another host, which keeps the profile of the start."""
    before = len(list(held.objects.glob(f"{_PROFILES}/**/*")))
    with _running(_sides(directory, servers, {})[0]) as ours:
        _start(ours, servers, app, version)
        wait_until(lambda: len(list(held.objects.glob(f"{_PROFILES}/**/*"))) > before, "a profile is kept", 60.0)


def _sides(directory: Path, servers: Servers, settings: Mapping[str, str]) -> tuple[Side, Side]:
    return make_sides(directory, {"GEAR_REMOTE": servers.manager, **settings})


@contextmanager
def _running(side: Side) -> Iterator[Side]:
    try:
        side.start()
        yield side
    finally:
        side.stop()


def _start(side: Side, servers: Servers, app: Application, version: str) -> Start:
    """Pull and run; the container is gone afterwards, the image stays."""
    image = f"{servers.registry}/{'gear/' if side.is_ours else ''}{app.name}:{version}"
    drop_caches()
    before_bytes, begin_s = servers.received_bytes(), time.perf_counter()
    side.dockerd.docker("pull", "-q", image)
    container = side.dockerd.docker("run", "-d", "--network=host", image)
    answer = app.wait()
    found = Start(time.perf_counter() - begin_s, servers.received_bytes() - before_bytes, answer)
    side.dockerd.docker("rm", "-f", container)
    return found


# -- figures


def _kinds(measured: Measured) -> list[tuple[str, Mapping[str, Starts]]]:
    return [
        ("with a profile of a start on another host", measured.profiled),
        ("without a profile", measured.cold),
    ]


def _times(
    network: str, measured: Measured, goal: float, over: Callable[[list[float]], float], what: str
) -> list[Figure]:
    """A figure an application, none to be slower, and one over the five."""
    found = []
    for name, starts in _kinds(measured):
        figures = [
            starts[app.name].figure(
                f"{app.name}, pull + run until it answers, {network}, {name} (s)", 1.0, lambda start: start.seconds
            )
            for app in APPLICATIONS
        ]
        ratio = over([figure.ratio or 0.0 for figure in figures])
        found += [*figures, Figure(f"{what} of the five ratios, {network}, {name}", ratio, None, goal)]
    return found


def _megabytes(start: Start) -> float:
    return start.received_bytes / 1e6
