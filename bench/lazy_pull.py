"""Unmodified images on an empty host, pulled by Docker on containerd: the time to the first answer, and the bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

from bench.containerd_sides import ContainerdSide
from bench.frame import Figure, fresh_disk
from bench.lazy import (
    NO_RECORDING,
    OLD,
    TURNS,
    Measured,
    Start,
    Starts,
    figures_of_bytes,
    figures_of_times,
    profiles_in,
    timed_start,
)
from bench.servers import ServerData, Servers, far, near
from tests.support.applications import APPLICATIONS, Application
from tests.support.containerd_host import Containerd, ContainerdDocker, stack_for_containerd
from tests.support.processes import wait_until

_SLOW_RATE, _SLOW = "24mbit", "3 MB/s"
_NODE = next(app for app in APPLICATIONS if app.name == "node")


def lazy_pull() -> list[Figure]:
    """Measure seconds and bytes over the slow network."""
    measured = _measured_far()
    times = figures_of_times("unmodified, 100 Mbit/s and 20 ms", measured, (0.15, 0.25), statistics.median, "median")
    return times + figures_of_bytes("unmodified", measured, 0.16)


def lazy_pull_local() -> list[Figure]:
    """Measure seconds over loopback."""
    return figures_of_times("unmodified, loopback", _measure(near), (1.0, 1.0), max, "slowest")


def lazy_pull_slow() -> list[Figure]:
    """Measure the Node image at 3 MB/s, with a profile, against a pull of all of it."""
    measured = _measure(partial(far, rate=_SLOW_RATE), (_NODE,), with_cold=False)
    starts = measured.profiled[_NODE.name]
    return [
        starts.figure(f"node, pull + run until it answers, {_SLOW} (s)", 1 / 12, lambda start: start.seconds),
        starts.figure(f"node, bytes until it answers, {_SLOW} (MB)", 0.06, lambda start: start.received_bytes / 1e6),
    ]


def shared_pull() -> list[Figure]:
    """Measure the bytes of a second image that shares its base with one that is here, without a remote."""
    first, second = "python", "node"
    with fresh_disk() as disk:
        data = ServerData(disk / "data")
        data.add([f"{name}:{OLD}" for name in (first, second)], converted=False)
        with near(data) as servers:

            def pulled(name: str, settings: Mapping[str, str] | None) -> float:
                with _side(disk / name, name, servers, settings) as side:
                    side.docker.docker("pull", "-q", f"{servers.registry}/{first}:{OLD}")
                    before_bytes = servers.received_bytes()
                    side.docker.docker("pull", "-q", f"{servers.registry}/{second}:{OLD}")
                    return (servers.received_bytes() - before_bytes) / 1e6

            work = f"{second}, pulled after {first}, with which it shares two layers, no remote (MB)"
            return [Figure(work, pulled("ours", {"GEAR_REMOTE": ""}), pulled("peer", None), 1.0)]


@cache
def _measured_far() -> Measured:
    return _measure(far)


def _measure(
    network: Callable[[ServerData], AbstractContextManager[Servers]],
    applications: tuple[Application, ...] = APPLICATIONS,
    *,
    with_cold: bool = True,
) -> Measured:
    """Measure starts without and with a profile, each on an empty host that runs alone."""
    cold = {app.name: Starts() for app in applications}
    profiled = {app.name: Starts() for app in applications}
    with fresh_disk() as disk:
        data = ServerData(disk / "data")
        data.add([f"{app.name}:{OLD}" for app in applications])
        with network(data) as servers:
            for app in applications:
                start = partial(_start_once, disk / app.name, servers, app)
                for turn in range(TURNS):
                    if with_cold:
                        cold[app.name].ours.append(start(f"cold{turn}", NO_RECORDING))
                    profiled[app.name].peer.append(start(f"peer{turn}", None))
                cold[app.name].peer = profiled[app.name].peer
                start("record", {}, until=partial(_is_above, profiles_in(data), data))
                profiled[app.name].ours = [start(f"ours{turn}", NO_RECORDING) for turn in range(TURNS)]
    for starts in (*cold.values(), *profiled.values()):
        assert len({start.answer for start in (*starts.ours, *starts.peer)}) == 1, "answers differ"
    return Measured(cold, profiled)


def _is_above(count: int, data: ServerData) -> bool:
    return profiles_in(data) > count


def _start_once(
    directory: Path,
    servers: Servers,
    app: Application,
    name: str,
    settings: Mapping[str, str] | None,
    until: Callable[[], bool] | None = None,
) -> Start:
    """Start the application on an empty host of its own; without *settings*, on containerd's overlayfs."""
    with _side(directory / name, f"{app.name}{name}", servers, settings) as side:
        found = timed_start(side.docker.docker, servers, app, f"{servers.registry}/{app.name}:{OLD}")
        if until is not None:
            wait_until(until, "a profile is published", 90.0)
        return found


@contextmanager
def _side(directory: Path, name: str, servers: Servers, settings: Mapping[str, str] | None) -> Iterator[ContainerdSide]:
    with ExitStack() as stops:
        stack = None
        if settings is not None:
            remote = {"GEAR_REMOTE": servers.manager, **settings}
            stack = stops.enter_context(stack_for_containerd(directory / "stack", name, remote))
        containerd = Containerd(directory / name, stack)
        side = ContainerdSide(containerd, ContainerdDocker(containerd))
        stops.callback(containerd.stop)
        containerd.start()
        stops.callback(side.docker.stop)
        side.docker.start()
        yield side
