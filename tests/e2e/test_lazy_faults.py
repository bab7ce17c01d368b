"""Containers of a Gear image while the remote, the network or a process of the host fails."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.remote.factory import open_remote
from gearworkers.settings import RemoteSettings, Settings
from tests.support.lazyhost import FILES, LARGE, LazyHost
from tests.support.processes import wait_until

_BOUND_S = 60.0
"""Seconds within which a read fails: five attempts, four waits of up to 5 s, each answer within 5 s."""


def digest_of(name: str) -> bytes:
    return hashlib.sha256(FILES[name]).digest()


def read(host: LazyHost, container: str, name: str) -> subprocess.CompletedProcess[bytes]:
    """Read a file in the container, by a program that is in the container's memory by then."""
    return host.dockerd.call("exec", container, "cat", f"/{name}", timeout_s=_BOUND_S)


def assert_right(host: LazyHost, container: str, *names: str) -> None:
    """The files have their expected contents."""
    for name in names:
        done = read(host, container, name)
        assert done.returncode == 0, done.stderr
        assert done.stdout == FILES[name]


def assert_io_error(host: LazyHost, container: str, name: str) -> None:
    """Reading it fails at last, with EIO."""
    done = read(host, container, name)
    assert done.returncode != 0
    assert b"Input/output error" in done.stderr + done.stdout


@pytest.fixture
def container(host: LazyHost) -> str:
    """A running container with `cat` and `sh` already fetched."""
    container = host.start()
    host.dockerd.docker("exec", container, "sh", "-c", "cat /app/small0; ls /; sha256sum /app/small0")
    return container


def test_a_directory_works_as_the_remote(empty_host: LazyHost) -> None:
    empty_host.use_remote(str(empty_host.store))
    empty_host.pull()
    assert_right(empty_host, empty_host.start(), "app/small1", "app/large1")


def test_a_killed_remote_causes_reported_io_errors_until_it_is_back(host: LazyHost, container: str) -> None:
    host.manager.kill()
    for name in ("app/small1", "app/large1"):
        assert_io_error(host, container, name)
    assert_right(host, container, "app/small0")
    named = {digest_of(name).hex() for name in ("app/small1", "app/large1")}
    assert named <= host.stack.lazy_status().failures.keys()
    assert all(f"Failed {digest}" in host.stack.gear("status").stdout for digest in named)
    assert all(digest in host.stack.daemons["lazyfs"].log.read_text() for digest in named)
    assert "gear_lazy_failing_objects 2.0" in host.metrics()
    host.start_manager()
    assert_right(host, container, "app/small1", "app/large1")
    wait_until(lambda: host.stack.lazy_status().failures == {}, "both are whole")


@pytest.fixture
def spoilt(host: LazyHost) -> Iterator[dict[Path, bytes]]:
    """Damaged blobs of the remote during the test, with their right contents."""
    remote = open_remote(Settings(gear_root=host.stack.root, remote=RemoteSettings(url=str(host.store))))
    layout = remote.layout(digest_of("app/large1"))
    assert layout is not None
    remote.close()
    right = {
        host.blob(digest): host.blob(digest).read_bytes() for digest in (digest_of("app/small1"), layout[0].digest)
    }
    for path, content in right.items():
        path.write_bytes(bytes(byte ^ 1 for byte in content))
    yield right
    for path, content in right.items():
        path.write_bytes(content)


def put_near(host: LazyHost, path: Path, content: bytes) -> None:
    """Have this content for a blob of the remote in the host's nfs/."""
    near = host.stack.root / "nfs" / "objects" / path.parent.name
    near.mkdir(parents=True, exist_ok=True)
    (near / path.name).write_bytes(content)


def test_wrong_bytes_are_neither_served_nor_kept_and_another_source_is_tried(
    host: LazyHost, container: str, spoilt: dict[Path, bytes]
) -> None:
    corrupt = host.stack.lazy_status().corrupt
    for name in ("app/small1", "app/large1"):
        assert_io_error(host, container, name)
        assert not host.has(digest_of(name))
    assert host.stack.lazy_status().corrupt > corrupt
    for path, content in spoilt.items():
        put_near(host, path, content)
    put_near(host, host.blob(digest_of("app/small2")), b"here the near one is wrong")
    host.restart_lazyfs()
    assert_right(host, container, "app/small1", "app/large1", "app/small2")


def test_a_slow_remote_delays_only_the_requested_bytes(host: LazyHost, container: str) -> None:
    host.link.bytes_per_s = 300e3
    head = host.dockerd.call("exec", container, "head", "-c", "4096", "/app/large1").stdout
    assert head == LARGE["app/large1"][:4096]
    assert not host.has(digest_of("app/large1")), "the rest takes some twenty seconds more"
    assert_right(host, container, "app/small3")
    host.link.reset()
    assert_right(host, container, "app/large1")


def test_truncated_responses_are_retried_and_never_accepted(host: LazyHost, container: str) -> None:
    host.link.cut_after_bytes = 150_000
    assert_right(host, container, "app/small4", "app/large1")
    host.link.cut_after_bytes = 10
    assert_io_error(host, container, "app/small5")
    host.link.reset()
    assert_right(host, container, "app/small5")


def test_a_killed_lazy_file_server_delays_new_opens_and_opened_files_stay_readable(
    host: LazyHost, container: str
) -> None:
    script = "exec 3< /app/large1; head -c 1000000 <&3; read x; cat <&3"
    assert_right(host, container, "app/small1")
    with host.dockerd.popen("exec", "-i", container, "sh", "-c", script) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        content = reader.stdout.read(1_000_000)
        wait_until(lambda: host.has(digest_of("app/large1")), "the rest has arrived behind", 60.0)
        host.stack.kill("lazyfs")
        assert_right(host, container, "app/small0", "app/small1")
        with host.dockerd.popen("exec", container, "cat", "/app/small6") as waiting:
            time.sleep(0.5)
            assert waiting.poll() is None
            host.stack.start("lazyfs")
            assert waiting.communicate(timeout=60)[0] == FILES["app/small6"]
        reader.stdin.write(b"\n")
        reader.stdin.close()
        assert content + reader.stdout.read() == LARGE["app/large1"]


@pytest.mark.parametrize(
    "order",
    [
        ("lazyfs", "dockerd", "gateway", "redis"),
        ("gateway", "lazyfs", "redis", "dockerd"),
    ],
    ids="-".join,
)
def test_an_incomplete_image_keeps_running_after_a_restart_of_everything_in_any_order(
    host: LazyHost, container: str, order: tuple[str, ...]
) -> None:
    for name in order:
        if name == "dockerd":
            host.dockerd.restart()
        else:
            host.stack.stop(name)
            host.stack.start(name)
    host.stack.stop("import", "push")
    host.stack.start("import", "push")
    assert_right(host, container, "app/small1", "app/large1")
    second = host.start()
    assert_right(host, second, "app/small2", "app/large2")
    host.dockerd.docker("restart", "-t", "0", container)
    assert_right(host, container, "app/small3", "app/large0")


def test_gear_fsck_finds_a_damaged_object_and_it_is_fetched_again(host: LazyHost, container: str) -> None:
    assert_right(host, container, "app/small1")
    path = Path(os.fsdecode(ObjectStore(host.stack.root / "public").path(digest_of("app/small1"))))
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    assert host.stack.gear("fsck", "--read-data").returncode == 1
    told = host.stack.gear("fsck", "--read-data", "--repair").stdout
    assert f"object {path}: " in told
    wait_until(lambda: host.has(digest_of("app/small1")), "it has come again", 60.0)
    host.dockerd.docker("stop", "-t", "0", container)  # a restart keeps the mount
    host.dockerd.docker("start", container)
    assert_right(host, container, "app/small1")


def test_a_container_is_rejected_without_the_lazy_file_server_and_runs_when_it_is_back(host: LazyHost) -> None:
    host.stack.stop("lazyfs")
    done = host.dockerd.call("run", "--rm", "--network", "none", host.image, "true")
    assert done.returncode != 0
    assert b"gear lazyfs" in done.stderr
    host.stack.start("lazyfs")
    assert host.dockerd.run(host.image, "echo", "back") == "back"
