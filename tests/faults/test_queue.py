"""Callers of the plugin socket get a response even if the real Redis or the real workers fail during a call."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import partial

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from gearworkers.cas.store import ObjectStore
from gearworkers.util.unix_http import UnixHTTPConnection
from tests.support.plugin import TIMEOUT_S, Plugin, read_metrics
from tests.support.processes import wait_until
from tests.support.stack import Stack
from tests.support.tiny import tiny_tar

AOF_BYTES = 16 << 20
"""Size of the file system that holds the AOF of Redis."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"), name="queue")
    aof = str(stack.root / "redis")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={AOF_BYTES}", "tmpfs", aof], check=True)
    yield stack
    stack.stop()
    subprocess.run(["umount", aof], check=True)


@pytest.fixture
def plugin(stack: Stack) -> Plugin:
    """Return the plugin with all its processes running and healthy."""
    stack.start()
    plugin = Plugin(stack.plugin_socket)
    wait_until(lambda: is_served_by_worker(plugin), "a worker takes calls")
    return plugin


CORES = os.cpu_count() or 1


def is_served_by_worker(plugin: Plugin) -> bool:
    apply(plugin, new_layer_id())
    return "import" not in plugin.status()["Degraded"]


def new_layer_id() -> str:
    return os.urandom(16).hex()


def a_tar() -> bytes:
    return tiny_tar({"etc/new": os.urandom(1000), "etc/big": os.urandom(1 << 20)})


def apply(plugin: Plugin, id: str, tar: bytes | None = None) -> tuple[int, dict[str, object]]:
    plugin.call("Create", ID=id, Parent="")
    return plugin.apply_diff(id, [tar or a_tar()])


def children(stack: Stack) -> list[int]:
    listing = subprocess.run(
        ["pgrep", "-P", str(stack.daemons["import"].pid)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listing.stdout.split()]


def count(stack: Stack, by: str) -> float:
    """Return the number of ApplyDiffs that processes of the kind *by* have done."""
    text = read_metrics(stack.run_dir / "metrics.sock").decode()
    name = f'gear_orders_total{{by="{by}",call="apply_diff"}} '
    return sum(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))


def is_staged(stack: Stack, id: str) -> bool:
    return any(path.name.startswith(id) for path in (stack.root / "build").iterdir())


@contextmanager
def begun(plugin: Plugin, stack: Stack, id: str, tar: bytes) -> Iterator[socket.socket]:
    """Yield a connection that has sent the first half of *tar*, once a worker has begun the call."""
    while True:
        plugin.call("Create", ID=id, Parent="")
        with plugin.begin_apply(id, tar[: len(tar) // 2]) as connection:
            wait_until(lambda: is_staged(stack, id), "a process has begun")
            if "0 by gateway" in plugin.status()["At Work"]:
                yield connection
                return
        plugin.call("Remove", ID=id)  # the machine is busy, and the gateway's own pool was faster than the worker


def response_on(connection: socket.socket) -> tuple[int, bytes]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    with response:
        return response.status, response.read()


def test_diff_returns_the_tar_that_a_worker_stored(plugin: Plugin, stack: Stack) -> None:
    id, tar, before = new_layer_id(), a_tar(), count(stack, "worker")
    assert apply(plugin, id, tar)[0] == 200
    assert plugin.diff(id) == (200, tar)
    assert count(stack, "worker") == before + 1


def test_the_death_of_a_worker_fails_its_call_and_the_next_call_works(plugin: Plugin, stack: Stack) -> None:
    id, tar = new_layer_id(), a_tar()
    with begun(plugin, stack, id, tar) as connection:
        for pid in children(stack):
            os.kill(pid, signal.SIGKILL)
        status, error = response_on(connection)
        assert status == 500 and b"died" in error
    status, answer = plugin.apply_diff(id, [tar])
    assert status == 500 and "pull or build again" in str(answer["Err"])
    plugin.call("Remove", ID=id)
    assert apply(plugin, id, tar)[0] == 200
    assert plugin.diff(id) == (200, tar)


def test_without_redis_the_gateway_does_the_calls_and_recovers_when_redis_is_back(plugin: Plugin, stack: Stack) -> None:
    stack.kill("redis")
    id, tar, before = new_layer_id(), a_tar(), count(stack, "gateway")
    assert apply(plugin, id, tar)[0] == 200
    assert plugin.diff(id) == (200, tar)
    assert count(stack, "gateway") == before + 1
    assert "Redis does not answer" in plugin.status()["Degraded"]
    stack.start("redis")
    wait_until(lambda: is_served_by_worker(plugin), "the workers have found Redis again")


@contextmanager
def full_disk(stack: Stack, redis: Redis) -> Iterator[None]:
    """Fill the file system below the AOF."""
    filler = stack.root / "redis" / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    with suppress(ResponseError):  # Redis rejects the following writes
        redis.set("filler", bytes(1 << 16))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def configured(stack: Stack, redis: Redis, name: str, value: str) -> Iterator[None]:
    """Change a setting of Redis."""
    redis.config_set(name, value)
    try:
        yield
    finally:
        redis.config_set(name, 0)


@contextmanager
def failed_over(stack: Stack, redis: Redis) -> Iterator[None]:
    """Make Redis a replica."""
    redis.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        redis.replicaof("NO", "ONE")


@contextmanager
def in_a_script(stack: Stack, redis: Redis) -> Iterator[None]:
    """Make Redis run an endless script."""
    redis.config_set("busy-reply-threshold", 1)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(stack.redis_socket))
        client.sendall(b"EVAL 'while true do end' 0\r\n")
        try:
            yield
        finally:
            redis.script_kill()


REFUSALS: dict[str, Callable[[Stack, Redis], AbstractContextManager[None]]] = {
    "AOF": full_disk,
    "good replicas": partial(configured, name="min-replicas-to-write", value="1"),
    "read only": failed_over,
    "maxmemory": partial(configured, name="maxmemory", value="1"),
    "busy": in_a_script,
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_the_gateway_does_the_calls_while_redis_refuses_tasks_and_the_same_workers_return(
    plugin: Plugin, stack: Stack, refusal: str
) -> None:
    id, tar, before, worker = new_layer_id(), a_tar(), count(stack, "gateway"), stack.daemons["import"]
    pid, tried_twice = worker.pid, worker.log_count(b"Trying again in 4")
    with Redis(unix_socket_path=str(stack.redis_socket)) as redis, REFUSALS[refusal](stack, redis):
        assert apply(plugin, id, tar)[0] == 200
        assert plugin.diff(id) == (200, tar)
        assert count(stack, "gateway") == before + 1
        assert "import: Redis refuses tasks" in plugin.status()["Degraded"] and refusal in plugin.status()["Degraded"]
        if refusal not in (
            "maxmemory",
            "busy",
        ):  # with maxmemory workers still take tasks; a busy Redis does not answer them
            wait_until(lambda: worker.log_count(b"Trying again in 4") > tried_twice, "the worker tries twice")
    wait_until(lambda: is_served_by_worker(plugin), "a worker takes calls again")
    assert stack.is_running("import") and worker.pid == pid


def test_a_worker_recovers_when_its_processes_die_just_before_redis(plugin: Plugin, stack: Stack) -> None:
    worker = stack.daemons["import"]
    noticed = worker.log_count(b"Cannot connect")
    for pid in children(stack):
        os.kill(pid, signal.SIGKILL)
    stack.kill("redis")
    worker.wait_until(lambda: worker.log_count(b"Cannot connect") > noticed, "the worker reports the lost connection")
    stack.start("redis")
    worker.wait_until(lambda: is_served_by_worker(plugin), "the worker takes calls again")


def test_a_running_import_survives_the_death_of_redis(plugin: Plugin, stack: Stack) -> None:
    id, tar = new_layer_id(), a_tar()
    with begun(plugin, stack, id, tar) as connection:
        stack.kill("redis")
        rest = tar[len(tar) // 2 :]
        connection.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(rest), rest))
        assert response_on(connection)[0] == 200
    assert plugin.diff(id) == (200, tar)


def test_without_workers_the_gateway_does_the_calls_and_queued_tasks_are_not_repeated(
    plugin: Plugin, stack: Stack
) -> None:
    stack.kill("import")
    ids, tar = [new_layer_id(), new_layer_id()], a_tar()
    assert [apply(plugin, id, tar)[0] for id in ids] == [200, 200]
    assert "import: no worker answers" in plugin.status()["Degraded"]
    stack.start("import")
    wait_until(lambda: is_served_by_worker(plugin), "the new workers take calls")
    assert [plugin.diff(id) for id in ids] == [(200, tar), (200, tar)]


def test_stalled_callers_block_no_other_call_and_are_served_when_they_continue(plugin: Plugin, stack: Stack) -> None:
    """There are as many stalled callers as workers and gateway have processes."""
    tar = a_tar()
    stalled = {new_layer_id(): tar[: len(tar) // 2] for _ in range(2 * CORES)} | {
        new_layer_id(): tar[:1] for _ in range(2 * CORES)
    }
    with ExitStack() as stack_of_connections:
        connections = {}
        for id, begin in stalled.items():
            plugin.call("Create", ID=id, Parent="")
            connections[id] = stack_of_connections.enter_context(plugin.begin_apply(id, begin))
        wait_until(lambda: f"; {2 * CORES} wait for" in plugin.status()["At Work"], "the begun calls are stalled")
        id = new_layer_id()
        assert apply(plugin, id, tar)[0] == 200
        assert plugin.diff(id) == (200, tar)
        for id, begin in stalled.items():
            rest = tar[len(begin) :]
            connections[id].sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(rest), rest))
            assert response_on(connections[id])[0] == 200
    assert all(plugin.diff(id) == (200, tar) for id in stalled)


def test_more_concurrent_commits_than_processes_all_end(plugin: Plugin) -> None:
    """`docker commit` streams the response of a Diff into an ApplyDiff, so each waits for the other."""
    source, tar = new_layer_id(), tiny_tar({"etc/big": os.urandom(6 << 20)})
    assert apply(plugin, source, tar)[0] == 200

    def commit(id: str) -> int:
        connection = UnixHTTPConnection(plugin.path, TIMEOUT_S)
        connection.request("POST", "/GraphDriver.Diff", json.dumps({"ID": source, "Parent": ""}))
        with closing(connection), connection.getresponse() as diff:
            plugin.call("Create", ID=id, Parent="")
            return plugin.apply_diff(id, iter(partial(diff.read, 1 << 16), b""))[0]

    with ThreadPoolExecutor(2 * CORES) as callers:
        assert list(callers.map(commit, [new_layer_id() for _ in range(2 * CORES)])) == [200] * 2 * CORES


def test_a_gateway_killed_during_an_import_leaves_no_partial_layer(plugin: Plugin, stack: Stack) -> None:
    id, tar = new_layer_id(), a_tar()
    with begun(plugin, stack, id, tar):
        stack.kill("gateway")
        wait_until(lambda: not is_staged(stack, id), "the worker has given up")
    stack.start("gateway")
    status, answer = plugin.apply_diff(id, [tar])
    assert status == 500 and "pull or build again" in str(answer["Err"])
    plugin.call("Remove", ID=id)
    assert apply(plugin, id, tar)[0] == 200
    assert plugin.diff(id) == (200, tar)


def test_the_rest_of_a_tar_after_the_death_of_a_gateway_is_rejected(plugin: Plugin, stack: Stack) -> None:
    rests: dict[str, list[bytes]] = {new_layer_id(): [], new_layer_id(): [bytes(1024)], new_layer_id(): [tiny_tar()]}
    for id in rests:
        plugin.call("Create", ID=id, Parent="")
    os.killpg(stack.daemons["gateway"].pid, signal.SIGSTOP)  # so no worker learns of these calls
    with ExitStack() as connections:
        for id in rests:
            connections.enter_context(plugin.begin_apply(id, a_tar()[:10240]))
        stack.kill("gateway")
    stack.start("gateway")
    for id, rest in rests.items():
        status, answer = plugin.apply_diff(id, rest)
        assert status == 500 and "the gateway was restarted" in str(answer["Err"])
        plugin.call("Remove", ID=id)


def test_objects_of_removed_layers_are_collected(plugin: Plugin, stack: Stack) -> None:
    content = os.urandom(300_000)
    id = new_layer_id()
    assert apply(plugin, id, tiny_tar({"only/here": content}))[0] == 200

    public = ObjectStore(stack.root / "public")

    def is_stored() -> bool:
        return public.has(hashlib.sha256(content).digest())

    assert is_stored()
    plugin.call("Remove", ID=id)
    wait_until(lambda: not is_stored(), "the object is collected")
