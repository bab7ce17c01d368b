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

_MAX_READ_S = 60.0
"""Maximum time until a read fails: five attempts of up to 5 s, and four waits of up to 5 s."""


def digest_of(name: str) -> bytes:
    return hashlib.sha256(FILES[name]).digest()


def read(host: LazyHost, container: str, name: str) -> subprocess.CompletedProcess[bytes]:
    """Read a file in the container with `cat`, which has been fetched before."""
    return host.dockerd.call("exec", container, "cat", f"/{name}", timeout_s=_MAX_READ_S)


def assert_readable(host: LazyHost, container: str, *names: str) -> None:
    """Check that the files have their expected contents."""
    for name in names:
        done = read(host, container, name)
        assert done.returncode == 0, done.stderr
        assert done.stdout == FILES[name]


def assert_io_error(host: LazyHost, container: str, name: str) -> None:
    """Check that reading the file fails with EIO."""
    done = read(host, container, name)
    assert done.returncode != 0
    assert b"Input/output error" in done.stderr + done.stdout


@pytest.fixture
def container(host: LazyHost) -> str:
    """Start a container and fetch `cat` and `sh`; return its id."""
    container = host.start()
    host.dockerd.docker("exec", container, "sh", "-c", "cat /app/small.0; ls /; sha256sum /app/small.0")
    return container


def test_a_directory_works_as_the_remote(empty_host: LazyHost) -> None:
    empty_host.use_remote(str(empty_host.store))
    empty_host.pull()
    assert_readable(empty_host, empty_host.start(), "app/small.1", "app/large1")


def test_a_killed_remote_causes_reported_io_errors_until_it_is_back(host: LazyHost, container: str) -> None:
    host.manager.kill()
    for name in ("app/small.1", "app/large1"):
        assert_io_error(host, container, name)
    assert_readable(host, container, "app/small.0")
    named = {digest_of(name).hex() for name in ("app/small.1", "app/large1")}
    assert named <= host.stack.lazy_status().failures.keys()
    assert all(f"Failed {digest}" in host.stack.gear("status").stdout for digest in named)
    assert all(digest in host.stack.daemons["lazyfs"].log.read_text() for digest in named)
    assert "gear_lazy_failing_objects 2.0" in host.metrics()
    host.start_manager()
    assert_readable(host, container, "app/small.1", "app/large1")
    wait_until(lambda: host.stack.lazy_status().failures == {}, "both files are complete")


@pytest.fixture
def corrupted(host: LazyHost) -> Iterator[dict[Path, bytes]]:
    """Corrupt blobs of the remote during the test; yield their correct contents by path."""
    remote = open_remote(Settings(gear_root=host.stack.root, remote=RemoteSettings(url=str(host.store))))
    layout = remote.layout(digest_of("app/large1"))
    assert layout is not None
    remote.close()
    correct = {
        host.blob(digest): host.blob(digest).read_bytes() for digest in (digest_of("app/small.1"), layout[0].digest)
    }
    for path, content in correct.items():
        path.write_bytes(bytes(byte ^ 1 for byte in content))
    yield correct
    for path, content in correct.items():
        path.write_bytes(content)


def put_in_nfs(host: LazyHost, path: Path, content: bytes) -> None:
    """Write the content of a blob of the remote to the host's nfs/."""
    directory = host.stack.root / "nfs" / "objects" / path.parent.name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / path.name).write_bytes(content)


def test_wrong_bytes_are_neither_served_nor_kept_and_another_source_is_tried(
    host: LazyHost, container: str, corrupted: dict[Path, bytes]
) -> None:
    corrupt = host.stack.lazy_status().corrupt
    for name in ("app/small.1", "app/large1"):
        assert_io_error(host, container, name)
        assert not host.has(digest_of(name))
    assert host.stack.lazy_status().corrupt > corrupt
    for path, content in corrupted.items():
        put_in_nfs(host, path, content)
    put_in_nfs(host, host.blob(digest_of("app/small.2")), b"wrong only in nfs")
    host.restart_lazyfs()
    assert_readable(host, container, "app/small.1", "app/large1", "app/small.2")


def test_a_slow_remote_delays_only_the_requested_bytes(host: LazyHost, container: str) -> None:
    host.link.bytes_per_s = 300e3
    head = host.dockerd.call("exec", container, "head", "-c", "4096", "/app/large1").stdout
    assert head == LARGE["app/large1"][:4096]
    assert not host.has(digest_of("app/large1")), "the rest takes about twenty seconds"
    assert_readable(host, container, "app/small.3")
    host.link.reset()
    assert_readable(host, container, "app/large1")


def test_truncated_responses_are_retried_and_never_accepted(host: LazyHost, container: str) -> None:
    host.link.cut_after_bytes = 150_000
    assert_readable(host, container, "app/small.4", "app/large1")
    host.link.cut_after_bytes = 10
    assert_io_error(host, container, "app/small.5")
    host.link.reset()
    assert_readable(host, container, "app/small.5")


def test_a_killed_lazy_file_server_delays_new_opens_and_opened_files_stay_readable(
    host: LazyHost, container: str
) -> None:
    script = "exec 3< /app/large1; head -c 1000000 <&3; read x; cat <&3"
    assert_readable(host, container, "app/small.1")
    with host.dockerd.popen("exec", "-i", container, "sh", "-c", script) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        content = reader.stdout.read(1_000_000)
        wait_until(lambda: host.has(digest_of("app/large1")), "the rest has arrived in the background", 60.0)
        host.stack.kill("lazyfs")
        assert_readable(host, container, "app/small.0", "app/small.1")
        with host.dockerd.popen("exec", container, "cat", "/app/small.6") as waiting:
            time.sleep(0.5)
            assert waiting.poll() is None
            host.stack.start("lazyfs")
            assert waiting.communicate(timeout=60)[0] == FILES["app/small.6"]
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
    assert_readable(host, container, "app/small.1", "app/large1")
    second = host.start()
    assert_readable(host, second, "app/small.2", "app/large2")
    host.dockerd.docker("restart", "-t", "0", container)
    assert_readable(host, container, "app/small.3", "app/large0")


def test_gear_fsck_finds_a_damaged_object_and_it_is_fetched_again(host: LazyHost, container: str) -> None:
    assert_readable(host, container, "app/small.1")
    path = Path(os.fsdecode(ObjectStore(host.stack.root / "public").path(digest_of("app/small.1"))))
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    assert host.stack.gear("fsck", "--read-data").returncode == 1
    output = host.stack.gear("fsck", "--read-data", "--repair").stdout
    assert f"object {path}: " in output
    wait_until(lambda: host.has(digest_of("app/small.1")), "the object is fetched again", 60.0)
    host.dockerd.docker("stop", "-t", "0", container)  # a restart keeps the mount
    host.dockerd.docker("start", container)
    assert_readable(host, container, "app/small.1")


def test_a_container_is_rejected_without_the_lazy_file_server_and_runs_when_it_is_back(host: LazyHost) -> None:
    host.stack.stop("lazyfs")
    done = host.dockerd.call("run", "--rm", "--network", "none", host.image, "true")
    assert done.returncode != 0
    assert b"gear lazyfs" in done.stderr
    host.stack.start("lazyfs")
    assert host.dockerd.run(host.image, "echo", "back") == "back"
