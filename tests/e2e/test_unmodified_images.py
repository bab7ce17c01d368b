"""Unmodified images start before they have arrived: pulled under their own name and digest by Docker and containerd."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from gearworkers.images.layer_records import LayerRecord, read_record, record_name
from gearworkers.images.manifest import digest_of
from gearworkers.remote.factory import open_remote
from tests.support.containerd_lazy import ContainerdHost, containerd_host
from tests.support.images import Image
from tests.support.processes import wait_until
from tests.support.tiny import tar_of, tiny_tar

# Each has a suffix of its own, so that none is another's companion.
SMALL = {f"app/small.{number}": b"%d " % number * 2000 for number in range(20)}
LARGE = random.Random(8).randbytes(6 << 20)
TARS = [tiny_tar(), tar_of(SMALL), tar_of({"app/large": LARGE, "app/empty": b""})]
READ = ("cat", "/app/small.3", "/app/small.5")
READ_OUTPUT = (SMALL["app/small.3"] + SMALL["app/small.5"]).decode().strip()
NOTHING, ALL = [False, False, False], [True, True, True]


@pytest.fixture(scope="module")
def session_host(disk: Path) -> Iterator[ContainerdHost]:
    with containerd_host(disk, "gearum", 5012, "app:1") as host:
        Image(TARS).push(host.repository("app"), "1")
        host.gear("index", "--local", "--processes", "1", host.image)
        shutil.copytree(host.remote, disk / "gearum-indexed")
        yield host


@pytest.fixture
def host(session_host: ContainerdHost, disk: Path) -> ContainerdHost:
    """The host without images and objects; its processes have forgotten all indexes."""
    wait_until(lambda: not session_host.stack.recorders(), "all starts are recorded")
    shutil.rmtree(session_host.remote, ignore_errors=True)
    shutil.copytree(disk / "gearum-indexed", session_host.remote, dirs_exist_ok=True)  # the push worker writes too
    session_host.stack.stop("gateway")
    session_host.stack.start()
    session_host.containerd.wait_for_gateway()
    session_host.reset()
    return session_host


def layer_digests(host: ContainerdHost, tag: str = "1") -> list[str]:
    """The digests of the image's layers in the registry."""
    manifest = json.loads(host.repository("app").manifest(tag)[0])
    return [layer["digest"] for layer in manifest["layers"]]


def downloaded(host: ContainerdHost, tag: str = "1") -> list[bool]:
    """Whether the content store of Docker's namespace has each layer of the image."""
    stored = host.containerd.ctr("content", "ls", "-q", namespace="moby").split()
    return [digest in stored for digest in layer_digests(host, tag)]


def record_of(host: ContainerdHost, layer: int) -> LayerRecord:
    """The record of one of the image's layers."""
    record = read_record(open_remote(host.settings).document, layer_digests(host)[layer])
    assert record is not None
    return record


def index_of(host: ContainerdHost, layer: int) -> Path:
    """The file of a layer's index in the remote."""
    name = record_of(host, layer).converted.object_digest.hex()
    return host.remote / "objects" / name[:2] / name


# -- pull and run


def test_docker_pulls_manifest_and_config_only(host: ContainerdHost) -> None:
    log = host.registry.directory / "registry.log"
    before = len(log.read_text())
    host.docker.docker("pull", host.image)
    assert downloaded(host) == NOTHING and not any(map(host.has, SMALL.values()))
    requests = log.read_text()[before:]
    assert "/v2/app/manifests/1 " in requests and not [digest for digest in layer_digests(host) if digest in requests]
    assert host.docker.run(host.image, *READ) == READ_OUTPUT
    assert {name for name, content in SMALL.items() if host.has(content)} == {"app/small.3", "app/small.5"}
    listed = host.docker.run(host.image, "stat", "-c", "%n %s", "/app/large", "/app/empty", "/app/small.7")
    assert listed == f"/app/large {len(LARGE)}\n/app/empty 0\n/app/small.7 4000"


def test_id_and_digest_are_the_original_ones(host: ContainerdHost) -> None:
    host.docker.docker("pull", host.image)
    manifest = host.repository("app").manifest("1")[0]
    (shown,) = json.loads(host.docker.docker("image", "inspect", host.image))
    assert shown["RepoDigests"] == [f"{host.registry.host}/app@{digest_of(manifest)}"]
    assert shown["RootFS"]["Layers"] == [digest_of(tar) for tar in TARS]
    assert shown["Id"] in (json.loads(manifest)["config"]["digest"], digest_of(manifest))
    assert host.docker.run(f"{host.registry.host}/app@{digest_of(manifest)}", *READ) == READ_OUTPUT


def test_an_image_is_removed_and_collected(host: ContainerdHost) -> None:
    host.docker.docker("pull", host.image)
    host.docker.run(host.image, *READ)
    host.docker.docker("rmi", host.image)
    wait_until(lambda: not list((host.stack.root / "images").iterdir()), "all layers are removed", 60.0)
    wait_until(lambda: not host.objects(), "garbage collection removes the objects", 90.0)
    host.docker.docker("pull", host.image)
    assert downloaded(host) == NOTHING and host.docker.run(host.image, *READ) == READ_OUTPUT


def test_the_first_start_of_an_indexed_image_is_recorded(host: ContainerdHost) -> None:
    Image(
        [*TARS, tar_of({"start": b"#!/bin/sh\ncat /app/small.3 /app/small.5; sleep 100\n"})], command=("sh", "/start")
    ).push(host.repository("app"), "started")
    path = f"{Path(host.docker.daemon.command[0]).parent}:{host.stack.environ()['PATH']}"
    host.stack.set(PATH=path, DOCKER_CONFIG=str(host.docker.directory / "config"))
    shown = host.gear("index", "--local", "--record", "5", f"{host.registry.host}/app:started")
    assert shown["Recorded start"] == "4 objects" and shown["Layers"] == "4 (3 already indexed)"
    assert not host.docker.docker("ps", "-aq")
    assert host.gear("index", "--local", "--record", "5", f"{host.registry.host}/app:started")["Recorded start"]


# -- layers that are here


def test_layers_of_another_image_are_not_downloaded_again(host: ContainerdHost) -> None:
    shutil.rmtree(host.remote / "documents")
    Image([*TARS[:2], tar_of({"other": b"other"})]).push(host.repository("app"), "other")
    Image([tar_of({"base": b"base"}), TARS[1]]).push(host.repository("app"), "rebased")
    host.docker.docker("pull", host.image)
    assert downloaded(host) == ALL
    host.docker.docker("pull", f"{host.registry.host}/app:other")
    assert host.docker.run(f"{host.registry.host}/app:other", "cat", "/other", *READ[1:]) == "other" + READ_OUTPUT
    before = len(list((host.stack.root / "images").iterdir()))
    host.docker.docker("pull", f"{host.registry.host}/app:rebased")
    assert len(list((host.stack.root / "images").iterdir())) == before + 2
    indexes = [path.stat() for path in (host.stack.root / "images").glob("snapshot-*/index.erofs")]
    assert sorted(index.st_nlink for index in indexes)[-2:] == [2, 2], "the layer was applied twice"


# -- when the remote does not help


def test_an_image_without_indexes_is_downloaded(host: ContainerdHost) -> None:
    shutil.rmtree(host.remote / "documents")
    host.docker.docker("pull", host.image)
    assert downloaded(host) == ALL and host.docker.run(host.image, *READ) == READ_OUTPUT


def test_a_layer_without_an_index_is_downloaded(host: ContainerdHost) -> None:
    shutil.rmtree(host.remote / "documents" / record_name(layer_digests(host)[2]))
    host.docker.docker("pull", host.image)
    assert downloaded(host) == [False, False, True] and host.docker.run(host.image, *READ) == READ_OUTPUT


@pytest.mark.parametrize("damage", ["missing", "damaged", "cut"])
def test_a_layer_whose_index_is_of_no_use_is_downloaded(host: ContainerdHost, damage: str) -> None:
    index = index_of(host, 1)
    data = index.read_bytes()
    index.unlink()
    if damage != "missing":
        index.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    host.docker.docker("pull", host.image)
    assert downloaded(host) == [False, True, True] and host.docker.run(host.image, *READ) == READ_OUTPUT


def test_a_record_for_other_contents_is_not_used(host: ContainerdHost) -> None:
    remote, name = open_remote(host.settings), record_name(layer_digests(host)[1])
    wrong = msgspec.structs.replace(record_of(host, 1), source_diff_id=record_of(host, 2).source_diff_id)
    remote.put_document(name, msgspec.json.encode(wrong))
    host.docker.docker("pull", host.image)
    assert downloaded(host) == [False, True, True] and host.docker.run(host.image, *READ) == READ_OUTPUT


def test_a_wrong_content_is_an_error_for_its_reader(host: ContainerdHost) -> None:
    name = digest_of(SMALL["app/small.3"]).removeprefix("sha256:")
    content = host.remote / "objects" / name[:2] / name
    content.chmod(0o600)
    content.write_bytes(b"R" + SMALL["app/small.4"])
    host.docker.docker("pull", host.image)
    done = host.docker.call("run", "--rm", "--network", "none", host.image, "cat", "/app/small.3")
    assert done.returncode != 0 and b"Input/output error" in done.stderr and not done.stdout


def test_a_lazy_file_server_that_is_away_delays_no_pull(host: ContainerdHost) -> None:
    host.stack.stop("lazyfs")
    begin_s = time.monotonic()
    host.docker.docker("pull", host.image)
    assert time.monotonic() - begin_s < 8 and downloaded(host) == ALL
    assert host.docker.run(host.image, *READ) == READ_OUTPUT


def test_a_remote_that_is_away_delays_no_pull(host: ContainerdHost) -> None:
    shutil.rmtree(host.remote)
    begin_s = time.monotonic()
    host.docker.docker("pull", host.image)
    assert time.monotonic() - begin_s < 8 and downloaded(host) == ALL
    assert host.docker.run(host.image, *READ) == READ_OUTPUT


@pytest.mark.parametrize(("setting", "expected"), [("off", ALL), ("example.org", ALL), ("127.0.0.1:5012/app", NOTHING)])
def test_a_setting_limits_the_use_of_indexes(host: ContainerdHost, setting: str, expected: list[bool]) -> None:
    host.stack.stop("gateway")
    host.stack.set(GEAR_LAZY_PULL=setting)
    host.stack.start("gateway")
    host.containerd.wait_for_gateway()
    try:
        host.docker.docker("pull", host.image)
        assert downloaded(host) == expected
    finally:
        host.stack.set(GEAR_LAZY_PULL="")


# -- at once, and killed in the middle


def test_two_pulls_at_once_share_the_layers(host: ContainerdHost) -> None:
    Image([*TARS, tar_of({"two": b"two"})]).push(host.repository("app"), "two")
    names = [host.image, f"{host.registry.host}/app:two"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: host.docker.docker("pull", name), names))
    assert downloaded(host) == NOTHING and downloaded(host, "two") == [*NOTHING, True]
    assert [host.docker.run(name, *READ) for name in names] == [READ_OUTPUT, READ_OUTPUT]
    assert len(list((host.stack.root / "images").glob("snapshot-*"))) == 4


@pytest.mark.parametrize("killed", ["client", "gateway", "containerd"])
def test_a_pull_that_is_killed_is_repeated(host: ContainerdHost, killed: str) -> None:
    lazyfs = host.stack.daemons["lazyfs"]
    os.kill(lazyfs.pid, signal.SIGSTOP)  # Prepare waits for it
    pull = host.docker.begin("pull", host.image)
    time.sleep(0.5)
    if killed == "client":
        pull.kill()
    elif killed == "gateway":
        host.stack.kill("gateway")
    else:
        host.containerd.daemon.kill()
    os.kill(lazyfs.pid, signal.SIGCONT)
    pull.communicate()
    host.stack.start("gateway")
    if killed == "containerd":
        host.containerd.start()
    host.containerd.wait_for_gateway()
    wait_until(lambda: host.docker.call("pull", host.image).returncode == 0, "the image is pulled again", 60.0)
    assert host.docker.run(host.image, *READ) == READ_OUTPUT
    host.docker.docker("rmi", host.image)
    host.containerd.collect_garbage("moby")
    wait_until(lambda: not list((host.stack.root / "images").iterdir()), "all layers are removed", 60.0)
    host.stack.wait_until_idle()
