"""Start-up profiles on the real kernel: recorded on one node by fanotify, prefetched on another by `gear lazyfs`."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs import client
from gearworkers.lazyfs.client import read_status
from gearworkers.mounts.mountinfo import wait_until_mounted
from gearworkers.mounts.overlay import is_mounted
from gearworkers.profiles import document as profile_document
from gearworkers.profiles.document import OpenedObject, Profile
from gearworkers.profiles.resolve import profile_name
from gearworkers.remote.factory import open_remote
from gearworkers.remote.remote import Remote
from gearworkers.settings import RemoteSettings, Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.lazynode import LazyNode, gear_tar, lazy_node
from tests.support.processes import PATIENCE_S, wait_until

pytestmark = pytest.mark.slow

GEAR = str(Path(sys.executable).with_name("gear"))
LARGE = random.Random(1).randbytes(4 << 20)
FILES = {f"etc/file{number}": b"content %d" % number * 50 for number in range(20)} | {"lib/large": LARGE}
SMALL = [f"etc/file{number}" for number in (7, 3, 11)]


class StartNode(Protocol):
    """Starts the node of this name."""

    def __call__(self, name: str, window_s: float = 30.0) -> LazyNode: ...


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait long for the server, since the machine may be busy."""
    monkeypatch.setattr(client, "REPORT_TIMEOUT_S", PATIENCE_S)


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    """A remote in a directory, with the contents of FILES."""
    (tmp_path / "remote").mkdir()
    remote = open_remote(Settings(gear_root=tmp_path, remote=RemoteSettings(url=str(tmp_path / "remote"))))
    for number, content in enumerate(FILES.values()):
        (tmp_path / f"content{number}").write_bytes(content)
        with open(tmp_path / f"content{number}", "rb") as file:
            remote.put(hashlib.sha256(content).digest(), file.fileno())
    return remote


@pytest.fixture
def start_node(tmp_path: Path, remote: Remote) -> Iterator[StartNode]:
    """Create nodes by name, each with a `gear lazyfs` of its own."""
    with ExitStack() as stack:
        yield lambda name, window_s=30.0: stack.enter_context(_node(tmp_path / name, tmp_path / "remote", window_s))


@contextmanager
def _node(root: Path, remote: Path, window_s: float) -> Iterator[LazyNode]:
    root.mkdir()
    node = LazyNode(root)
    node.settings = replace(
        node.settings, remote=replace(node.settings.remote, url=str(remote)), profile_window_s=window_s
    )
    node.driver = GearDriver(node.settings)
    with subprocess.Popen([GEAR, "lazyfs"], env=environ(node) | {"GEAR_PROFILE_WINDOW_S": f"{window_s}"}) as server:
        try:
            wait_until_mounted(node.settings.lazy_mount_path, PATIENCE_S)
            wait_until(lambda: read_status(node.settings.lazyfs_socket) is not None, "the server answers")
            yield node
        finally:
            node.driver.cleanup()
            node.driver.release()
            server.terminate()
            assert server.wait(PATIENCE_S) == 0
            node.close()


def document(node: LazyNode, image: str = "image") -> str:
    """Return the name of the image's profile."""
    return profile_name(LayerStore(node.settings, ObjectStore(node.settings.gear_public_cache_path)), image)


def digest(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()


def has(node: LazyNode, name: str) -> bool:
    return ObjectStore(node.settings.gear_public_cache_path).has(bytes.fromhex(digest(name)))


def put_program(root: Path) -> None:
    """Add a program that is not in the image. `cp` writes it, since a fork meanwhile would keep it open for writing."""
    subprocess.run(["cp", "/bin/true", root / "true"], check=True)


def start(root: Path) -> None:
    """Run a program, as the container does first."""
    put_program(root)
    subprocess.run([root / "true"], check=True)
    read_some(root)


def read_some(root: Path) -> None:
    """Read files, as the container does next."""
    for name in SMALL:
        assert (root / name).read_bytes() == FILES[name]
    fd = os.open(root / "lib/large", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    assert os.pread(fd, 4096, 2 << 20) == LARGE[2 << 20 : (2 << 20) + 4096]
    os.close(fd)


def recorded(remote: Remote, name: str) -> Profile:
    wait_until(lambda: remote.document(name) is not None, "the profile exists")
    data = remote.document(name)
    assert data is not None
    return profile_document.unpack(data)


def first_start(node: LazyNode, remote: Remote) -> Profile:
    """Pull the image and run its first container; return the profile."""
    node.apply(gear_tar(FILES), "image")
    start(node.run("first"))
    node.driver.put("first")
    return recorded(remote, document(node))


def test_objects_opened_on_one_node_are_prefetched_on_another(start_node: StartNode, remote: Remote) -> None:
    found = first_start(start_node("a"), remote)
    assert [opened.digest for opened in found.objects] == [*map(digest, SMALL), digest("lib/large")]
    assert found.objects[0].ranges == ()
    assert sum(size_bytes for _, size_bytes in found.objects[-1].ranges) < 1 << 20

    second = start_node("b")
    second.apply(gear_tar(FILES), "image")
    wait_until(lambda: all(has(second, name) for name in SMALL), "the small files are present")
    wait_until(lambda: second.status().prefetched > len(SMALL), "the read parts of the large file are present")
    assert not has(second, "etc/file0")
    lookups = second.status().lookups
    read_some(second.run("c1"))
    status = second.status()
    assert status.lookups - lookups == 1  # the large file is read through the server
    assert (status.on_demand, status.profiles_found, status.profiles_absent) == (0, 1, 0)


def test_a_container_in_its_own_namespaces_is_recorded_including_local_objects(
    start_node: StartNode, remote: Remote
) -> None:
    node = start_node("a")
    first_start(node, remote)
    name = document(node)
    remote.put_document(name, b"damaged")

    root = node.run("c1")
    (root / "old").mkdir()
    put_program(root)
    script = f"""
        mount --bind {root} {root} && cd {root} && pivot_root . old && cd / && /true
        for file in {" ".join(SMALL)}; do read line < /$file; done 2> /old/dev/null; exit 0
    """
    subprocess.run(["unshare", "-m", "sh", "-c", script], check=True)
    node.driver.put("c1")
    wait_until(lambda: remote.document(name) != b"damaged", "the profile was recorded again")
    assert [opened.digest for opened in recorded(remote, name).objects] == [*map(digest, SMALL)]


def test_a_recorded_container_can_be_removed_at_any_time_and_leaves_nothing(
    start_node: StartNode, remote: Remote
) -> None:
    node = start_node("a")
    node.apply(gear_tar(FILES), "image")
    root = node.run("c1")
    assert (root / SMALL[0]).read_bytes() == FILES[SMALL[0]]
    wait_until(lambda: bool(recorders()), "the recorder runs")
    node.driver.remove("c1")
    node.driver.remove("image")
    assert not is_mounted(root)
    wait_until(lambda: not recorders(), "the recorder has ended")
    assert not node.settings.gear_images_path.joinpath("image").exists()


def test_objects_that_a_later_start_waits_for_extend_the_profile(start_node: StartNode, remote: Remote) -> None:
    first = start_node("a")
    first.apply(gear_tar(FILES), "image")
    root = first.run("c1")
    start(root)
    first.driver.put("c1")
    name = document(first)
    before = recorded(remote, name)

    second = start_node("b", window_s=5.0)
    second.apply(gear_tar(FILES), "image")
    root = second.run("c1")
    for path, content in FILES.items():
        assert (root / path).read_bytes() == content
    wait_until(lambda: recorded(remote, name) != before, "the profile has grown")
    after = recorded(remote, name)
    assert after.objects[: len(SMALL)] == before.objects[: len(SMALL)]
    assert {opened.digest for opened in after.objects} == {*map(digest, FILES)}


def test_profiles_are_shown_and_extended_by_commands(start_node: StartNode, remote: Remote) -> None:
    node = start_node("a", window_s=0.0)
    node.apply(gear_tar(FILES), "image")
    root = node.run("c1")
    none = gear(node, "profile", "show", "image")
    assert none.returncode == 2 and "no start of this image has been recorded" in none.stderr
    with subprocess.Popen([GEAR, "profile", "record", "c1", "--seconds", "60"], env=environ(node)) as recorder:
        wait_until(lambda: watches(recorder), "the recorder watches")
        assert (root / SMALL[0]).read_bytes() == FILES[SMALL[0]]
        recorder.send_signal(signal.SIGINT)
        assert recorder.wait(60) == 0
    shown = gear(node, "profile", "show", "c1").stdout
    assert digest(SMALL[0]) in shown and "1 objects" in shown
    assert "container image does not run" in gear(node, "profile", "record", "image").stderr
    none = gear(node, "profile", "show", "/etc/passwd")
    assert none.returncode == 2 and "/etc/passwd" in none.stderr


def watches(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has a fanotify group with a mark."""
    for path in Path(f"/proc/{process.pid}/fdinfo").iterdir():
        try:
            if "fanotify sdev" in path.read_text():
                return True
        except FileNotFoundError:
            continue  # closed meanwhile
    return False


def gear(node: LazyNode, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([GEAR, *arguments], env=environ(node), capture_output=True, text=True)


def environ(node: LazyNode) -> dict[str, str]:
    settings = node.settings
    paths = {"GEAR_ROOT": settings.gear_root, "GEAR_RUN_DIR": settings.run_dir, "GEAR_REMOTE": settings.remote.url}
    return os.environ | {name: str(value) for name, value in paths.items()}


def test_reads_without_a_running_program_are_not_a_start(start_node: StartNode, remote: Remote) -> None:
    node = start_node("a")
    node.apply(gear_tar(FILES), "image")
    read_some(node.run("copied"))
    node.driver.put("copied")
    start(node.run("c1"))
    node.driver.put("c1")
    wait_until(lambda: not recordings(), "both recordings have ended")
    assert len(recorded(remote, document(node)).objects) == len(SMALL) + 1


def test_recordings_end_with_the_gateway(start_node: StartNode, remote: Remote) -> None:
    node = start_node("a")
    node.apply(gear_tar(FILES), "image")
    root = node.run("c1")
    assert (root / SMALL[0]).read_bytes() == FILES[SMALL[0]]
    wait_until(lambda: bool(recorders()), "the recorder runs")
    node.driver.release()
    assert not recorders()
    assert is_mounted(root)


def test_starts_are_not_recorded_without_a_window(start_node: StartNode, remote: Remote) -> None:
    node = start_node("a", window_s=0.0)
    node.apply(gear_tar(FILES), "image")
    wait_until(lambda: not recordings(), "the recordings of other tests have ended")
    assert (node.run("c1") / SMALL[0]).read_bytes() == FILES[SMALL[0]]
    assert not recordings()


@pytest.mark.parametrize(
    "data",
    [
        b"damaged",
        profile_document.pack(
            Profile((OpenedObject("0" * 64, 5), OpenedObject(hashlib.sha256(LARGE).hexdigest(), 5, ((1 << 50, 9),))))
        ),
    ],
)
def test_a_damaged_or_foreign_profile_is_harmless(start_node: StartNode, remote: Remote, data: bytes) -> None:
    node = start_node("a")
    node.apply(gear_tar(FILES), "image")
    remote.put_document(document(node), data)
    read_some(node.run("c1"))
    status = node.status()
    assert status.profiles_absent == 1 if data == b"damaged" else (status.profiles_found, status.prefetched) == (1, 0)
    assert node.status().failures == {}


def test_an_unreachable_remote_does_not_delay_a_start(tmp_path: Path) -> None:
    with lazy_node(tmp_path) as node:
        node.source.set_faults(unreachable=True, delay_s=30.0)
        began_s = time.monotonic()
        node.pull(FILES)
        root = node.run("c1")
        assert time.monotonic() - began_s < 30.0
        node.source.set_faults(unreachable=True)
        with pytest.raises(OSError):
            (root / SMALL[0]).read_bytes()
        node.source.set_faults()
        read_some(root)


def recordings() -> list[threading.Thread]:
    """Return the recording threads of this process."""
    return [thread for thread in threading.enumerate() if thread.name == "recording"]


def recorders() -> list[int]:
    """Return the recorder processes of this process."""
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    return [int(pid) for pid in children if b"gearworkers.profiles.recorder" in command_line(pid)]


def command_line(pid: str) -> bytes:
    """Return the command line of a process; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
