"""The stack's memory at rest, the memory of each further worker process, and the price of starting one."""

from __future__ import annotations

import os
import re
import socket
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.frame import Figure
from tests.support import rootfs, sandbox
from tests.support.plugin import Plugin
from tests.support.processes import wait_until
from tests.support.rootfs import TreeSize
from tests.support.stack import Stack
from tests.support.tiny import tar_of

FEW, MANY = 2, 6
"""Numbers of imports at once; the stack has MANY processes for them."""
REST_S = 75.0
"""The stack is at rest when no process has started or ended for this time; idle processes end sooner."""
COLD_STARTS = 3
_LAYER = TreeSize(entries=4_000, content_bytes=60_000_000)
_HALF_BYTES = 1 << 20
_MB = 1e6
_MS = 1000.0
_ATTEMPTS = 10
_GATEWAYS_POOL = "gateway's pool"
_NAMES = {
    "packaging/up.py": "make up",
    "redis-server": "Redis",
    "plugin_gateway": "gateway",
    "gearworkers.lazyfs.fd_keeper": "keeper of the lazy file server",
    "lazyfs": "lazy file server",
    "gearworkers.workers": "workers",
    "multiprocessing": _GATEWAYS_POOL,
}
"""Names of processes by a part of their command line; the first match counts."""


@dataclass(frozen=True)
class _Memory:
    """Memory of one process in bytes: proportional (shared pages divided among their users), and unshared."""

    name: str
    parent_pid: int
    proportional_bytes: int
    unshared_bytes: int


def idle() -> list[Figure]:
    """Measure the stack of `make up` at rest, with worker processes that have each done one import, and at rest again.

    MB are 10^6 bytes of proportional memory (PSS); ms are those of an ApplyDiff of one small file.
    """
    directory = sandbox.scratch() / "idle"
    stack = Stack(directory, "idle", {"GEAR_WORKER_PROCESSES": str(MANY)})
    layer = directory / "layer.tar"
    rootfs.write_unshared_tree(layer, "idle", _LAYER)
    plugin = Plugin(stack.plugin_socket)
    stack.up()
    try:
        wait_until(lambda: plugin.status()["Degraded"] == "no", "the workers answer")
        fresh = _at_rest(stack)
        cold_ms, warm_ms = _first_and_second_import_ms(stack, plugin)
        few = _after_imports(stack, plugin, layer.read_bytes(), FEW)
        many = _after_imports(stack, plugin, layer.read_bytes(), MANY)
        rested = _at_rest(stack)
    finally:
        stack.make_up.stop()
    return [
        Figure("whole stack at rest after its start, MB", _total_mb(fresh), None, 220),
        Figure("whole stack at rest after work, MB", _total_mb(rested), None, 220),
        Figure("processes at rest after work", len(rested), None, None),
        *_by_name(rested),
        Figure(f"stack right after {FEW} imports at once, MB", _total_mb(few), None, None),
        Figure(f"stack right after {MANY} imports at once, MB", _total_mb(many), None, None),
        Figure("each further worker process, MB", _each_further_mb(few, many), None, 8),
        Figure("unshared memory of a worker process that has done one import, MB", _unshared_mb(many), None, None),
        Figure("import by a new worker process, ms more than by an idle one", cold_ms - warm_ms, None, 50),
        Figure("import by an idle worker process, ms", warm_ms, None, None),
    ]


def _processes(stack: Stack) -> dict[int, _Memory]:
    """Return the memory of each process of the stack by pid.

    These are the processes that have its GEAR_ROOT in their environment, and Redis, which overwrites its environment.
    """
    root = b"GEAR_ROOT=" + os.fsencode(stack.root)
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if root not in (directory / "environ").read_bytes().split(b"\0") and "redis-server" not in command:
                continue
            name = next((name for part, name in _NAMES.items() if part in command), command)
            parent_pid = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            sizes = _sizes((directory / "smaps_rollup").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        found[int(directory.name)] = _Memory(
            name, parent_pid, sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"]
        )
    return found


def _sizes(smaps_rollup: str) -> dict[str, int]:
    fields = (line.split(":") for line in smaps_rollup.splitlines()[1:])
    return {key: int(value.split()[0]) * 1024 for key, value in fields}


def _pool(processes: Mapping[int, _Memory]) -> list[_Memory]:
    """Return the processes of the workers' pools: those without children, below a worker with no others."""
    workers = {pid for pid, process in processes.items() if process.name == "workers"}
    roots = {pid for pid in workers if processes[pid].parent_pid not in workers}
    leaders = {pid for pid in workers if processes[pid].parent_pid in roots}
    return [processes[pid] for pid in workers if processes[pid].parent_pid in leaders]


def _at_rest(stack: Stack) -> dict[int, _Memory]:
    """Wait until the stack is at rest; return its processes."""
    pids, since_s = set(_processes(stack)), time.monotonic()
    while time.monotonic() - since_s < REST_S:
        time.sleep(1)
        if (now := set(_processes(stack))) != pids:
            pids, since_s = now, time.monotonic()
    return _processes(stack)


def _after_imports(stack: Stack, plugin: Plugin, layer: bytes, at_once: int) -> dict[int, _Memory]:
    """Import *layer* so often at once, each time in a process of its own; return the processes right afterwards.

    On a busy machine, the gateway's pool may be faster than a new worker process, or an import so slow that the first
    processes end before the last import does: it tries again. The gateway's pool is left out.
    """
    for _ in range(_ATTEMPTS):
        with ExitStack() as stack_of_connections, ThreadPoolExecutor(at_once) as senders:
            connections = []
            for begun in range(at_once):
                id = os.urandom(16).hex()
                plugin.call("Create", ID=id, Parent="")
                connections.append(stack_of_connections.enter_context(plugin.begin_apply(id, layer[:_HALF_BYTES])))
                _wait_until_at_work(plugin, begun + 1)
            list(senders.map(partial(_send_rest, layer[_HALF_BYTES:]), connections))
        processes = {pid: found for pid, found in _processes(stack).items() if found.name != _GATEWAYS_POOL}
        if len(_pool(processes)) >= at_once:
            return processes
    raise AssertionError(f"never {at_once} worker processes: {Counter(found.name for found in processes.values())}")


def _send_rest(rest: bytes, connection: socket.socket) -> None:
    connection.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(rest), rest))
    assert b" 200 " in connection.recv(1 << 16).splitlines()[0]


def _wait_until_at_work(plugin: Plugin, imports: int) -> None:
    """Wait until workers and the gateway's pool have begun this number of jobs."""

    def begun() -> int:
        return sum(int(count) for count in re.findall(r"(\d+) by", plugin.status()["At Work"]))

    wait_until(lambda: begun() >= imports, f"{imports} imports have begun")


def _first_and_second_import_ms(stack: Stack, plugin: Plugin) -> tuple[float, float]:
    """Return the medians of imports that wait for a new worker process, and of imports by an idle one."""
    cold, warm = [], []
    for _ in range(COLD_STARTS):
        wait_until(lambda: not _pool(_processes(stack)), "the pools are empty")
        cold.append(_import_ms(plugin))
        warm.append(min(_import_ms(plugin) for _ in range(3)))
    return statistics.median(cold), statistics.median(warm)


def _import_ms(plugin: Plugin) -> float:
    id, tar = os.urandom(16).hex(), tar_of({"file": os.urandom(1000)})
    plugin.call("Create", ID=id, Parent="")
    begin = time.perf_counter()
    status, answer = plugin.apply_diff(id, [tar])
    assert status == 200, answer
    return (time.perf_counter() - begin) * _MS


def _total_mb(processes: Mapping[int, _Memory]) -> float:
    return sum(process.proportional_bytes for process in processes.values()) / _MB


def _each_further_mb(few: Mapping[int, _Memory], many: Mapping[int, _Memory]) -> float:
    return (_total_mb(many) - _total_mb(few)) / (len(_pool(many)) - len(_pool(few)))


def _unshared_mb(processes: Mapping[int, _Memory]) -> float:
    return statistics.median(process.unshared_bytes for process in _pool(processes)) / _MB


def _by_name(processes: Mapping[int, _Memory]) -> list[Figure]:
    sums: Counter[str] = Counter()
    for process in processes.values():
        sums[process.name] += process.proportional_bytes
    return [Figure(f"  {name}, MB", size_bytes / _MB, None, None) for name, size_bytes in sums.most_common()]
