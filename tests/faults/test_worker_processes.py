"""The processes of a worker's pool: forks of a parent that has imported everything, which end when they are idle."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.workers.scaling import IDLE_S
from tests.support.plugin import Plugin
from tests.support.processes import Daemon, wait_until
from tests.support.stack import Stack
from tests.support.tiny import tiny_tar

MOST_UNSHARED_BYTES = 22 << 20
"""Of a process that has done one small import; it has 16 MiB, and 32 without `gc.freeze()`."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Yield a stack whose processes log each import of a module."""
    stack = Stack(tmp_path_factory.mktemp("stack"), "workers", {"PYTHONPROFILEIMPORTTIME": "1"})
    stack.start("redis", "gateway", "import", "push")
    yield stack
    stack.stop()


@pytest.fixture
def plugin(stack: Stack) -> Plugin:
    return Plugin(stack.plugin_socket)


def imported(daemon: Daemon) -> list[str]:
    """Return the modules that a daemon and its children have imported."""
    lines = daemon.log.read_text(errors="replace").splitlines()
    return [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]


def children(daemon: Daemon) -> list[int]:
    listing = subprocess.run(["pgrep", "-P", str(daemon.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listing.stdout.split()]


def import_layer(plugin: Plugin) -> str:
    """Import a layer in a worker; return its id."""
    while True:
        id = os.urandom(16).hex()
        plugin.call("Create", ID=id, Parent="")
        assert plugin.apply_diff(id, [tiny_tar({"etc/new": os.urandom(1000)})])[0] == 200
        if "import" not in plugin.status()["Degraded"]:
            return id


def test_jobs_import_no_modules(stack: Stack, plugin: Plugin) -> None:
    workers = [stack.daemons["import"], stack.daemons["push"]]
    before = [imported(worker) for worker in workers]
    assert all("gearworkers.engine.engine" in modules for modules in before)
    id = import_layer(plugin)
    assert plugin.diff(id)[0] == 200
    plugin.call("Remove", ID=id)
    workers[1].wait_until(lambda: workers[1].log_count(b"collect_garbage") >= 2, "garbage is received and collected")
    assert [imported(worker)[len(known) :] for worker, known in zip(workers, before, strict=True)] == [[], []]


def test_a_process_shares_the_modules_with_its_parent(stack: Stack, plugin: Plugin) -> None:
    import_layer(plugin)
    for pid in children(stack.daemons["import"]):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        unshared_kb = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        assert unshared_kb * 1024 < MOST_UNSHARED_BYTES, lines


def test_a_process_has_one_thread_and_no_connection_of_its_parent(stack: Stack, plugin: Plugin) -> None:
    import_layer(plugin)
    worker = stack.daemons["import"]
    found = children(worker)
    assert found
    for pid in found:
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
        assert not sockets(pid) & sockets(worker.pid)


def sockets(pid: int) -> set[str]:
    """Return the sockets that a process has open."""
    links = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return {link for link in links if link.startswith("socket:")}


def test_idle_processes_end_and_the_next_job_starts_one(stack: Stack, plugin: Plugin) -> None:
    import_layer(plugin)
    worker = stack.daemons["import"]
    before = children(worker)
    assert before
    wait_until(lambda: not children(worker), "the pool is empty", 4 * IDLE_S)
    assert "import" not in plugin.status()["Degraded"]
    import_layer(plugin)
    assert children(worker) and not set(children(worker)) & set(before)
    stack.check_log("import")
