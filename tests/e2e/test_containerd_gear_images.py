"""Gear images under containerd, and under Docker on containerd's image store: lazy starts, profiles, pins, names."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.cli.image_names import find_image
from gearworkers.cli.local_source import opened_source
from gearworkers.errors import FailedPrecondition, NotFound
from gearworkers.images.convert_local import convert_locally
from gearworkers.images.plan import plan_conversion
from gearworkers.settings import RemoteSettings, Settings
from tests.support.containerd_lazy import ContainerdHost, containerd_host
from tests.support.images import Image, Pulled, pull
from tests.support.processes import wait_until
from tests.support.tiny import BUSYBOX, tar_of, tiny_tar

# Each has a suffix of its own, so that none is another's companion.
SMALL = {f"app/small.{number}": b"%d " % number * 2000 for number in range(20)}
LARGE = random.Random(7).randbytes(6 << 20)
TARS = [tiny_tar(), tar_of(SMALL), tar_of({"app/large": LARGE})]
READ = ("cat", "/app/small.3", "/app/small.5")
GEAR = str(Path(sys.executable).with_name("gear"))


@pytest.fixture(scope="module")
def session_host(disk: Path) -> Iterator[ContainerdHost]:
    with containerd_host(disk, "gearcg", 5011, "app:gear") as host:
        Image(TARS).push(host.repository("app"), "plain")
        settings = replace(Settings(), gear_root=disk / "cg-convert", remote=RemoteSettings(url=str(host.remote)))
        plan = plan_conversion(settings.registry, f"{host.registry.host}/app:plain", host.image)
        convert_locally(settings, plan, 1, lambda *_: None)
        yield host


@pytest.fixture
def host(session_host: ContainerdHost) -> ContainerdHost:
    session_host.reset()
    wait_until(lambda: not session_host.stack.recorders(), "all starts are recorded")
    for path in session_host.profiles():
        path.unlink()
    return session_host


# -- lazy starts


def test_a_container_of_ctr_starts_before_its_files_have_arrived(host: ContainerdHost) -> None:
    host.pull()
    assert not host.has(BUSYBOX.read_bytes()) and not host.objects()
    assert host.run("one", "stat", "-c", "%s", "/app/large", "/app/small.3").split() == [str(len(LARGE)), "4000"]
    assert host.has(BUSYBOX.read_bytes()) and not host.has(SMALL["app/small.3"])
    assert host.run("two", *READ) == (SMALL["app/small.3"] + SMALL["app/small.5"]).decode().strip()
    assert {name for name, content in SMALL.items() if host.has(content)} == {"app/small.3", "app/small.5"}
    shown = host.inspect(f"containerd:{host.image}")
    assert (shown["Pulled"], shown["Gear image"]) == ("yes", "yes")
    assert shown["On this node"].startswith("3, ") and shown["Missing"].startswith("19, ")
    host.remove()
    wait_until(lambda: not host.objects(), "garbage collection removes the objects", 90.0)


def test_a_container_of_docker_starts_before_its_files_have_arrived(host: ContainerdHost) -> None:
    host.docker.docker("pull", host.image)
    assert not host.objects()
    container = host.docker.run(host.image, "sleep", "1000", options=("-d",))
    assert host.docker.docker("exec", container, *READ).startswith("3 3 3")
    assert not host.has(SMALL["app/small.4"])
    host.docker.docker("exec", container, "sh", "-c", "chmod 700 /app/small.4; echo x >> /app/small.6; rm /app/small.7")
    assert set(host.docker.docker("diff", container).splitlines()) == {
        "C /app",
        "C /app/small.4",
        "C /app/small.6",
        "D /app/small.7",
    }
    host.docker.docker("commit", container, "committed")
    script = "stat -c %a /app/small.4; cat /app/small.4 /app/small.6; ls /app | wc -l"
    shown = host.docker.run("committed", "sh", "-c", script)
    content = (SMALL["app/small.4"] + SMALL["app/small.6"]).decode()
    assert shown == f"700\n{content}x\n20"


def test_namespaces_share_the_layers_of_an_incomplete_image(host: ContainerdHost) -> None:
    host.pull()
    host.pull("other")
    indexes = [path.stat() for path in (host.stack.root / "images").glob("snapshot-*/index.erofs")]
    assert len(indexes) == 6 and {index.st_nlink for index in indexes} == {2}, "a layer was applied twice"
    host.remove()
    assert host.run("other", *READ, namespace="other").startswith("3 3 3")
    assert host.inspect(host.image, "other")["On this node"].startswith("3, ")


# -- profiles


def test_the_files_of_a_first_start_are_prefetched_by_the_next_pull(host: ContainerdHost) -> None:
    host.pull()
    assert host.run("one", *READ).startswith("3 3 3")
    wait_until(lambda: bool(host.profiles()), "the start is recorded", 60.0, host.stack.logs)
    assert "3 objects" in host.stack.gear("profile", "show", f"containerd:{host.image}").stdout
    host.reset()
    host.docker.docker("pull", host.image)
    read = (BUSYBOX.read_bytes(), SMALL["app/small.3"], SMALL["app/small.5"])
    wait_until(lambda: all(map(host.has, read)), "the profile is prefetched", 60.0, host.stack.logs)
    before = host.stack.lazy_status()
    assert host.docker.run(host.image, *READ).startswith("3 3 3")
    after = host.stack.lazy_status()
    assert after.on_demand == before.on_demand and after.profiles_found == 1 and len(host.objects()) == 3


def test_profile_record_adds_files_that_a_running_container_opens(host: ContainerdHost) -> None:
    host.docker.docker("pull", host.image)
    host.docker.run(host.image, "sleep", "1000", options=("-d", "--name", "recorded"))
    with subprocess.Popen(
        [GEAR, "profile", "record", "recorded", "--seconds", "100"],
        env=host.stack.environ(),
        stdout=subprocess.PIPE,
        text=True,
    ) as recording:
        wait_until(lambda: _is_watching(recording.pid), "the recording has begun")
        host.docker.docker("exec", "recorded", "cat", "/app/small.9")
        recording.send_signal(signal.SIGINT)
        output, _ = recording.communicate()
    assert (recording.returncode, output) == (0, "2 objects were opened\n")


# -- pins


def test_a_pinned_image_of_containerd_is_fetched_and_kept(host: ContainerdHost) -> None:
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


def test_an_image_is_found_by_each_form_of_its_name(host: ContainerdHost) -> None:
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


def test_an_image_of_another_snapshotter_is_refused(host: ContainerdHost) -> None:
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


def test_images_of_both_daemons_are_converted_without_a_registry(host: ContainerdHost, disk: Path) -> None:
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


def _gear(host: ContainerdHost, name: str) -> Pulled:
    return pull(host.repository(name), "gear")


def _is_watching(pid: int) -> bool:
    """Whether the process has a fanotify group with a mark."""
    try:
        return any("fanotify sdev:" in info.read_text() for info in Path(f"/proc/{pid}/fdinfo").iterdir())
    except FileNotFoundError:
        return False  # the process has closed a descriptor
