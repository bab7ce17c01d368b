"""The cost of gearworkers: time of Get and Put, resident memory, disk."""

from __future__ import annotations

import http.client
import json
import statistics
import time

from bench.frame import Figure, Pairs, Side, both_sides, fresh_disk
from bench.processes import Workers, resident_sizes, watched
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
            with watched(ours.stack) as workers:
                ours.dockerd.docker("import", str(disk / "tree.tar"), "tree")
            figures += _resident(ours.stack, workers)
            figures += _get_and_put(ours)
        with both_sides(disk, 1) as sides:
            stored = Pairs()
            for side in sides:
                stored.add(side, _five_images(side))
            figures.append(stored.figure("disk used by 5 images that share a base, bytes", None))
    return figures


def _resident(stack: Stack, workers: Workers) -> list[Figure]:
    gateway, _ = resident_sizes(stack.daemons["gateway"].pid)
    together = "resident memory of all processes of the import worker together, MiB"
    return [
        Figure("resident memory of the gateway, MiB", gateway / _MIB, None, 80),
        Figure("resident memory of a worker during the import, MiB", workers.peak_bytes / _MIB, None, 150),
        Figure(together, workers.together_bytes / _MIB, None, None),
    ]


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
