"""containerd is killed in the middle of a call: after its garbage collection and ours, nothing is left over."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.settings import RegistrySettings
from tests.support.containerd import connected
from tests.support.containerd_host import Containerd, ContainerdDocker, stack_for_containerd
from tests.support.images import Image
from tests.support.leftovers import leftovers
from tests.support.plugin import read_metrics
from tests.support.processes import wait_until
from tests.support.registry import Registry
from tests.support.registry_client import repository
from tests.support.stack import Stack
from tests.support.tiny import tar_of, tiny_tar

LAYERS = 8


@pytest.fixture(scope="module")
def stack(disk: Path) -> Iterator[Stack]:
    with stack_for_containerd(disk / "crashes-stack", "gearx") as stack:
        yield stack


@pytest.fixture(scope="module")
def session_containerd(disk: Path, stack: Stack) -> Iterator[Containerd]:
    containerd = Containerd(disk / "crashes-containerd", stack)
    containerd.start()
    yield containerd
    containerd.stop()


@pytest.fixture
def containerd(session_containerd: Containerd, stack: Stack) -> Iterator[Containerd]:
    """Yield the running containerd; after the test, end its leases and check that nothing is left over.

    Early layers of a pull that has failed stay for some minutes, or until the gateway ends.
    """
    yield session_containerd
    session_containerd.wait_for_gateway()
    for namespace in session_containerd.ctr("namespaces", "ls", "-q").split():
        session_containerd.collect_garbage(namespace)
    used = [path for path in leftovers(stack, objects=False) if "/early-" not in path]
    assert not used
    stack.stop("gateway")
    stack.start("gateway")
    wait_until(lambda: not leftovers(stack), "nothing is left", found=lambda: str(leftovers(stack)))


def applied(stack: Stack) -> int:
    """Return the number of snapshots whose layer is complete."""
    return sum(1 for path in (stack.root / "images").iterdir() if path.name.startswith("snapshot-"))


@pytest.fixture(scope="module")
def image(registry: Registry) -> str:
    """Push an image of LAYERS layers; return its name."""
    tars = [tiny_tar(), *(tar_of({f"file{number}": os.urandom(8 << 20)}) for number in range(1, LAYERS))]
    Image(tars, compression="").push(repository(registry.host, RegistrySettings().docker_config, "crashes"), "1")
    return f"{registry.host}/crashes:1"


@pytest.mark.parametrize("layers", [1, 3])
def test_a_pull(containerd: Containerd, stack: Stack, image: str, layers: int) -> None:
    pull = ("images", "pull", "--plain-http", "--snapshotter", "gear", image)
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(containerd.call, *pull)
        wait_until(lambda: applied(stack) >= layers, "layers are applied")
        containerd.daemon.kill()
        assert pulling.result().returncode != 0
    containerd.start()
    if layers > 1:
        containerd.ctr(*pull)
        assert containerd.ctr("run", "--rm", "--snapshotter", "gear", image, "one", "ls", "/file1") == "/file1"
        containerd.ctr("images", "rm", image)


def test_a_removal_of_an_image(containerd: Containerd, stack: Stack, tmp_path: Path) -> None:
    archive, name, gateway = tmp_path / "many.tar", "docker.io/library/many:1", stack.daemons["gateway"]
    archive.write_bytes(Image([tar_of({f"file{number}": b"%d" % number}) for number in range(40)]).saved(name))
    containerd.ctr("images", "import", "--snapshotter", "gear", str(archive))
    assert applied(stack) == 40
    with ThreadPoolExecutor(1) as pool:
        removal = pool.submit(containerd.call, "images", "rm", "--sync", name)
        while applied(stack) == 40:
            pass  # no pause: the removal of all layers takes only some 0.1 s
        os.kill(gateway.pid, signal.SIGSTOP)
        assert 0 < applied(stack) < 40
        containerd.daemon.kill()
        os.kill(gateway.pid, signal.SIGCONT)
        assert removal.result().returncode != 0
    containerd.start()
    assert name not in containerd.ctr("images", "ls", "-q").split()


def test_a_commit_by_docker(containerd: Containerd) -> None:
    ingests = containerd.directory / "root" / "io.containerd.content.v1.content" / "ingest"
    docker = ContainerdDocker(containerd)
    docker.start()
    try:
        docker.docker("import", "-", "tiny", stdin=tiny_tar())
        write = ("dd", "if=/dev/urandom", "of=/large", "bs=1048576", "count=100")
        docker.run("tiny", *write, options=("--name", "changed"))
        with ThreadPoolExecutor(1) as pool:
            commit = pool.submit(docker.call, "commit", "changed", "committed")
            wait_until(lambda: any(ingests.iterdir()), "the changes are written to the content store")
            containerd.daemon.kill()
            assert commit.result().returncode != 0
        containerd.start()
        wait_until(lambda: docker.call("commit", "changed", "committed").returncode == 0, "a repetition succeeds")
        assert docker.run("committed", "stat", "-c", "%s", "/large") == str(100 << 20)
        docker.remove_everything()
    finally:
        docker.stop()


def test_snapshots_that_containerd_does_not_know(containerd: Containerd, stack: Stack) -> None:
    """A crash between the gateway's answer and the write to containerd's database leaves such snapshots."""
    with connected(stack.containerd_socket) as client:
        client.prepare("default/1/lost")
        client.commit("default/1/lost", "default/2/parent")
        client.prepare("default/3/extract-1 sha256:0", "default/2/parent")
        client.view("default/4/view", "default/2/parent")
    containerd.daemon.kill()
    containerd.start()
    assert containerd.snapshots() == []


def test_containerd_calls_cleanup_which_collects_objects(containerd: Containerd, stack: Stack) -> None:
    def calls() -> float:
        text = read_metrics(stack.run_dir / "metrics.sock").decode()
        lines = [line for line in text.splitlines() if 'method="containerd.Cleanup"' in line and "_total{" in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = calls()
    containerd.collect_garbage()
    wait_until(lambda: calls() > before, "containerd has called Cleanup")
    store, data = ObjectStore(stack.root / "public"), b"of no layer"
    digest, staging = hashlib.sha256(data).digest(), os.open(stack.root / "build", os.O_RDONLY)
    store.put(digest, memoryview(data), staging)
    os.close(staging)
    with connected(stack.containerd_socket) as client:
        client.cleanup()
    wait_until(lambda: not store.has(digest), "the object is collected")
