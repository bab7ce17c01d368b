"""The lazy file server or its keeper is killed while containers run; readers see at most a delay."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition
from gearworkers.lazyfs.fd_keeper import FdKeeper
from gearworkers.lazyfs.fuse_connection import DEVICE
from gearworkers.lazyfs.server import LazyServer
from gearworkers.lazyfs.tree import node_of
from gearworkers.mounts.mountinfo import is_mount_point
from tests.support.lazynode import CHUNK_BYTES, LazyNode, lazy_node
from tests.support.processes import wait_until

LARGE = random.Random(1).randbytes(8 << 20)
SMALL = {f"etc/file{number}": b"content %d" % number * 50 for number in range(200)}
FILES = {**SMALL, "lib/large": LARGE}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LazyNode]:
    with lazy_node(tmp_path) as one:
        one.pull(FILES)
        yield one


def keepers(node: LazyNode) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if os.fsencode(node.settings.lazyfs_keeper_socket) in command:
                found.append(int(process.name))
    return found


def holders(node: LazyNode) -> list[int]:
    """Return the keepers that hold the file descriptor of the FUSE connection."""
    return [pid for pid in keepers(node) if holds_fuse(pid)]


def holds_fuse(pid: int) -> bool:
    try:
        return any(os.readlink(fd) == os.fspath(DEVICE) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False  # the process has ended or closed a descriptor


def has_asked(node: LazyNode, requests: int) -> bool:
    return len(node.source.requests()) >= requests


def test_readers_survive_repeated_kills_of_the_server(node: LazyNode) -> None:
    node.source.set_faults(delay_s=0.05)
    roots = [node.run(f"c{number}") for number in range(5)]

    def read_all(number: int) -> bool:
        names = list(FILES)
        random.Random(number).shuffle(names)
        return all((roots[number % 5] / name).read_bytes() == FILES[name] for name in names)

    with ThreadPoolExecutor(15) as readers:
        results = [readers.submit(read_all, number) for number in range(15)]
        for requests in (60, 120, 180, 240):  # all readers together make more requests than this
            wait_until(partial(has_asked, node, requests), "objects are being fetched")
            node.kill()
            node.start()
        assert all(result.result(60) for result in results)
    assert node.status().failures == {}


def test_a_pending_request_is_answered_by_the_next_server(node: LazyNode) -> None:
    node.source.set_faults(delay_s=30)
    root = node.run("c1")
    readers = [
        subprocess.Popen(["sha256sum", root / name], stdout=subprocess.PIPE) for name in ("etc/file1", "lib/large")
    ]
    wait_until(lambda: len(node.source.requests()) >= 2, "both are being fetched")
    node.kill()
    node.source.set_faults()
    time.sleep(0.2)
    assert [reader.poll() for reader in readers] == [None, None]
    node.start()
    for reader, content in zip(readers, (SMALL["etc/file1"], LARGE), strict=True):
        output, _ = reader.communicate(timeout=60)
        assert output.split()[0] == hashlib.sha256(content).hexdigest().encode()
        assert reader.returncode == 0


def test_opened_files_stay_readable_while_the_server_is_down(node: LazyNode) -> None:
    root = node.run("c1")
    small = open(root / "etc/file1", "rb")
    large = open(root / "lib/large", "rb")
    with small, large, mmap.mmap(large.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == LARGE
        node.kill()
        assert small.read() == SMALL["etc/file1"]
        assert mapped[:] == LARGE
        assert large.read() == LARGE
        assert (root / "etc/file1").read_bytes() == SMALL["etc/file1"]


def test_an_open_large_file_stays_readable_after_a_restart_without_fetching_chunks_again(
    node: LazyNode,
) -> None:
    node.source.set_faults(delay_s=0.05)
    root = node.run("c1")
    with open(root / "lib/large", "rb") as large:
        assert large.read(1 << 20) == LARGE[: 1 << 20]
        node.kill()
        Path("/proc/sys/vm/drop_caches").write_text("1")
        node.source.set_faults()
        node.start()
        assert os.pread(large.fileno(), len(LARGE), 0) == LARGE
    chunks = [line for line in node.source.requests() if line.startswith("chunk")]
    under_way = node.settings.remote.fetch_threads
    assert len(chunks) <= len(LARGE) // CHUNK_BYTES + under_way


def test_open_files_of_a_complete_layer_stay_readable_after_a_restart(node: LazyNode) -> None:
    root = node.run("c1")
    with open(root / "lib/large", "rb") as large:
        assert large.read() == LARGE
        for name in SMALL:
            (root / name).read_bytes()
        wait_until(lambda: node.status().incomplete_layers == 0, "the layer is complete")
        node.kill()
        Path("/proc/sys/vm/drop_caches").write_text("1")
        node.start()
        assert os.pread(large.fileno(), 1 << 20, 1 << 20) == LARGE[1 << 20 : 2 << 20]


def test_a_stopped_server_keeps_a_mount_that_a_container_uses(node: LazyNode) -> None:
    root = node.run("c1")
    node.stop()
    assert is_mount_point(node.settings.lazy_mount_path)
    node.start()
    assert (root / "etc/file1").read_bytes() == SMALL["etc/file1"]


def test_a_stopped_server_without_containers_leaves_neither_mount_nor_keeper(node: LazyNode) -> None:
    node.run("c1")
    node.driver.remove("c1")
    node.stop()
    assert not is_mount_point(node.settings.lazy_mount_path)
    wait_until(lambda: keepers(node) == [], "the keeper has ended")


def test_a_killed_keeper_is_replaced_and_the_mount_survives_the_server(node: LazyNode) -> None:
    root = node.run("c1")
    (old,) = keepers(node)
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: holders(node) not in ([], [old]), "a new keeper holds the descriptor")
    wait_until(lambda: len(node.status().failures) == 0, "the server reports no failures")
    node.kill()
    node.start()
    assert (root / "etc/file1").read_bytes() == SMALL["etc/file1"]


def test_the_server_survives_a_keeper_that_cannot_start_and_retries_it(node: LazyNode) -> None:
    root, socket = node.run("c1"), node.settings.lazyfs_keeper_socket
    socket.unlink()
    socket.mkdir()
    (old,) = keepers(node)
    os.kill(old, signal.SIGKILL)
    time.sleep(1.5)  # several checks of the server
    assert (root / "etc/file1").read_bytes() == SMALL["etc/file1"]
    assert not socket.is_socket()
    socket.rmdir()
    wait_until(lambda: holders(node) not in ([], [old]), "a new keeper holds the descriptor")
    node.kill()
    node.start()
    assert (root / "etc/file2").read_bytes() == SMALL["etc/file2"]


def test_a_new_server_works_after_server_and_keeper_died_together(node: LazyNode) -> None:
    node.run("c1")
    (keeper,) = keepers(node)
    os.kill(keeper, signal.SIGSTOP)
    node.kill()
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: keepers(node) == [], "the keeper is dead")
    node.start()
    assert (node.run("c2") / "etc/file1").read_bytes() == SMALL["etc/file1"]


def test_a_second_server_is_refused(node: LazyNode) -> None:
    with pytest.raises(FailedPrecondition, match="is already running"):
        LazyServer(node.settings, []).run()


def test_a_complete_file_is_passed_through_before_and_after_a_restart(node: LazyNode) -> None:
    root, second = node.run("c1"), node.run("c2")
    held = open(root / "lib/large", "rb")
    assert held.read() == LARGE
    wait_until(lambda: node.status().fetched_objects == 1, "the file is complete")
    passed = node.settings.run_dir / "lazyfs-passed"
    assert (root / "lib/large").read_bytes() == LARGE
    assert list(passed.iterdir()) == []  # the file is still open through the server
    held.close()
    wait_until(partial(is_passed, root, passed), "the file is passed through")
    with open(root / "lib/large", "rb") as passed_file:
        node.kill()
        Path("/proc/sys/vm/drop_caches").write_text("1")
        assert passed_file.read() == LARGE
        node.start()
        assert (root / "lib/large").read_bytes() == LARGE
        assert (second / "lib/large").read_bytes() == LARGE
        with open(root / "lib/large", "rb") as again, mmap.mmap(again.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:] == LARGE


def test_a_complete_file_is_served_when_passthrough_cannot_be_recorded(node: LazyNode) -> None:
    root = node.run("c1")
    (node.settings.run_dir / "lazyfs-passed").rmdir()
    assert (root / "lib/large").read_bytes() == LARGE
    wait_until(lambda: node.status().fetched_objects == 1, "the file is complete")
    for _ in range(3):
        time.sleep(0.1)  # a close reaches the server a little later
        assert (root / "lib/large").read_bytes() == LARGE
    assert node.status().serving == 1


def test_records_of_a_lost_mount_are_discarded_even_if_the_new_server_is_killed(
    node: LazyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.stop()
    record = node.settings.run_dir / "lazyfs-passed" / f"{node_of(hashlib.sha256(LARGE).digest()):016x}"
    record.write_text("7")
    child = os.fork()
    if not child:
        keep = FdKeeper.keep
        monkeypatch.setattr(FdKeeper, "keep", lambda keeper, fuse_fd: (keep(keeper, fuse_fd), os._exit(9)))
        LazyServer(node.settings, []).run()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    node.start()
    assert (node.run("c1") / "lib/large").read_bytes() == LARGE


def is_passed(root: Path, passed: Path) -> bool:
    """Read the file and return whether a node is passed through; a close reaches the server a little later."""
    assert (root / "lib/large").read_bytes() == LARGE
    return any(passed.iterdir())
