"""Gear images under containerd, and under Docker on containerd's image store: lazy starts, profiles, pins, names."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.cli.image_names import find_image, in_namespace
from gearworkers.cli.inspect_image import inspect
from gearworkers.cli.local_source import opened_source
from gearworkers.engine.engine import Engine
from gearworkers.errors import FailedPrecondition, NotFound
from gearworkers.images.convert_local import convert_locally
from gearworkers.images.plan import plan_conversion
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import RegistrySettings, RemoteSettings, Settings
from tests.support.containerd_host import Containerd, ContainerdDocker
from tests.support.images import Image, Pulled, pull
from tests.support.processes import wait_until
from tests.support.registry import Registry
from tests.support.stack import Stack
from tests.support.tiny import BUSYBOX, tar_of, tiny_tar

SMALL = {f"app/small{number}": b"%d " % number * 2000 for number in range(20)}
LARGE = random.Random(7).randbytes(6 << 20)
TARS = [tiny_tar(), tar_of(SMALL), tar_of({"app/large": LARGE})]
READ = ("cat", "/app/small3", "/app/small5")
GEAR = str(Path(sys.executable).with_name("gear"))


@dataclass
class Host:
    """A stack, its containerd and Docker, and the Gear image in a registry."""

    stack: Stack
    containerd: Containerd
    docker: ContainerdDocker
    registry: Registry

    @property
    def image(self) -> str:
        """Name of the Gear image."""
        return f"{self.registry.host}/app:gear"

    def pull(self, namespace: str = "default") -> None:
        """Pull the image with ctr."""
        pull = ("images", "pull", "--plain-http", "--snapshotter", "gear", self.image)
        self.containerd.ctr(*pull, namespace=namespace)

    def run(self, container: str, *command: str, namespace: str = "default") -> str:
        """Run a command in a new container with ctr; return its output."""
        arguments = ("run", "--rm", "--snapshotter", "gear", self.image, container, *command)
        return self.containerd.ctr(*arguments, namespace=namespace)

    def remove(self, namespace: str = "default") -> None:
        """Remove the image from a namespace of containerd."""
        self.containerd.ctr("images", "rm", "--sync", self.image, namespace=namespace)

    def reset(self) -> None:
        """Remove all images and objects, and what the processes know of them."""
        self.docker.remove_everything()
        for namespace in ("default", "other"):
            for name in self.containerd.ctr("images", "ls", "-q", namespace=namespace).split():
                self.containerd.ctr("images", "rm", "--sync", name, namespace=namespace)
        self.stack.stop("lazyfs")
        self.collect_garbage()
        for link in (self.stack.root / "arrivals").glob("*/*"):
            link.unlink()
        self.stack.start("lazyfs")
        assert not self.objects()

    @property
    def settings(self) -> Settings:
        """The settings of the stack."""
        return Settings.from_environ(self.stack.environ())

    def collect_garbage(self) -> None:
        """Do what `gear gc` does."""
        Engine.of(self.settings).collect_garbage()

    def inspect(self, name: str, namespace: str = "") -> dict[str, str]:
        """Return what `gear inspect` prints."""
        return dict(inspect(*in_namespace(self.settings, name, namespace)))

    def objects(self) -> list[Path]:
        """Return the objects in the store."""
        return [path for path in (self.stack.root / "public").glob("*/*") if path.is_file()]

    def has(self, content: bytes) -> bool:
        """Whether the store has this content."""
        return ObjectStore(self.stack.root / "public").has(hashlib.sha256(content).digest())

    def gear(self, *arguments: str) -> dict[str, str]:
        """Run a `gear` command; return its output lines by key."""
        done = self.stack.gear(*arguments)
        assert done.returncode == 0, done.stderr
        return {line[:16].strip(): line[16:].strip() for line in done.stdout.splitlines()}

    def repository(self, name: str) -> Repository:
        """A repository of the registry."""
        return Repository.of(RegistrySettings(), Reference.parse(f"{self.registry.host}/{name}"))

    def profiles(self) -> list[Path]:
        """Return the profiles in the remote."""
        return list((Path(self.stack.settings["GEAR_REMOTE"]) / "documents" / "profiles").rglob("@*"))


@pytest.fixture(scope="module")
def session_host(disk: Path) -> Iterator[Host]:
    remote, registry = disk / "cg-remote", Registry(disk / "cg-registry", 5011)
    remote.mkdir()
    registry.start()
    stack = Stack(disk / "cg-stack", "gearcg", {"GEAR_REMOTE": str(remote)})
    containerd = Containerd(disk / "cg-containerd", stack)
    docker = ContainerdDocker(containerd)
    stack.set(CONTAINERD_ADDRESS=str(containerd.socket), DOCKER_HOST=f"unix://{docker.socket}")
    stack.start()
    containerd.start()
    docker.start()
    host = Host(stack, containerd, docker, registry)
    Image(TARS).push(host.repository("app"), "plain")
    settings = replace(Settings(), gear_root=disk / "cg-convert", remote=RemoteSettings(url=str(remote)))
    plan = plan_conversion(settings.registry, f"{registry.host}/app:plain", host.image)
    convert_locally(settings, plan, 1, lambda *_: None)
    yield host
    docker.stop()
    containerd.stop()
    stack.check_log("gateway")
    stack.stop()
    registry.stop()


@pytest.fixture
def host(session_host: Host) -> Host:
    session_host.reset()
    wait_until(lambda: not session_host.stack.recorders(), "all starts are recorded")
    for path in session_host.profiles():
        path.unlink()
    return session_host


# -- lazy starts


def test_a_container_of_ctr_starts_before_its_files_have_arrived(host: Host) -> None:
    host.pull()
    assert not host.has(BUSYBOX.read_bytes()) and not host.objects()
    assert host.run("one", "stat", "-c", "%s", "/app/large", "/app/small3").split() == [str(len(LARGE)), "4000"]
    assert host.has(BUSYBOX.read_bytes()) and not host.has(SMALL["app/small3"])
    assert host.run("two", *READ) == (SMALL["app/small3"] + SMALL["app/small5"]).decode().strip()
    assert {name for name, content in SMALL.items() if host.has(content)} == {"app/small3", "app/small5"}
    shown = host.inspect(f"containerd:{host.image}")
    assert (shown["Pulled"], shown["Gear image"]) == ("yes", "yes")
    assert shown["On this node"].startswith("3, ") and shown["Missing"].startswith("19, ")
    host.remove()
    wait_until(lambda: not host.objects(), "garbage collection removes the objects", 90.0)


def test_a_container_of_docker_starts_before_its_files_have_arrived(host: Host) -> None:
    host.docker.docker("pull", host.image)
    assert not host.objects()
    container = host.docker.run(host.image, "sleep", "1000", options=("-d",))
    assert host.docker.docker("exec", container, *READ).startswith("3 3 3")
    assert not host.has(SMALL["app/small4"])
    host.docker.docker("exec", container, "sh", "-c", "chmod 700 /app/small4; echo x >> /app/small6; rm /app/small7")
    assert set(host.docker.docker("diff", container).splitlines()) == {
        "C /app",
        "C /app/small4",
        "C /app/small6",
        "D /app/small7",
    }
    host.docker.docker("commit", container, "committed")
    script = "stat -c %a /app/small4; cat /app/small4 /app/small6; ls /app | wc -l"
    shown = host.docker.run("committed", "sh", "-c", script)
    content = (SMALL["app/small4"] + SMALL["app/small6"]).decode()
    assert shown == f"700\n{content}x\n20"


def test_namespaces_share_the_layers_of_an_incomplete_image(host: Host) -> None:
    host.pull()
    host.pull("other")
    indexes = [path.stat() for path in (host.stack.root / "images").glob("snapshot-*/index.erofs")]
    assert len(indexes) == 6 and {index.st_nlink for index in indexes} == {2}, "a layer was applied twice"
    host.remove()
    assert host.run("other", *READ, namespace="other").startswith("3 3 3")
    assert host.inspect(host.image, "other")["On this node"].startswith("3, ")


# -- profiles


def test_the_files_of_a_first_start_are_prefetched_by_the_next_pull(host: Host) -> None:
    host.pull()
    assert host.run("one", *READ).startswith("3 3 3")
    wait_until(lambda: bool(host.profiles()), "the start is recorded", 60.0, host.stack.logs)
    assert "3 objects" in host.stack.gear("profile", "show", f"containerd:{host.image}").stdout
    host.reset()
    host.docker.docker("pull", host.image)
    read = (BUSYBOX.read_bytes(), SMALL["app/small3"], SMALL["app/small5"])
    wait_until(lambda: all(map(host.has, read)), "the profile is prefetched", 60.0, host.stack.logs)
    before = host.stack.lazy_status()
    assert host.docker.run(host.image, *READ).startswith("3 3 3")
    after = host.stack.lazy_status()
    assert after.on_demand == before.on_demand and after.profiles_found == 1 and len(host.objects()) == 3


def test_profile_record_adds_files_that_a_running_container_opens(host: Host) -> None:
    host.docker.docker("pull", host.image)
    host.docker.run(host.image, "sleep", "1000", options=("-d", "--name", "recorded"))
    with subprocess.Popen(
        [GEAR, "profile", "record", "recorded", "--seconds", "100"],
        env=host.stack.environ(),
        stdout=subprocess.PIPE,
        text=True,
    ) as recording:
        wait_until(lambda: _is_watching(recording.pid), "the recording has begun")
        host.docker.docker("exec", "recorded", "cat", "/app/small9")
        recording.send_signal(signal.SIGINT)
        output, _ = recording.communicate()
    assert (recording.returncode, output) == (0, "2 objects were opened\n")


# -- pins


def test_a_pinned_image_of_containerd_is_fetched_and_kept(host: Host) -> None:
    host.pull()
    assert host.gear("pin", f"containerd:{host.image}")["Pinned"] == host.image
    wait_until(lambda: host.inspect(host.image)["Layers"] == "3 (3 complete)", "all files arrive", 60.0)
    shown = host.inspect(host.image)
    assert shown["Pinned files"] == shown["On this node"] == shown["Distinct files"] and shown["Image pinned"] == "yes"
    host.remove()
    host.collect_garbage()
    assert len(host.objects()) == 22
    host.gear("unpin", f"containerd:{host.image}")
    host.collect_garbage()
    assert not host.objects()


# -- names


def test_an_image_is_found_by_each_form_of_its_name(host: Host) -> None:
    host.pull()
    host.containerd.ctr("images", "tag", host.image, "docker.io/library/short:latest")
    target = host.inspect(f"containerd:{host.image}")["Id"]
    for name in (host.image, "short", target, target[7:19], f"containerd:{target}"):
        assert host.inspect(name)["Id"] == target, name
    host.docker.docker("pull", host.image)
    id = host.docker.docker("image", "inspect", "-f", "{{.Id}}", host.image)
    for name in (host.image, f"docker:{host.image}", f"docker:{id[7:19]}"):
        assert host.inspect(name)["Id"] == id, name
    assert host.inspect(host.image, "moby")["Pulled"] == "yes"


def test_an_image_of_another_snapshotter_is_refused(host: Host) -> None:
    done = host.containerd.call("images", "pull", "--plain-http", "--snapshotter", "native", host.image)
    assert done.returncode != 0 and b"this is a Gear image, without file contents" in done.stderr, done.stderr
    plain = f"{host.registry.host}/app:plain"
    host.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "native", plain)
    with pytest.raises(FailedPrecondition, match="the snapshotter gear has not unpacked it"):
        find_image(host.settings, plain)
    done_here = host.stack.gear("pin", "nothing:1")
    assert done_here.returncode == 2 and done_here.stderr.count("\n") == 1
    assert "nothing:1 is not on this node: dockerd at unix://" in done_here.stderr
    assert f"containerd at {host.containerd.socket} (namespace default) does not have it" in done_here.stderr


# -- conversion


def test_images_of_both_daemons_are_converted_without_a_registry(host: Host, disk: Path) -> None:
    plain = f"{host.registry.host}/app:plain"
    host.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "gear", plain)
    host.docker.docker("pull", plain)
    expected = _gear(host, "app")
    for kind in ("containerd", "docker"):
        target = f"{host.registry.host}/{kind}:gear"
        shown = host.gear("convert", "--again", "--processes", "1", f"{kind}:{plain}", target)
        assert shown["Layers"].startswith("3 (0 already")
        found = _gear(host, kind)
        assert found.tars == expected.tars and found.config["config"] == expected.config["config"]
        with (
            pytest.raises(NotFound, match="does not have nothing:1"),
            opened_source(host.settings, f"{kind}:nothing:1"),
        ):
            pass
    assert not any((host.stack.root / "converting").iterdir())


def _gear(host: Host, name: str) -> Pulled:
    return pull(host.repository(name), "gear")


def _is_watching(pid: int) -> bool:
    """Whether the process has a fanotify group with a mark."""
    try:
        return any("fanotify sdev:" in info.read_text() for info in Path(f"/proc/{pid}/fdinfo").iterdir())
    except FileNotFoundError:
        return False  # the process has closed a descriptor
