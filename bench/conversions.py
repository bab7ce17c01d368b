"""Conversion of a layer, compared with unpacking it by `gunzip -c | tar -x`."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec

import msgspec

from bench.frame import Figure, fresh_disk, seconds
from gearworkers.images import manifest as m
from gearworkers.images.convert import convert_layer
from gearworkers.images.plan import LayerJob
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.remote.factory import open_remote
from gearworkers.settings import RegistrySettings, RemoteSettings, Settings
from tests.support import rootfs
from tests.support.registry import Registry

TURNS = 3
_P = ParamSpec("_P")


@dataclass
class _Times:
    """Wall-clock and CPU seconds of each turn."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def add(self, work: Callable[_P, object], *arguments: _P.args, **options: _P.kwargs) -> None:
        before_s = _cpu_s()
        self.wall_s.append(seconds(work, *arguments, **options))
        self.cpu_s.append(_cpu_s() - before_s)


def convert() -> list[Figure]:
    """Measure the conversion of a Debian layer, and of a second layer that shares 96 % of its files with the first.

    The source is a registry; the target is a registry, with the contents in a directory. A converted layer is durable
    on return. The peer's files are not, except in the figure "with sync".
    """
    ours, indexed, shared, peer, synced = _Times(), _Times(), _Times(), _Times(), _Times()
    with fresh_disk() as disk:
        registry = Registry(disk / "registry")
        registry.start()
        try:
            jobs = [_push_layer(disk, registry, path) for path in (rootfs.debian(), rootfs.debian_variant())]
            for turn in range(TURNS):
                directory = disk / f"turn{turn}"
                settings = _settings(directory)
                ours.add(_convert, settings, jobs[0])
                shared.add(_convert, settings, jobs[1])
                indexed.add(_convert, _settings(directory / "index"), msgspec.structs.replace(jobs[0], target=""))
                peer.add(_unpack, disk / jobs[0].digest, directory / "peer")
                synced.add(_unpack, disk / jobs[0].digest, directory / "synced", "&& sync -f .")
                shutil.rmtree(directory)
        finally:
            registry.stop()
    work = "a Debian layer of 93 MB converted, against gunzip | tar -x,"
    return [
        _figure(f"{work} s", ours.wall_s, peer.wall_s, 1.5),
        _figure(f"{work} CPU s", ours.cpu_s, peer.cpu_s, None),
        _figure(f"{work} with sync, s", ours.wall_s, synced.wall_s, None),
        _figure("one that shares 96 % with it, s", shared.wall_s, peer.wall_s, 1.5),
        _figure("gear index of the first layer, s", indexed.wall_s, peer.wall_s, 1.5),
    ]


def _figure(work: str, ours: list[float], peer: list[float], goal: float | None) -> Figure:
    return Figure(work, statistics.median(ours), statistics.median(peer), goal)


def _settings(directory: Path) -> Settings:
    (directory / "remote").mkdir(parents=True)
    return Settings(gear_root=directory / "gear", remote=RemoteSettings(url=str(directory / "remote")))


def _push_layer(disk: Path, registry: Registry, tar: Path) -> LayerJob:
    """Push the layer, compressed by gzip, and keep it as the file disk/DIGEST too; return its job."""
    blob = disk / f"{tar.stem}.gz"
    with blob.open("wb") as out:
        subprocess.run(["gzip", "-n", "-c", str(tar)], stdout=out, check=True)
    digest, diff_id = _digest(blob), _digest(tar)
    blob.rename(disk / digest)
    source = f"{registry.host}/source:v1"
    with (disk / digest).open("rb") as file:
        size_bytes = (disk / digest).stat().st_size
        Repository.of(RegistrySettings(), Reference.parse(source)).put_blob(digest, file, size_bytes)
        _push_image(source, digest, size_bytes, diff_id)
    return LayerJob(source, f"{registry.host}/gear:v1", digest, size_bytes, diff_id, again=True)


def _push_image(source: str, digest: str, size_bytes: int, diff_id: str) -> None:
    """Push a manifest and a config, so that *source* names an image."""
    repository = Repository.of(RegistrySettings(), Reference.parse(source))
    config = m.encode({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}})
    with open(os.memfd_create("config"), "w+b") as file:
        file.write(config)
        repository.put_blob(m.digest_of(config), file, len(config))
    head = {"mediaType": m.DOCKER_CONFIG, "digest": m.digest_of(config), "size": len(config)}
    layer = {"mediaType": m.DOCKER_LAYER_GZIP, "digest": digest, "size": size_bytes}
    manifest = {"schemaVersion": 2, "mediaType": m.DOCKER_MANIFEST, "config": head, "layers": [layer]}
    repository.put_manifest("v1", m.DOCKER_MANIFEST, m.encode(manifest))


def _digest(path: Path) -> str:
    done = subprocess.run(["sha256sum", str(path)], check=True, capture_output=True, text=True)
    return f"sha256:{done.stdout.split()[0]}"


def _convert(settings: Settings, job: LayerJob) -> None:
    remote = open_remote(settings)
    convert_layer(settings, remote, job, lambda _: None)
    remote.close()


def _unpack(blob: Path, target: Path, then: str = "") -> None:
    target.mkdir()
    command = f"gunzip -c {blob} | tar -x {then}"
    subprocess.run(["/bin/sh", "-c", command], cwd=target, check=True)


def _cpu_s() -> float:
    """Return the user and system time of this process and of the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
