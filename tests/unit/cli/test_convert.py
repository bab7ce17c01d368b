"""Run `gear convert` as a user does: its output, its errors, and its use of remotes and credentials."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.remote.factory import open_remote
from gearworkers.settings import ManagerSettings, RegistrySettings, RemoteSettings, Settings
from tests.support import registries
from tests.support.images import Image, contents_of, pull, push_index, tar_of
from tests.support.registry import Registry
from tests.support.remotes import manager_thread

pytestmark = pytest.mark.slow

GEAR = [sys.executable, "-c", "from gearworkers.cli.main import main; main()"]
TARS = [tar_of([(f"{name}/file", name.encode() * 1000)]) for name in ("one", "two")]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def source(peer: Registry) -> str:
    Image(TARS).push(at(peer, "source"), "v1")
    return f"{peer.host}/source:v1"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set GEAR_ROOT, which stores the markers of remotes, to a directory of the test."""
    monkeypatch.setenv("GEAR_ROOT", str(tmp_path / "gear"))


@pytest.fixture
def remote(tmp_path: Path) -> str:
    (tmp_path / "remote").mkdir()
    return str(tmp_path / "remote")


def at(peer: Registry, name: str) -> Repository:
    return Repository.of(RegistrySettings(), Reference.parse(f"{peer.host}/{name}"))


def convert(remote: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `gear convert` with these additions to the environment."""
    whole_environ = os.environ | {"GEAR_REMOTE": remote} | environ
    command = [*GEAR, "convert", *arguments]
    return subprocess.run(command, env=whole_environ, capture_output=True, text=True, timeout=120)


def test_the_command_prints_its_progress_and_a_report(peer: Registry, source: str, remote: str) -> None:
    done = convert(remote, source, f"{peer.host}/gear:v1", "--local", "--processes", "1")
    assert done.returncode == 0, done.stderr
    layers = pull(at(peer, "source"), "v1").manifest["layers"]
    read = [line.split()[1] for line in done.stderr.splitlines()]
    assert sorted(read) == sorted(layer["digest"].removeprefix("sha256:")[:12] for layer in layers)
    found = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert found["Layers"].strip() == "2 (0 already converted)"
    assert found["New objects"].strip() == "2, 6.0 kB"
    before = sum(layer["size"] for layer in layers)
    after = sum(layer["size"] for layer in pull(at(peer, "gear"), "v1").manifest["layers"])
    assert found["Size of layers"].strip() == f"{before} bytes before, {after} bytes after"


def test_the_contents_are_stored_in_the_manager_of_gear_remote(peer: Registry, source: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with manager_thread(
        Settings(gear_root=tmp_path / "gear", manager=ManagerSettings(store=str(tmp_path / "store")))
    ) as url:
        done = convert(url, source, f"{peer.host}/managed:v1", "--local", "--processes", "1")
        assert done.returncode == 0, done.stderr
        remote = open_remote(Settings(remote=RemoteSettings(url=url)))
        found = [contents_of(tar, remote) for tar in pull(at(peer, "managed"), "v1").tars]
        remote.close()
    assert found == [contents_of(tar) for tar in TARS]


def test_the_platform_options_select_the_images_to_convert(peer: Registry, remote: str) -> None:
    push_index(at(peer, "many"), "v1", [Image(TARS[:1], architecture="arm64"), Image(TARS[1:])])
    many = f"{peer.host}/many:v1"
    done = convert(remote, many, f"{peer.host}/arm:v1", "--local", "--platform", "linux/arm64")
    assert done.returncode == 0, done.stderr
    assert pull(at(peer, "arm"), "v1").config["architecture"] == "arm64"
    done = convert(remote, f"{peer.host}/arm:v1", f"{peer.host}/amd:v1", "--local", "--platform", "linux/amd64")
    assert done.returncode == 2 and "no image for linux/amd64; it has: linux/arm64" in done.stderr
    done = convert(remote, many, many, "--local", "--all-platforms")
    assert done.returncode == 2 and f"choose another tag, such as {many}-gear" in done.stderr
    done = convert(remote, many, f"{peer.host}/all:v1", "--local", "--all-platforms")
    assert done.returncode == 0 and "2 (1 already converted)" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1/x", "localhost:1/y"), "localhost:1"),
        (("X", "localhost:1/y"), "'X' is not an image name"),
        (("x", "localhost:1/y", "--platform", "linux"), "is not a platform"),
        (("x", "localhost:1/y", "--platform", "linux/arm64", "--all-platforms"), "exclude each other"),
        (("oci:/not/there", "localhost:1/y"), "/not/there"),
        (("oci:" + "long" * 100, "localhost:1/y"), "File name too long"),
    ],
)
def test_an_error_is_printed_as_one_line(remote: str, arguments: tuple[str, ...], message: str) -> None:
    done = convert(remote, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gear: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_a_conversion_without_a_remote_is_rejected() -> None:
    done = convert("", "localhost:1/x", "localhost:1/y")
    assert done.returncode == 2 and "GEAR_REMOTE" in done.stderr


def test_the_error_for_a_missing_redis_suggests_local(source: str, peer: Registry, tmp_path: Path) -> None:
    done = convert(str(tmp_path), source, f"{peer.host}/y", GEAR_RUN_DIR=str(tmp_path), GEAR_BROKER_URL="")
    assert done.returncode == 2 and str(tmp_path) in done.stderr and "--local" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_error_for_an_unreachable_broker_hides_its_password(source: str, peer: Registry, remote: str) -> None:
    done = convert(remote, source, f"{peer.host}/y", GEAR_BROKER_URL="redis://user:secret@127.0.0.1:1/0")
    assert done.returncode == 2 and "127.0.0.1:1" in done.stderr
    assert "secret" not in done.stderr


def test_the_command_uses_the_credentials_of_docker_login(tmp_path: Path, remote: str) -> None:
    known = base64.b64encode(f"{registries.USER}:{registries.PASSWORD}".encode()).decode()
    (tmp_path / "docker").mkdir()
    with registries.registry(tmp_path / "closed", auth=registries.basic_auth(tmp_path / "closed")) as closed:
        config = {"auths": {closed.host: {"auth": known}}}
        (tmp_path / "docker" / "config.json").write_text(json.dumps(config))
        settings = Settings(registry=RegistrySettings(docker_config=tmp_path / "docker"))
        Image(TARS).push(Repository.of(settings.registry, Reference.parse(f"{closed.host}/source")), "v1")
        arguments = [f"{closed.host}/source:v1", f"{closed.host}/gear:v1", "--local"]
        done = convert(remote, *arguments, DOCKER_CONFIG=str(tmp_path / "docker"))
        assert done.returncode == 0, done.stderr
        done = convert(remote, *arguments, "--again", DOCKER_CONFIG=str(tmp_path / "none"))
        assert done.returncode == 2 and "docker login" in done.stderr and done.stderr.count("\n") == 1
