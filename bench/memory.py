"""The cost of gearworkers: time of Get and Put, resident memory, disk."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.frame import Figure, Pairs, Side, both_sides, fresh_disk
from gearworkers.util.unix_http import UnixHTTPConnection
from tests.support import rootfs
from tests.support.plugin import TIMEOUT_S
from tests.support.stack import Stack

CALLS = 300
IMAGES = 5
_MS = 1000.0
_MIB = 1 << 20


def memory() -> list[Figure]:
    """Measure Get and Put in ms, resident memory in MiB, and the bytes on disk of five images that share a base."""
    figures = []
    with fresh_disk() as disk:
        rootfs.write_unshared_tree(disk / "tree.tar", "memory", rootfs.ONE_GB)
        with both_sides(disk) as sides:
            ours = next(side for side in sides if side.is_ours)
            assert ours.stack is not None
            with _watched(ours.stack) as workers:
                ours.dockerd.docker("import", str(disk / "tree.tar"), "tree")
            figures += _resident(ours.stack, workers)
            figures += _get_and_put(ours)
        with both_sides(disk, 1) as sides:
            stored = Pairs()
            for side in sides:
                stored.add(side, _five_images(side))
            figures.append(stored.figure("disk used by 5 images that share a base, bytes", None))
    return figures


@dataclass
class _Workers:
    """Memory of the import worker's processes while they ran."""

    peak_bytes: int = 0
    """The largest process; shared pages counted in full."""
    together_bytes: int = 0
    """All processes at one time; shared pages counted once."""


@contextmanager
def _watched(stack: Stack) -> Iterator[_Workers]:
    """Sample the import worker's processes ten times a second: its writer process ends with the import."""
    found, ended = _Workers(), threading.Event()
    leader = stack.daemons["import"].pid

    def sample() -> None:
        while not ended.wait(0.1):
            sizes = [_sizes(pid) for pid in _session(leader)]
            found.peak_bytes = max(found.peak_bytes, *(resident for resident, _ in sizes))
            found.together_bytes = max(found.together_bytes, sum(share for _, share in sizes))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _sizes(pid: int) -> tuple[int, int]:
    """Return peak resident bytes, and resident bytes with shared pages divided; zeros for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        smaps = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return _kilobytes(status, "VmHWM:") * 1024, _kilobytes(smaps, "Pss:") * 1024


def _kilobytes(text: str, key: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(key)), 0)


def _resident(stack: Stack, workers: _Workers) -> list[Figure]:
    gateway, _ = _sizes(stack.daemons["gateway"].pid)
    together = "resident memory of all processes of the import worker together, MiB"
    return [
        Figure("resident memory of the gateway, MiB", gateway / _MIB, None, 80),
        Figure("resident memory of a worker during the import, MiB", workers.peak_bytes / _MIB, None, 150),
        Figure(together, workers.together_bytes / _MIB, None, None),
    ]


def _session(leader: int) -> list[int]:
    """Return the pids of all processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if int(path.read_text().rsplit(")", 1)[1].split()[3]) == leader:
                found.append(int(path.parent.name))
    return found


def _get_and_put(side: Side) -> list[Figure]:
    """Measure the plugin's Get and Put of a container whose image has ten steps; return the medians."""
    assert side.stack is not None
    steps = "\n".join(["FROM tree", *(f"COPY Dockerfile /{step}" for step in range(10))])
    context = side.dockerd.directory / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(steps)
    side.dockerd.docker("build", "-t", "steps", str(context))
    container = side.dockerd.docker("create", "steps", "true")
    mount_id = (side.dockerd.data_root / f"image/gear/layerdb/mounts/{container}/mount-id").read_text()
    gets, puts = [], []
    connection = UnixHTTPConnection(side.stack.plugin_socket, TIMEOUT_S)
    for _ in range(CALLS):
        gets.append(_call_ms(connection, "Get", {"ID": mount_id, "MountLabel": ""}))
        puts.append(_call_ms(connection, "Put", {"ID": mount_id}))
    return [
        Figure("Get, ms", statistics.median(gets), None, 2.0),
        Figure("Put, ms", statistics.median(puts), None, 2.0),
    ]


def _call_ms(connection: http.client.HTTPConnection, method: str, arguments: dict[str, str]) -> float:
    """Call a method of the plugin; return the milliseconds until its answer was read."""
    begin = time.perf_counter()
    connection.request("POST", f"/GraphDriver.{method}", json.dumps(arguments))
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert not answer.get("Err"), answer
    return (time.perf_counter() - begin) * _MS


def _five_images(side: Side) -> float:
    """Build five images that each install the same dependencies; return their bytes on disk."""
    side.dockerd.docker("import", str(rootfs.debian()), "debian")
    for number in range(IMAGES):
        text = f"FROM debian\nRUN mkdir /app{number} && cp -a /usr/lib /app{number}/lib\nRUN echo {number} > /number\n"
        side.dockerd.docker("build", "-t", f"image{number}", "-", stdin=text.encode())
    return side.stored_bytes()
