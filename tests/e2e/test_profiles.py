"""Start-up profiles with a real dockerd, registry and manager: recorded by a start, prefetched by a later pull."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.fetch.source import Chunk
from gearworkers.images.layer_records import INLINE_BYTES
from gearworkers.profiles import document
from gearworkers.profiles.document import Profile
from gearworkers.remote.factory import open_remote
from gearworkers.settings import RemoteSettings, Settings
from tests.support.lazyhost import LazyHost
from tests.support.processes import wait_until

SCRIPT = "cat /app/small.1 /app/small.7 /app/small.3 | wc -c; git --version; dd if=/app/large1 bs=64k count=1 | wc -c"


@pytest.fixture
def recording_host(empty_host: LazyHost) -> Iterator[LazyHost]:
    """Yield an empty host that records starts; the remote has no profile."""
    _use_window(empty_host, "30")
    fill_delay_s = empty_host.stack.settings["GEAR_FILL_DELAY_S"]
    yield empty_host
    empty_host.stack.set(GEAR_FILL_DELAY_S=fill_delay_s)
    _use_window(empty_host, "0")


def test_files_opened_by_a_first_start_are_prefetched_on_another_host(recording_host: LazyHost) -> None:
    host = recording_host
    host.pull()
    output = host.dockerd.run(host.image, "sh", "-c", SCRIPT)
    first = host.stack.lazy_status()
    wait_until(lambda: host.stack.lazy_status().profiles_absent == 1, "the start had no profile")
    assert host.stack.lazy_status().profiles_found == 0
    wait_until(lambda: bool(_profiles(host)), "the start was recorded", 60.0)
    (found,) = _profiles(host)
    wait_until(lambda: host.stack.lazy_status().arriving == 0, "the rest of each opened file has arrived", 60.0)

    host.reset()
    host.stack.set(GEAR_FILL_DELAY_S="600")  # only recorded files are fetched
    host.restart_lazyfs()
    host.pull()
    store = ObjectStore(host.stack.root / "public")
    small = [bytes.fromhex(opened.digest) for opened in found.objects if not opened.ranges]
    wait_until(lambda: all(map(store.has, small)), "the small objects are prefetched", 60.0)
    contents = _contents(host, found)
    wait_until(lambda: host.stack.lazy_status().prefetched >= contents, "large objects' chunks are prefetched", 60.0)
    assert host.dockerd.run(host.image, "sh", "-c", SCRIPT) == output
    status = host.stack.lazy_status()
    assert status.profiles_found >= 1 and not status.failures
    assert status.on_demand <= first.on_demand * 0.05
    assert status.received_bytes <= first.received_bytes * 1.1
    assert "prefetched" in host.stack.gear("status").stdout
    assert f"{len(found.objects)} objects" in host.stack.gear("profile", "show", host.image).stdout
    assert f"gear_lazy_prefetched_contents_total {status.prefetched}" in host.metrics()
    assert _profiles(host) == [found]


def test_profile_record_adds_files_opened_by_a_running_container(empty_host: LazyHost) -> None:
    host = empty_host
    host.pull()
    container = host.start()
    command = [str(Path(sys.executable).with_name("gear")), "profile", "record", container, "--seconds", "100"]
    with subprocess.Popen(command, env=host.stack.environ(), stdout=subprocess.PIPE, text=True) as recording:
        wait_until(lambda: _is_watching(recording.pid), "the recording has begun")
        host.dockerd.docker("exec", container, "git", "--version")
        recording.send_signal(signal.SIGINT)
        output, _ = recording.communicate()
    assert recording.returncode == 0
    assert int(output.removesuffix(" objects were opened\n")) > 1  # git and its libraries
    assert "nobody is not on this node: dockerd at" in host.stack.gear("profile", "record", "nobody").stderr
    host.dockerd.docker("rm", "-f", container)
    host.dockerd.docker("rmi", host.image)


def test_a_container_keeps_running_and_its_recorder_ends_when_the_gateway_is_killed(recording_host: LazyHost) -> None:
    host = recording_host
    host.pull()
    container = host.start()
    wait_until(lambda: bool(host.stack.recorders()), "the recorder runs", 60.0, lambda: host.stack.logs())
    host.stack.kill("gateway")
    wait_until(lambda: not host.stack.recorders(), "the recorder has ended", 60.0)
    host.stack.start("gateway")
    assert host.dockerd.docker("exec", container, "git", "--version").startswith("git version")
    host.dockerd.docker("rm", "-f", container)
    host.dockerd.docker("rmi", host.image)


def _use_window(host: LazyHost, window_s: str) -> None:
    shutil.rmtree(host.store / "documents" / "profiles", ignore_errors=True)
    host.stack.set(GEAR_PROFILE_WINDOW_S=window_s)
    host.stack.stop("gateway", "lazyfs")
    host.stack.start("gateway", "lazyfs")


def _is_watching(pid: int) -> bool:
    """Return whether the process has a fanotify group with a mark."""
    try:
        return any("fanotify sdev:" in info.read_text() for info in Path(f"/proc/{pid}/fdinfo").iterdir())
    except FileNotFoundError:
        return False  # the process has closed a descriptor


def _profiles(host: LazyHost) -> list[Profile]:
    """Return every version of every profile."""
    files = sorted((host.store / "documents" / "profiles").rglob("@*"))
    return [document.unpack(path.read_bytes()) for path in files]


def _contents(host: LazyHost, found: Profile) -> int:
    """Return the number of contents in a profile: small objects, and the recorded chunks of large objects."""
    remote = open_remote(Settings(gear_root=host.stack.root, remote=RemoteSettings(url=str(host.store))))
    contents = 0
    for opened in found.objects:
        layout = remote.layout(bytes.fromhex(opened.digest)) if opened.size_bytes > INLINE_BYTES else []
        ranges = opened.ranges or ((0, opened.size_bytes),)
        contents += 1 if layout is None else sum(any(_overlap(chunk, *range) for range in ranges) for chunk in layout)
    remote.close()
    return contents


def _overlap(chunk: Chunk, offset: int, size_bytes: int) -> bool:
    return chunk.offset < offset + size_bytes and offset < chunk.offset + chunk.size_bytes
