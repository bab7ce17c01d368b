"""Kubernetes' way: containerd's CRI plugin pulls images and runs pods on gearworkers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from grpc import StatusCode

from gearworkers.cas.store import ObjectStore
from gearworkers.settings import RegistrySettings
from tests.support.containerd import refused
from tests.support.containerd_host import Containerd, stack_for_containerd
from tests.support.cri import Cri, cri, pod_config
from tests.support.cri_host import MIRROR, add_runtime, prepare_pods, set_snapshotter
from tests.support.images import Image
from tests.support.leftovers import leftovers
from tests.support.processes import wait_until
from tests.support.registry import Registry
from tests.support.registry_client import repository
from tests.support.stack import Stack
from tests.support.tiny import tar_of, tiny_tar

FILES = {"etc/hello": b"hello\n" * 1000, "data/large": bytes(range(256)) * 40_000}
APP, OTHER, INDEXED, PAUSE = (f"{MIRROR}/{name}:1" for name in ("app", "other", "indexed", "pause"))
READ, UNREAD = b"read" * 100, b"unread" * 100
SLEEP = ("/bin/sleep", "100000")
NAMESPACE = "k8s.io"


@pytest.fixture(scope="module")
def stack(disk: Path) -> Iterator[Stack]:
    remote = disk / "cri-remote"
    remote.mkdir()
    with stack_for_containerd(disk / "cri-stack", "geark", {"GEAR_REMOTE": str(remote)}) as stack:
        yield stack


@pytest.fixture(scope="module")
def pause(disk: Path, registry: Registry) -> Path:
    """Push the images to the registry; return an archive of that of the sandbox."""
    pause = Image([tiny_tar()], command=SLEEP)
    images = {
        APP: Image([tiny_tar(), tar_of(FILES)]),
        OTHER: Image([tiny_tar({"etc/hello": b"other"})]),
        INDEXED: Image([tiny_tar({"read": READ}), tar_of({"unread": UNREAD})]),
        PAUSE: pause,
    }
    for name, image in images.items():
        path, version = name.removeprefix(f"{MIRROR}/").split(":")
        image.push(repository(registry.host, RegistrySettings().docker_config, path), version)
    archive = disk / "pause.tar"
    archive.write_bytes(pause.saved(PAUSE))
    return archive


@pytest.fixture(scope="module")
def containerd(disk: Path, stack: Stack, registry: Registry, pause: Path) -> Iterator[Containerd]:
    containerd = Containerd(disk / "cri-containerd", stack, cri=True)
    prepare_pods(containerd, registry.host, PAUSE)
    add_runtime(containerd, "on-gear", "gear")
    add_runtime(containerd, "on-overlayfs", "overlayfs")
    containerd.start()
    yield containerd
    containerd.stop()
    wait_until(lambda: not leftovers(stack), "nothing is left", found=lambda: str(leftovers(stack)))


@pytest.fixture
def kubelet(containerd: Containerd, stack: Stack) -> Iterator[Cri]:
    """Yield a client; remove all images after the test, and check that nothing but objects is left of them."""
    stack.start("gateway")
    if not containerd.daemon.is_running():
        containerd.start()
    with cri(containerd.socket) as client:
        wait_until(client.is_ready, "the CRI plugin is ready", found=containerd.daemon.log_tail)
        yield client
        stack.start("gateway")
        containerd.wait_for_gateway()
        client.remove_everything()
    wait_until(lambda: not leftovers(stack, objects=False), "no layer is left", found=lambda: str(leftovers(stack)))
    assert containerd.snapshots(NAMESPACE) == []


def of_overlayfs(containerd: Containerd) -> int:
    """Return the number of snapshots of overlayfs."""
    return len(containerd.ctr("snapshots", "--snapshotter", "overlayfs", "ls", namespace=NAMESPACE).splitlines()) - 1


def test_a_pod_runs_an_image_of_a_registry(kubelet: Cri, containerd: Containerd, stack: Stack) -> None:
    kubelet.pull(APP)
    assert "Degraded:            no" in stack.gear("status").stdout
    container = kubelet.run(kubelet.run_pod(pod_config("first")), APP, *SLEEP)
    assert kubelet.images() == {APP, PAUSE}
    assert kubelet.exec(container, "cat", "/etc/hello") == FILES["etc/hello"].decode().strip()
    assert kubelet.exec(container, "sh", "-c", "echo new > /new; cat /new; wc -c < /data/large") == "new\n10240000"
    assert len(containerd.snapshots(NAMESPACE)) == 4, "two layers, one of them shared with the sandbox, two containers"
    assert of_overlayfs(containerd) == 0


def test_a_pod_runs_an_indexed_image_before_it_has_arrived(
    kubelet: Cri, containerd: Containerd, stack: Stack, registry: Registry
) -> None:
    image = INDEXED.replace(MIRROR, registry.host)
    indexed = stack.gear("index", "--local", "--processes", "1", image)
    assert indexed.returncode == 0, indexed.stderr
    kubelet.pull(INDEXED)
    container = kubelet.run(kubelet.run_pod(pod_config("indexed")), INDEXED, *SLEEP)
    assert kubelet.exec(container, "cat", "/read") == READ.decode()
    store = ObjectStore(stack.root / "public")
    assert [store.has(sha256(content).digest()) for content in (READ, UNREAD)] == [True, False]
    manifest = json.loads(repository(registry.host, RegistrySettings().docker_config, "indexed").manifest("1")[0])
    stored = containerd.ctr("content", "ls", "-q", namespace=NAMESPACE).split()
    assert not {layer["digest"] for layer in manifest["layers"]}.intersection(stored)
    shutil.rmtree(Path(stack.settings["GEAR_REMOTE"]) / "documents")


def test_statistics_count_the_files_of_images_and_containers(kubelet: Cri, stack: Stack) -> None:
    kubelet.pull(APP)
    container = kubelet.run(kubelet.run_pod(pod_config("counted")), APP, *SLEEP)
    kubelet.exec(container, "dd", "if=/dev/zero", "of=/three", "bs=1048576", "count=3")
    kubelet.exec(container, "sh", "-c", "mkdir /d; for i in $(seq 100); do echo $i > /d/$i; done")

    def is_counted() -> bool:
        own = kubelet.writable_layer(container)
        return own.used_bytes.value >= 3 << 20 and own.inodes_used.value >= 100

    wait_until(is_counted, "the container's files are counted", found=lambda: str(kubelet.writable_layer(container)))
    assert kubelet.writable_layer(container).fs_id.mountpoint == str(stack.root)
    assert kubelet.writable_layer(container).used_bytes.value < 5 << 20, (
        "the files of the image are not the container's"
    )

    def images_are_counted() -> bool:
        used = kubelet.image_file_systems()[0]
        return used.used_bytes.value >= len(FILES["data/large"]) + (3 << 20) and used.inodes_used.value >= 100

    wait_until(images_are_counted, "images are counted", found=lambda: str(kubelet.image_file_systems()))
    assert [used.fs_id.mountpoint for used in kubelet.image_file_systems()] == [str(stack.root)]


def test_an_image_that_was_imported_without_unpacking_runs(kubelet: Cri, containerd: Containerd, pause: Path) -> None:
    """containerd then unpacks it when a container needs it, by another way than after a pull."""
    containerd.ctr("images", "import", "--no-unpack", str(pause), namespace=NAMESPACE)
    wait_until(lambda: PAUSE in kubelet.images(), "the CRI plugin knows the image")
    assert containerd.snapshots(NAMESPACE) == []
    container = kubelet.run(kubelet.run_pod(pod_config("imported")), PAUSE, *SLEEP)
    assert kubelet.exec(container, "echo", "ran") == "ran"


def test_pods_survive_restarts_of_containerd_and_of_the_gateway(
    kubelet: Cri, containerd: Containerd, stack: Stack
) -> None:
    kubelet.pull(APP)
    container = kubelet.run(pod := kubelet.run_pod(pod_config("survivor")), APP, *SLEEP)
    kubelet.exec(container, "touch", "/before")
    containerd.daemon.kill()
    containerd.start()
    wait_until(kubelet.is_ready, "the CRI plugin is ready")
    stack.daemons["gateway"].kill()
    assert kubelet.exec(container, "cat", "/etc/hello").startswith("hello")
    stack.start("gateway")
    containerd.wait_for_gateway()
    assert kubelet.exec(container, "ls", "/before", "/etc/hello") == "/before\n/etc/hello"
    assert kubelet.exec(kubelet.run(pod, APP, *SLEEP), "cat", "/etc/hello").startswith("hello")


# -- runtimes with a snapshotter of their own


@contextmanager
def default_snapshotter(containerd: Containerd, name: str, kubelet: Cri) -> Iterator[None]:
    """Restart containerd with another snapshotter for the pods whose runtime has none."""

    def restart(chosen: str) -> None:
        containerd.stop()
        set_snapshotter(containerd, chosen)
        containerd.start()
        wait_until(kubelet.is_ready, "the CRI plugin is ready")

    restart(name)
    try:
        yield
        kubelet.remove_everything()
    finally:
        restart("gear")


@pytest.mark.parametrize("annotated", [True, False], ids=["annotated", "not annotated"])
def test_gear_is_the_snapshotter_of_one_runtime(kubelet: Cri, containerd: Containerd, annotated: bool) -> None:
    """Without the annotation, a pull unpacks for the default snapshotter, and a container unpacks again."""
    with default_snapshotter(containerd, "overlayfs", kubelet):
        pod = pod_config("on-gear", "on-gear" if annotated else "")
        kubelet.pull(APP, pod)
        container = kubelet.run(kubelet.run_pod(pod, "on-gear"), APP, *SLEEP)
        assert kubelet.exec(container, "cat", "/etc/hello").startswith("hello")
        assert len(containerd.snapshots(NAMESPACE)) == 4
        assert (of_overlayfs(containerd) > 0) is not annotated


def test_another_runtime_uses_overlayfs(kubelet: Cri, containerd: Containerd) -> None:
    pod = pod_config("on-overlayfs", "on-overlayfs")
    kubelet.pull(APP, pod)
    container = kubelet.run(kubelet.run_pod(pod, "on-overlayfs"), APP, *SLEEP)
    assert kubelet.exec(container, "cat", "/etc/hello").startswith("hello")
    assert containerd.snapshots(NAMESPACE) == []


@pytest.mark.parametrize("away", ["stopped", "hanging"])
def test_pods_on_overlayfs_start_while_the_gateway_is_away(
    kubelet: Cri, containerd: Containerd, stack: Stack, away: str
) -> None:
    """From containerd 2.1 on, this includes a pull."""
    pod = pod_config("on-overlayfs", "on-overlayfs")
    kubelet.pull(APP, pod)
    kubelet.remove_pod(kubelet.run_pod(pod, "on-overlayfs"))
    with stack.away(away):
        image = APP
        if containerd.version >= (2, 1):
            kubelet.pull(image := OTHER, pod)
        elif away == "stopped":
            with refused(StatusCode.UNAVAILABLE, "gear"):
                kubelet.pull(OTHER, pod)
        container = kubelet.run(kubelet.run_pod(pod, "on-overlayfs"), image, *SLEEP)
        assert kubelet.exec(container, "cat", "/etc/hello")
        if away == "stopped":
            with refused(StatusCode.UNAVAILABLE):
                kubelet.run_pod(pod_config("on-gear"))
    containerd.wait_for_gateway()
    container = kubelet.run(kubelet.run_pod(pod_config("on-gear")), APP, *SLEEP)
    assert kubelet.exec(container, "cat", "/etc/hello").startswith("hello")
