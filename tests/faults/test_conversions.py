"""Conversions by real workers over a real Redis: successful, failed, killed and repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import redis
from celery import Celery

from gearworkers.errors import GearError
from gearworkers.images.plan import plan_conversion
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.remote.factory import open_remote
from gearworkers.settings import RegistrySettings, RemoteSettings, Settings
from gearworkers.workers.celery_app import CONVERT_QUEUE, LAYER_TASK, make_app
from tests.support import registries
from tests.support.answers import Answer, answering
from tests.support.images import Image, contents_of, pull, tar_of
from tests.support.processes import wait_until
from tests.support.registry import Registry
from tests.support.stack import Stack

GEAR = [sys.executable, "-c", "from gearworkers.cli.main import main; main()"]
DAY_S = 24 * 3600
CELERY_COUNTS = "celery-taskset-meta-*.j"
"""Keys in Redis, one for each chord with a finished task."""


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("stack")
    (directory / "remote").mkdir()
    stack = Stack(
        directory, name="convert", settings={"GEAR_REMOTE": str(directory / "remote"), "GEAR_REMOTE_TOKEN": "token"}
    )
    yield stack
    stack.stop()


@pytest.fixture
def stack(running: Stack) -> Stack:
    """Return the stack with Redis and a convert worker running."""
    running.start("redis", "convert")
    return running


def at(peer: Registry, name: str) -> Repository:
    return Repository.of(RegistrySettings(), Reference.parse(f"{peer.host}/{name}"))


def begin(stack: Stack, *arguments: str) -> subprocess.Popen[str]:
    command = [*GEAR, "convert", *arguments]
    return subprocess.Popen(command, env=stack.environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def convert(stack: Stack, *arguments: str) -> tuple[int, str, str]:
    process = begin(stack, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def big_layers(count: int, size_bytes: int = 8 << 20) -> list[bytes]:
    """Return layers that take long enough to interrupt their conversion."""
    return [tar_of([(f"{at}/{part}", os.urandom(size_bytes // 200)) for part in range(200)]) for at in range(count)]


def begin_partial_conversion(stack: Stack, peer: Registry, name: str, layers: int) -> subprocess.Popen[str]:
    """Stop one worker process, begin a conversion of big layers to ``gear:NAME``, and return when one layer is done."""
    Image(big_layers(layers), compression="").push(at(peer, name), "v1")
    _let_pool_grow(stack, peer)
    before = done_layers(stack)
    os.kill(children(stack)[0], signal.SIGSTOP)
    process = begin(stack, f"{peer.host}/{name}:v1", f"{peer.host}/gear:{name}")
    wait_until(lambda: done_layers(stack) > before, "a layer is done")
    return process


def _let_pool_grow(stack: Stack, peer: Registry) -> None:
    """Let the worker have two idle processes, for some seconds."""
    while len(children(stack)) < 2:
        Image([tar_of([("unique", os.urandom(1 << 20))]) for _ in range(4)]).push(at(peer, "growing"), "v1")
        code, _, err = convert(stack, f"{peer.host}/growing:v1", f"{peer.host}/gear:growing")
        assert code == 0, err


def children(stack: Stack) -> list[int]:
    listing = subprocess.run(["pgrep", "-P", str(stack.daemons["convert"].pid)], capture_output=True, text=True)
    return [int(pid) for pid in listing.stdout.split()]


def done_layers(stack: Stack) -> int:
    documents = Path(stack.settings["GEAR_REMOTE"]) / "documents"
    return len(list(documents.glob("layer-*"))) if documents.exists() else 0


def test_workers_convert_each_layer_once(stack: Stack, peer: Registry) -> None:
    tars = [tar_of([(f"{name}/file", name.encode() * 1000)]) for name in ("a", "b", "c", "d")]
    Image(tars).push(at(peer, "small"), "v1")
    code, out, err = convert(stack, f"{peer.host}/small:v1", f"{peer.host}/gear:small")
    assert code == 0 and "4 (0 already converted)" in out, err
    assert len([line for line in err.splitlines() if line.startswith("layer ")]) == 4
    remote = open_remote(Settings(gear_root=stack.root, remote=RemoteSettings(url=stack.settings["GEAR_REMOTE"])))
    assert [contents_of(tar, remote) for tar in pull(at(peer, "gear"), "small").tars] == [
        contents_of(tar) for tar in tars
    ]
    remote.close()
    code, out, err = convert(stack, f"{peer.host}/small:v1", f"{peer.host}/gear:small2")
    assert code == 0 and "4 (4 already converted)" in out, err
    assert pull(at(peer, "gear"), "small2") == pull(at(peer, "gear"), "small")


def test_a_caller_with_another_remote_than_the_workers_gets_an_error(
    stack: Stack, peer: Registry, tmp_path: Path
) -> None:
    Image([tar_of([("here", b"here" * 1000)])]).push(at(peer, "here"), "v1")
    (tmp_path / "other").mkdir()
    stack.settings, before = {"GEAR_REMOTE": str(tmp_path / "other")}, stack.settings
    code, _, err = convert(stack, f"{peer.host}/here:v1", f"{peer.host}/gear:here")
    stack.settings = before
    assert code == 2
    assert str(tmp_path / "other") in err and before["GEAR_REMOTE"] in err
    assert err.splitlines()[-1].startswith("gear: this conversion is for GEAR_REMOTE=")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_forged_task_cannot_obtain_a_token_or_read_a_path(stack: Stack, peer: Registry, tmp_path: Path) -> None:
    """The attacker can write to Redis. The task names a foreign remote, or an image on the worker's machine."""
    image = Image([tar_of([("secret", b"secret" * 1000)])])
    image.write_layout(tmp_path / "layout")
    digest = image.push(at(peer, "forged"), "v1")
    with answering(lambda _: Answer(404)) as listener, sending(stack) as app:
        for source, remote, refusal in (
            (f"{peer.host}/forged:v1", listener.url, "this conversion is for GEAR_REMOTE="),
            (f"oci:{tmp_path}/layout", stack.settings["GEAR_REMOTE"], "registries only"),
            (f"content:{tmp_path}/layout@{digest}", stack.settings["GEAR_REMOTE"], "registries only"),
        ):
            plan = plan_conversion(RegistrySettings(), source, f"{listener.host}/stolen:v1", None)
            job = msgspec.to_builtins(plan.jobs()[0])
            with pytest.raises(GearError, match=refusal):
                app.send_task(LAYER_TASK, (job, remote), queue=CONVERT_QUEUE).get(timeout=60)
        assert listener.requests == []


@contextmanager
def sending(stack: Stack) -> Iterator[Celery]:
    """Yield a Celery app that sends tasks to the stack's Redis."""
    app = make_app(Settings(run_dir=stack.run_dir), with_results=True)
    yield app
    app.close()


def test_the_error_of_a_task_is_one_line_and_no_image_is_pushed(stack: Stack, peer: Registry) -> None:
    malformed = tar_of([("a", b"a")])[:1024] + b"no tar" * 1000  # the end of a layer is read only by its task
    Image([malformed, tar_of([("good", b"")])]).push(at(peer, "bad"), "v1")
    code, out, err = convert(stack, f"{peer.host}/bad:v1", f"{peer.host}/gear:bad")
    lines = [line for line in err.splitlines() if not line.startswith("layer ")]
    assert (code, out) == (2, "")
    assert len(lines) == 1 and lines[0].startswith("gear: tar header at byte 1024: the checksum is wrong")
    assert "bad" not in tags(peer)


def tags(peer: Registry) -> str:
    try:
        with urllib.request.urlopen(f"http://{peer.host}/v2/gear/tags/list") as page:
            return str(page.read())
    except urllib.error.HTTPError:  # no test has pushed to this repository yet
        return ""


def test_results_expire_after_a_day(stack: Stack) -> None:
    client = redis.Redis(unix_socket_path=str(stack.redis_socket))
    left_s = [client.ttl(key) for key in client.keys("celery-task-meta-*")]
    assert left_s and all(0 < ttl_s <= DAY_S for ttl_s in left_s)
    wait_until(lambda: client.llen(CONVERT_QUEUE) == 0, "a worker has taken the remaining tasks")
    client.close()


def test_only_the_layer_of_a_killed_process_is_converted_again(stack: Stack, peer: Registry) -> None:
    client = redis.Redis(unix_socket_path=str(stack.redis_socket))
    _let_pool_grow(stack, peer)
    done_before, counts_before = done_layers(stack), set(client.keys(CELERY_COUNTS))
    working = children(stack)[1]
    process = begin_partial_conversion(stack, peer, "killed", 4)

    def is_stopped_between_layers() -> bool:
        """Stop the process unless Celery has not counted a layer that is done: a kill then loses the whole chord."""
        os.kill(working, signal.SIGSTOP)
        counted = sum(client.zcard(key) for key in set(client.keys(CELERY_COUNTS)) - counts_before)
        if counted == done_layers(stack) - done_before:
            return True
        os.kill(working, signal.SIGCONT)
        return False

    wait_until(is_stopped_between_layers, "Celery has counted the finished layers")
    client.close()
    for pid in children(stack):
        os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "a worker was lost" not in err and "Gear image" in out
    assert len(pull(at(peer, "gear"), "killed").tars) == 4


def test_a_repeated_conversion_finishes_after_worker_and_caller_were_killed(stack: Stack, peer: Registry) -> None:
    before = done_layers(stack)
    process = begin_partial_conversion(stack, peer, "twice", 4)
    stack.kill("convert")
    process.kill()
    process.communicate()
    done = done_layers(stack) - before
    assert 0 < done < 4
    assert "twice" not in tags(peer)
    stack.start("convert")
    code, out, err = convert(stack, f"{peer.host}/twice:v1", f"{peer.host}/gear:twice")
    assert code == 0, err
    found = int(next(line for line in out.splitlines() if line.startswith("Layers ")).split()[2].lstrip("("))
    assert done <= found <= 4  # the new worker also did the queued tasks
    assert len(pull(at(peer, "gear"), "twice").tars) == 4


def test_a_waiting_caller_sends_the_tasks_of_a_lost_worker_again(stack: Stack, peer: Registry) -> None:
    process = begin_partial_conversion(stack, peer, "lost", 3)
    stack.kill("convert")
    time.sleep(0.1)
    stack.start("convert")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "a worker was lost" in err and "Gear image" in out


def test_the_error_without_a_worker_says_how_to_start_one(stack: Stack, peer: Registry) -> None:
    stack.stop("convert")
    code, _, err = convert(stack, f"{peer.host}/small:v1", f"{peer.host}/gear:none")
    assert code == 2 and "no worker takes tasks from the queue convert" in err and "--local" in err
    client = redis.Redis(unix_socket_path=str(stack.redis_socket))
    assert client.llen(CONVERT_QUEUE) == 0
    client.close()
