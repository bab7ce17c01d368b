"""Five real images, started on an empty host, answer and equal the originals on overlay2.

They are started as Gear images under Docker's graphdriver, and unmodified under Docker on containerd.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gearworkers.images.manifest import digest_of
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import RegistrySettings, RemoteSettings, Settings
from tests.support import appimages, remotes
from tests.support.applications import APPLICATIONS, NGINX, Application
from tests.support.containerd_host import Containerd, ContainerdDocker, stack_for_containerd
from tests.support.dockerd import Dockerd
from tests.support.registry import Registry
from tests.support.stack import Stack

VERSION = "1"
CONTENTS_OF_EVERY = {"postgres": 4, "python": 4, "node": 4}
"""In these images with many files, the contents of only every n-th file are compared."""
_MADE_BY_DOCKER = {".dockerenv", "etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/mtab"}
_MOUNTED = {"dev", "proc", "sys"}

Seen = tuple[str, int, int]
"""Path, size and mtime of a file."""


AnyDocker = Dockerd | ContainerdDocker


@dataclass
class Node:
    """A stack with a dockerd."""

    stack: Stack
    dockerd: AnyDocker

    def gear(self, *arguments: str) -> str:
        """Run a `gear` command on this node; return its output."""
        done = subprocess.run(
            ["gear", *arguments], env=self.stack.environ(), check=True, capture_output=True, text=True
        )
        return done.stdout

    def object_count(self) -> int:
        """Return the number of objects in the node's store."""
        return sum(1 for path in (self.stack.root / "public").glob("*/*") if path.is_file())

    def reset(self) -> None:
        """Remove all images and their objects."""
        self.dockerd.remove_everything()
        self.gear("gc")
        assert self.object_count() == 0


@dataclass
class Peers:
    """Nodes of gearworkers, a dockerd with overlay2, and the state shared between images."""

    ours: Node
    """Its dockerd uses the graphdriver."""
    on_containerd: Node
    """Its dockerd uses containerd's image store."""
    overlay2: Dockerd
    settings: Settings
    """Settings of conversions."""
    compared: set[Seen] = field(default_factory=set)
    """Files whose contents were compared in another image."""


@contextmanager
def node(directory: Path, name: str, remote: str, environ: dict[str, str] | None = None) -> Iterator[Node]:
    """Run a node with *remote* as GEAR_REMOTE."""
    stack = Stack(directory / "stack", name, {"GEAR_REMOTE": remote, **(environ or {})})
    dockerd = Dockerd(name, directory / "docker", name)
    try:
        stack.start()
        dockerd.start()
        yield Node(stack, dockerd)
    finally:
        dockerd.stop()
        stack.stop()


@contextmanager
def containerd_node(directory: Path, name: str, remote: str) -> Iterator[Node]:
    """Run a node whose Docker uses containerd's image store, with *remote* as GEAR_REMOTE."""
    with (
        stack_for_containerd(directory / f"{name}-stack", name, {"GEAR_REMOTE": remote}) as stack,
        ExitStack() as stops,
    ):
        containerd = Containerd(directory / name, stack)
        stops.callback(containerd.stop)
        containerd.start()
        docker = ContainerdDocker(containerd)
        stops.callback(docker.stop)
        docker.start()
        yield Node(stack, docker)


@pytest.fixture(scope="module")
def peers(disk: Path) -> Iterator[Peers]:
    """Run all dockerds, and a manager as the remote of gearworkers."""
    directory = disk / "applications"
    directory.mkdir()
    overlay2 = Dockerd("plain", directory / "plain", "overlay2")
    with ExitStack() as running:
        manager = running.enter_context(remotes.manager_server(directory / "manager"))
        ours = running.enter_context(node(directory, "apps", manager.url))
        on_containerd = running.enter_context(containerd_node(directory, "appsu", manager.url))
        running.callback(overlay2.stop)
        overlay2.start()
        yield Peers(
            ours,
            on_containerd,
            overlay2,
            Settings(
                remote=RemoteSettings(url=manager.url),
                registry=RegistrySettings(docker_config=directory / "docker-config"),
            ),
        )


@pytest.fixture
def image(peers: Peers, registry: Registry, request: pytest.FixtureRequest) -> Iterator[tuple[Application, str, str]]:
    """Push an image and its conversion; yield the application, the name of the image and the name of the Gear image."""
    app: Application = request.param
    original, converted = f"{registry.host}/{app.name}:{VERSION}", f"{registry.host}/gear/{app.name}:{VERSION}"
    appimages.push(peers.settings, f"{app.name}:{VERSION}", original)
    appimages.convert(peers.settings, f"{app.name}:{VERSION}", converted)
    yield app, original, converted
    peers.overlay2.remove_everything()
    peers.ours.reset()
    peers.on_containerd.reset()


@pytest.mark.slow
@pytest.mark.parametrize("image", APPLICATIONS, ids=lambda app: app.name, indirect=True)
def test_an_application_answers_on_an_empty_host_and_equals_the_original(
    peers: Peers, image: tuple[Application, str, str]
) -> None:
    app, original, converted = image
    expected = first_answer(peers.overlay2, original, app)
    with root_of(peers.overlay2, original) as theirs:
        for node, name in ((peers.ours, converted), (peers.on_containerd, original)):
            assert first_answer(node.dockerd, name, app) == expected
            fetched = node.object_count()
            with root_of(node.dockerd, name) as ours:
                files = compare(ours, theirs, CONTENTS_OF_EVERY.get(app.name, 1), peers.compared)
            assert 0 < fetched < files / 2, "the start fetched unopened files"
    assert_is_unmodified(peers, original)


def assert_is_unmodified(peers: Peers, name: str) -> None:
    """Check that Docker on containerd shows the original image, and has not downloaded its layers."""
    docker = peers.on_containerd.dockerd
    assert isinstance(docker, ContainerdDocker)
    reference = Reference.parse(name)
    data = Repository.of(peers.settings.registry, reference).manifest(reference.tag_or_digest)[0]
    manifest, digest = json.loads(data), digest_of(data)
    ours, theirs = (json.loads(docker.docker("image", "inspect", name))[0] for docker in (docker, peers.overlay2))
    assert ours["Id"] in (digest, manifest["config"]["digest"])
    assert ours["RepoDigests"] == [f"{name.rpartition(':')[0]}@{digest}"]
    for key in ("RepoTags", "RepoDigests", "RootFS", "Architecture", "Os"):
        assert ours[key] == theirs[key], key
    assert set_values(ours["Config"]) == set_values(theirs["Config"])
    stored = docker.containerd.ctr("content", "ls", "-q", namespace="moby").split()
    assert digest in stored and not {layer["digest"] for layer in manifest["layers"]}.intersection(stored)


def set_values(config: dict[str, object]) -> dict[str, object]:
    """Return the settings that are not empty; versions of Docker differ in whether they show the others."""
    return {key: value for key, value in config.items() if value}


@pytest.mark.parametrize("image", [NGINX], ids=lambda app: app.name, indirect=True)
def test_the_error_of_dockers_own_driver_names_the_required_driver(
    peers: Peers, image: tuple[Application, str, str]
) -> None:
    done = peers.overlay2.call("pull", image[2])
    assert done.returncode != 0
    assert b"this is a Gear image, without file contents" in done.stderr
    assert b"it needs the storage driver of gearworkers" in done.stderr
    assert peers.overlay2.docker("images", "-aq") == ""


@pytest.mark.slow
def test_an_application_answers_with_s3_as_the_remote(peers: Peers, registry: Registry, disk: Path) -> None:
    name = f"{registry.host}/s3/nginx:{VERSION}"
    directory = disk / "s3"
    directory.mkdir()
    credentials = remotes.credentials_file(directory)
    with remotes.s3_server(directory) as server:
        bucket = remotes.new_bucket(server)
        settings = Settings(
            remote=RemoteSettings(url=bucket, aws_credentials_file=credentials),
            registry=RegistrySettings(docker_config=directory),
            gear_root=directory / "gear",
        )
        appimages.convert(settings, f"nginx:{VERSION}", name)
        environ = {"AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
        with node(directory, "s3", bucket, environ) as ours:
            assert b"Definitions and overview" in first_answer(ours.dockerd, name, NGINX)


def first_answer(docker: AnyDocker, name: str, app: Application) -> bytes:
    """Pull the image, run a container and return the application's answer."""
    container = docker.docker("run", "-d", "--network=host", name)
    try:
        return app.wait()
    except TimeoutError as exc:
        logs = docker.call("logs", container)
        raise AssertionError(f"{exc}\n{(logs.stdout + logs.stderr).decode(errors='replace')[-3000:]}") from exc
    finally:
        docker.docker("rm", "-f", container)


@contextmanager
def root_of(docker: AnyDocker, name: str) -> Iterator[Path]:
    """Run a container that sleeps; yield the path of its root file system."""
    container = docker.docker("run", "-d", "--network=none", "--user=0", "--entrypoint=sleep", name, "infinity")
    try:
        yield Path("/proc", docker.docker("inspect", "-f", "{{.State.Pid}}", container), "root")
    finally:
        docker.docker("rm", "-f", container)


def compare(ours: Path, theirs: Path, contents_of_every: int, compared: set[Seen]) -> int:
    """Check that both trees are equal; return the number of regular files."""
    files = 0
    for directory, names, others in os.walk(theirs):
        inside = os.path.relpath(directory, theirs)
        if inside == ".":
            names[:] = [name for name in names if name not in _MOUNTED]
        expected = {*names, *others}
        found = set(os.listdir(ours / inside)) - (_MOUNTED if inside == "." else set())
        assert found == expected, inside
        for name in expected:
            path = os.path.normpath(os.path.join(inside, name))
            compares_content = zlib.crc32(path.encode()) % contents_of_every == 0
            files += compare_file(ours / path, theirs / path, path, compared if compares_content else None)
    return files


def compare_file(ours: Path, theirs: Path, path: str, compared: set[Seen] | None) -> bool:
    """Check that both files are equal; return whether they are regular files.

    Args:
        ours: Path on gearworkers.
        theirs: Path on overlay2.
        path: Path inside the image.
        compared: Files whose contents were compared before; None to compare no contents.
    """
    if path in _MADE_BY_DOCKER:
        return False
    found, expected = ours.lstat(), theirs.lstat()
    for name in ("st_mode", "st_uid", "st_gid", "st_nlink", "st_rdev"):
        if name != "st_nlink" or not stat.S_ISDIR(expected.st_mode):
            assert getattr(found, name) == getattr(expected, name), f"{path}: {name}"
    assert xattrs(ours) == xattrs(theirs), path
    if stat.S_ISLNK(expected.st_mode):
        assert os.readlink(ours) == os.readlink(theirs), path
    if not stat.S_ISREG(expected.st_mode):
        return False
    assert (found.st_size, found.st_mtime_ns) == (expected.st_size, expected.st_mtime_ns), path
    seen = (path, expected.st_size, expected.st_mtime_ns)
    if compared is not None and seen not in compared:
        compared.add(seen)
        assert digest(ours) == digest(theirs), path
    return True


def xattrs(path: Path) -> dict[str, bytes]:
    """Return all xattrs of a file."""
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}


def digest(path: Path) -> bytes:
    """Return the SHA-256 of the contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
