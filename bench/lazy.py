"""Five applications started on an empty host: the time to the first response, and the bytes received."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from bench.frame import Figure, Side, drop_caches, fresh_disk, is_fetching_done, make_sides
from bench.servers import ServerData, Servers, far, near
from tests.support.applications import APPLICATIONS, Application
from tests.support.disk import file_bytes, tree_bytes
from tests.support.processes import wait_until

TURNS = 3
OLD = "1"
VERSIONS = ("1", "2", "3")
NO_RECORDING = {"GEAR_PROFILE_WINDOW_S": "0"}
_PROFILES = Path("documents/profiles")


@dataclass(frozen=True)
class Start:
    """One start of an application."""

    seconds: float
    """From the pull to the first response."""
    received_bytes: int
    answer: bytes


@dataclass
class Starts:
    """The starts of one application on each side."""

    ours: list[Start] = field(default_factory=list)
    peer: list[Start] = field(default_factory=list)

    def figure(self, work: str, goal: float | None, value: Callable[[Start], float]) -> Figure:
        """Return the medians of *value* as a figure."""
        ours = statistics.median(value(start) for start in self.ours)
        return Figure(work, ours, statistics.median(value(start) for start in self.peer), goal)


@dataclass(frozen=True)
class Measured:
    """All starts over one network, by application."""

    cold: Mapping[str, Starts]
    """Starts without a profile."""
    profiled: Mapping[str, Starts]
    """Starts with a profile of a start on another host."""


def lazy() -> list[Figure]:
    """Measure seconds over the slow network."""
    return figures_of_times("100 Mbit/s and 20 ms", _measured_far(), (0.2, 0.2), statistics.median, "median")


def local() -> list[Figure]:
    """Measure seconds over loopback."""
    return figures_of_times("loopback", _measure(near), (1.0, 1.0), max, "slowest")


def received() -> list[Figure]:
    """Measure bytes over the slow network."""
    return figures_of_bytes("bytes", _measured_far(), 0.16)


def second() -> list[Figure]:
    """Measure the bytes of versions 2 and 3 on a host that has run the previous version and fetched its open files."""
    names = [f"{app.name}:{version}" for app in APPLICATIONS for version in VERSIONS]
    received: dict[str, dict[str, float]] = {version: {} for version in VERSIONS}
    with fresh_disk() as disk:
        data = ServerData(disk / "data")
        data.add(names, originals=False)
        with far(data) as servers:
            for app in APPLICATIONS:
                for version in VERSIONS:
                    _record(disk / f"record-{app.name}-{version}", servers, data, app, version)
                with _running(_sides(disk / app.name, servers, NO_RECORDING)[0]) as ours:
                    for version in VERSIONS:
                        received[version][app.name] = _megabytes(_start(ours, servers, app, version))
                        wait_until(lambda: is_fetching_done(ours), "the opened files have arrived", 120.0)
    found = []
    for version, change in (("2", "all updated but the program"), ("3", "the program updated")):
        figures = [
            Figure(f"second: {name} {version} ({change}) until it answers, to version 1 (MB)", megabytes, first, None)
            for (name, megabytes), first in zip(received[version].items(), received[OLD].values(), strict=True)
        ]
        ratio = statistics.median(figure.ratio or 0.0 for figure in figures)
        found += [
            *figures,
            Figure(f"second: median of the five ratios, version {version} ({change})", ratio, None, 0.40),
        ]
    return found


def storage() -> list[Figure]:
    """Measure the bytes that three versions of each image take in registry and object store."""
    names = [f"{app.name}:{version}" for version in VERSIONS for app in APPLICATIONS]
    with fresh_disk() as disk:
        originals, converted = ServerData(disk / "originals"), ServerData(disk / "converted")
        originals.add(names, converted=False)
        converted.add(names, originals=False)
        work = "storage: registry and objects, three versions of each image"
        return [
            Figure(f"{work}, {measure} (MB)", size(converted.directory) / 1e6, size(originals.registry) / 1e6, 0.46)
            for measure, size in (("sizes of files", file_bytes), ("disk blocks of ext4", tree_bytes))
        ]


# -- starts


@cache
def _measured_far() -> Measured:
    """Measure over the slow network, once for two benchmarks."""
    return _measure(far)


def _measure(network: Callable[[ServerData], AbstractContextManager[Servers]]) -> Measured:
    with fresh_disk() as disk:
        data = ServerData(disk / "data")
        data.add([f"{app.name}:{OLD}" for app in APPLICATIONS])
        cold = {app.name: Starts() for app in APPLICATIONS}
        profiled = {app.name: Starts() for app in APPLICATIONS}
        with network(data) as servers:
            for app in APPLICATIONS:
                for turn in range(TURNS):
                    _start_on_both(disk / f"{app.name}-cold-{turn}", servers, app, turn, cold[app.name])
                _record(disk / f"{app.name}-record", servers, data, app, OLD)
                profiled[app.name].peer = cold[app.name].peer
                for turn in range(TURNS):
                    ours, _ = _sides(disk / f"{app.name}-{turn}", servers, NO_RECORDING)
                    with _running(ours):
                        profiled[app.name].ours.append(_start(ours, servers, app, OLD))
        for starts in (*cold.values(), *profiled.values()):
            assert len({start.answer for start in (*starts.ours, *starts.peer)}) == 1, "answers differ"
        return Measured(cold, profiled)


def _start_on_both(directory: Path, servers: Servers, app: Application, turn: int, starts: Starts) -> None:
    """Start the application on each side, one after the other, so that they do not share the network."""
    sides = _sides(directory, servers, NO_RECORDING)
    for side in sides if turn % 2 else reversed(sides):
        with _running(side):
            (starts.ours if side.is_ours else starts.peer).append(_start(side, servers, app, OLD))


def _record(directory: Path, servers: Servers, data: ServerData, app: Application, version: str) -> None:
    """Start the application on another host, which publishes a profile of the start."""
    before = profiles_in(data)
    with _running(_sides(directory, servers, {})[0]) as ours:
        _start(ours, servers, app, version)
        wait_until(lambda: profiles_in(data) > before, "a profile is published", 60.0)


def profiles_in(data: ServerData) -> int:
    """Return the number of files of profiles in the manager's store."""
    return len(list(data.objects.glob(f"{_PROFILES}/**/*")))


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
    image = f"{servers.registry}/{'gear/' if side.is_ours else ''}{app.name}:{version}"
    return timed_start(side.dockerd.docker, servers, app, image)


def timed_start(docker: Callable[..., str], servers: Servers, app: Application, image: str) -> Start:
    """Pull *image* with `docker` and run a container until it answers; remove the container, keep the image."""
    drop_caches()
    before_bytes, begin_s = servers.received_bytes(), time.perf_counter()
    docker("pull", "-q", image)
    container = docker("run", "-d", "--network=host", image)
    answer = app.wait()
    found = Start(time.perf_counter() - begin_s, servers.received_bytes() - before_bytes, answer)
    docker("rm", "-f", container)
    return found


# -- figures


def _kinds(measured: Measured) -> list[tuple[str, Mapping[str, Starts]]]:
    """Return the measured starts by kind, each with its name."""
    return [
        ("with a profile of a start on another host", measured.profiled),
        ("without a profile", measured.cold),
    ]


def figures_of_times(
    network: str,
    measured: Measured,
    goals: tuple[float, float],
    over: Callable[[list[float]], float],
    over_name: str,
) -> list[Figure]:
    """Return a figure for each application, with the goal not to be slower, and one over all five.

    Args:
        network: Describes it.
        measured: The starts.
        goals: For the figure over all five, with and without a profile.
        over: Combines the five ratios.
        over_name: Its name.
    """
    found = []
    for (name, starts), goal in zip(_kinds(measured), goals, strict=True):
        figures = [
            starts[app.name].figure(
                f"{app.name}, pull + run until it answers, {network}, {name} (s)", 1.0, lambda start: start.seconds
            )
            for app in APPLICATIONS
        ]
        ratio = over([figure.ratio or 0.0 for figure in figures])
        found += [*figures, Figure(f"{over_name} of the five ratios, {network}, {name}", ratio, None, goal)]
    return found


def _megabytes(start: Start) -> float:
    return start.received_bytes / 1e6


def figures_of_bytes(work: str, measured: Measured, goal: float) -> list[Figure]:
    """Return the bytes of each application's starts, and the median of the five ratios."""
    found = []
    for name, starts in _kinds(measured):
        figures = [
            starts[app.name].figure(f"{work}: {app.name} until it answers, {name} (MB)", None, _megabytes)
            for app in APPLICATIONS
        ]
        ratio = statistics.median(figure.ratio or 0.0 for figure in figures)
        found += [*figures, Figure(f"{work}: median of the five ratios of bytes, {name}", ratio, None, goal)]
    return found
