"""A real image is converted by real workers, then pulled, run, extended and pinned on an empty host."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gearworkers.images.layer_records import INLINE_BYTES
from tests.support.dockerd import Dockerd
from tests.support.processes import wait_until
from tests.support.registry import Registry
from tests.support.stack import Stack

PARTS = ("redis", "gateway", "import", "push", "lazyfs", "convert")
TREE = "find /usr /var /opt /root -printf '%P %y %m %U:%G %s %T@ %l\\n' | sort"
CONTENTS = "find /var/lib /usr/bin /usr/share/perl5 -type f | sort | xargs sha256sum"


@dataclass
class Host:
    """A second node with its own dockerd."""

    stack: Stack
    dockerd: Dockerd
    registry: Registry

    @property
    def image(self) -> str:
        """Name of the Gear image."""
        return f"{self.registry.host}/gear/debian:v1"

    def gear(self, *arguments: str) -> dict[str, str]:
        """Run a `gear` command; return its output lines by key."""
        done = self.stack.gear(*arguments)
        assert done.returncode == 0, done.stderr
        return {line[:16].strip(): line[16:].strip() for line in done.stdout.splitlines()}

    def count(self, key: str, image: str | None = None) -> int:
        """Return the number of files that `gear inspect` shows under *key*."""
        return int(self.gear("inspect", image or self.image)[key].split(",")[0])

    def pull(self) -> None:
        """Pull the Gear image."""
        self.dockerd.docker("pull", self.image)

    def reset(self) -> None:
        """Remove all images and their objects."""
        self.dockerd.remove_everything()
        self.gear("gc")


@pytest.fixture(scope="module")
def original(session_dockerd: Dockerd, session_stack: Stack | None, registry: Registry) -> Dockerd:
    """Push the image `debian` to the registry; return the session's dockerd."""
    assert session_stack is not None
    session_stack.start()
    session_dockerd.docker("tag", "debian", f"{registry.host}/debian:v1")
    session_dockerd.docker("push", f"{registry.host}/debian:v1")
    return session_dockerd


@pytest.fixture(scope="module")
def empty_host(original: Dockerd, registry: Registry, disk: Path) -> Iterator[Host]:
    """Run a second node; its worker converts the image."""
    remote = disk / "gear-remote"
    remote.mkdir()
    stack = Stack(disk / "empty-host", name="gear3", settings={"GEAR_REMOTE": str(remote)})
    stack.start(*PARTS)
    host = Host(stack, Dockerd("d3", disk / "docker-empty", "gear3"), registry)
    stack.set(DOCKER_HOST=f"unix://{host.dockerd.socket}")
    host.dockerd.start()
    host.gear("convert", f"{registry.host}/debian:v1", host.image)
    yield host
    host.dockerd.remove_everything()
    host.dockerd.stop()
    stack.stop()


@pytest.fixture
def host(empty_host: Host) -> Host:
    empty_host.reset()
    return empty_host


def test_inspect_shows_the_files_that_an_unpulled_image_needs(host: Host) -> None:
    shown = host.gear("inspect", host.image)
    assert (shown["Image"], shown["Pulled"], shown["Gear image"]) == (host.image, "no", "yes")
    assert shown["Missing"] == shown["Distinct files"] and shown["On this node"].startswith("0,")
    assert int(shown["Distinct files"].split(",")[0]) > 5000
    assert host.gear("inspect", f"{host.registry.host}/debian:v1")["Gear image"] == "no"


def test_a_gear_image_runs_with_the_same_files_and_fetches_only_files_that_are_read(
    host: Host, original: Dockerd
) -> None:
    host.pull()
    inline = host.count("On this node")
    assert host.dockerd.run(host.image, "sh", "-c", TREE) == original.run("debian", "sh", "-c", TREE)
    assert host.count("On this node") - inline < 50, "listing the tree fetched contents"
    assert host.dockerd.run(host.image, "sh", "-c", CONTENTS) == original.run("debian", "sh", "-c", CONTENTS)
    assert "git version" in host.dockerd.run(host.image, "git", "--version")
    assert host.count("Missing") > 3000


def test_a_pinned_image_is_fetched_completely_and_kept_after_its_removal(host: Host) -> None:
    host.pull()
    assert host.gear("inspect", host.image)["Image pinned"] == "no"
    host.gear("pin", host.image)
    assert host.gear("status")["Pinned:"].startswith(host.image)
    wait_until(lambda: host.count("Missing") == 0, "all files are fetched", 120)
    shown = host.gear("inspect", host.image)
    assert shown["Pinned files"] == shown["On this node"] == shown["Distinct files"] and shown["Image pinned"] == "yes"
    wait_until(lambda: host.gear("inspect", host.image)["Layers"] == "1 (1 complete)", "the layer is complete")
    host.dockerd.docker("rmi", host.image)
    host.gear("gc")
    assert host.count("Missing") == 0
    host.gear("unpin", host.image)
    host.gear("gc")
    assert host.count("On this node") == 0


def test_a_lost_pinned_file_is_fetched_again_and_a_complete_image_needs_no_server(host: Host) -> None:
    host.pull()
    host.gear("pin", host.image)
    wait_until(lambda: host.gear("inspect", host.image)["Layers"] == "1 (1 complete)", "the layer is complete", 120)
    objects = [path for path in (host.stack.root / "public").rglob("*") if path.is_file()]
    lost = next(path for path in objects if path.stat().st_size > INLINE_BYTES)  # the remote has no smaller objects
    lost.unlink()
    host.stack.stop("lazyfs")
    host.stack.start("lazyfs")
    wait_until(lost.exists, "the object is fetched again")
    host.stack.stop("lazyfs")
    assert "git version" in host.dockerd.run(host.image, "git", "--version")
    host.stack.start("lazyfs")
    host.gear("unpin", host.image)


def test_an_image_built_on_a_gear_image_can_be_converted(host: Host) -> None:
    host.pull()
    content = os.urandom(20_000).hex()
    dockerfile = f"FROM {host.image}\nRUN echo {content} > /etc/new && chmod 700 /usr/bin/git\n"
    built, converted = f"{host.registry.host}/built:v1", f"{host.registry.host}/gear/built:v1"
    host.dockerd.docker("build", "--network=none", "-t", built, "-", stdin=dockerfile.encode())
    host.dockerd.docker("push", built)
    assert len(host.gear("convert", built, converted)) == 6
    layers = {name: manifest_layers(host.registry, name) for name in ("gear/debian", "built", "gear/built")}
    assert layers["built"][0] == layers["gear/debian"][0] == layers["gear/built"][0]
    assert layers["gear/built"][1]["size"] < 10_000 < layers["built"][1]["size"]
    host.reset()
    host.dockerd.docker("pull", converted)
    assert host.dockerd.run(converted, "cat", "/etc/new") == content
    assert host.dockerd.run(converted, "stat", "-c", "%a", "/usr/bin/git") == "700"


def test_a_commit_on_a_gear_image_is_saved_and_loaded(host: Host, original: Dockerd, tmp_path: Path) -> None:
    host.pull()
    container = host.dockerd.run(host.image, "sh", "-c", "echo made > /made; rm /etc/debian_version", options=())
    assert container == ""
    id = host.dockerd.docker("ps", "-alq")
    host.dockerd.docker("commit", id, "committed")
    host.dockerd.docker("rm", id)
    assert host.dockerd.run("committed", "sh", "-c", "cat /made; ls /etc/debian_version || true") == "made"
    host.dockerd.docker("save", "-o", str(tmp_path / "saved.tar"), "committed")
    image_id = host.dockerd.docker("image", "inspect", "-f", "{{.Id}}", "committed")
    host.reset()
    host.dockerd.docker("load", "-i", str(tmp_path / "saved.tar"))
    assert host.dockerd.docker("image", "inspect", "-f", "{{.Id}}", "committed") == image_id
    assert host.dockerd.run("committed", "cat", "/made") == "made"


def manifest_layers(registry: Registry, name: str) -> list[dict[str, int]]:
    request = urllib.request.Request(f"http://{registry.host}/v2/{name}/manifests/v1")
    request.add_header("Accept", "application/vnd.docker.distribution.manifest.v2+json")
    with urllib.request.urlopen(request) as page:
        layers: list[dict[str, int]] = json.load(page)["layers"]
    return layers
