"""Imports: one large image, one that shares files, one of many layers, four at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.frame import Figure, Pairs, Side, both_sides, fresh_disk, seconds
from tests.support import rootfs
from tests.support.registry import Registry
from tests.support.rootfs import TreeSize

TURNS = 3
_QUARTER_GB = TreeSize(entries=13_000, content_bytes=250_000_000)
_LAYER = TreeSize(entries=3_000, content_bytes=60_000_000)
_LAYERS_OVER_DEBIAN = 4


def import_one() -> list[Figure]:
    """Measure `docker import` of 1 GB in more than 50,000 entries that share nothing."""
    pairs = Pairs()
    with fresh_disk() as disk:
        tar = disk / "tree.tar"
        rootfs.write_unshared_tree(tar, "import", rootfs.ONE_GB)
        for turn in range(TURNS):
            with both_sides(disk, turn) as sides:
                for side in sides:
                    pairs.add(side, seconds(side.dockerd.docker, "import", str(tar), "tree"))
    return [pairs.figure("import 1 GB, s", 0.50)]


def import_shared() -> list[Figure]:
    """Measure `docker import` of a second image that shares at least 90 % of its bytes with the first."""
    pairs = Pairs()
    with fresh_disk() as disk:
        for turn in range(TURNS):
            with both_sides(disk, turn) as sides:
                for side in sides:
                    side.dockerd.docker("import", str(rootfs.debian()), "debian")
                    work = ("import", str(rootfs.debian_variant()), "variant")
                    pairs.add(side, seconds(side.dockerd.docker, *work))
    return [pairs.figure("import of a second image, s", 0.40)]


def load_layers() -> list[Figure]:
    """Measure `docker load`, and `docker pull` from a local registry, of an image of five layers."""
    loads, pulls = Pairs(), Pairs()
    with fresh_disk() as disk:
        registry = Registry(disk / "registry")
        registry.start()
        name = f"{registry.host}/layered:1"
        _make_layered(disk, name)
        for turn in range(TURNS):
            with both_sides(disk, 2 * turn + 10) as sides:
                for side in sides if turn % 2 else reversed(sides):
                    loads.add(side, seconds(side.dockerd.docker, "load", "-i", str(disk / "image")))
            with both_sides(disk, 2 * turn + 11) as sides:
                for side in sides if turn % 2 else reversed(sides):
                    pulls.add(side, seconds(side.dockerd.docker, "pull", name))
        registry.stop()
    return [loads.figure("load of 5 layers, s", 0.70), pulls.figure("pull of 5 layers, s", 0.70)]


def _make_layered(disk: Path, name: str) -> None:
    """Push an image of five layers as *name*, and save it as disk/image."""
    context = disk / "context"
    context.mkdir()
    steps = ["FROM debian"]
    for number in range(_LAYERS_OVER_DEBIAN):
        rootfs.write_unshared_tree(context / f"{number}.tar", f"layer{number}", _LAYER)
        steps.append(f"ADD {number}.tar /layer{number}/")
    (context / "Dockerfile").write_text("\n".join(steps))
    with both_sides(disk) as (_, peer):
        peer.dockerd.docker("import", str(rootfs.debian()), "debian")
        peer.dockerd.docker("build", "-t", name, str(context))
        peer.dockerd.docker("save", "-o", str(disk / "image"), name)
        peer.dockerd.docker("push", name)


def import_parallel() -> list[Figure]:
    """Measure the import of four different images at once."""
    pairs = Pairs()
    with fresh_disk() as disk:
        tars = [disk / f"{number}.tar" for number in range(4)]
        for tar in tars:
            rootfs.write_unshared_tree(tar, tar.name, _QUARTER_GB)
        for turn in range(TURNS):
            with both_sides(disk, turn) as sides:
                for side in sides:
                    pairs.add(side, seconds(_import_all, side, tars))
    return [pairs.figure("import of 4 images at once, s", 0.50)]


def _import_all(side: Side, tars: list[Path]) -> None:
    with ThreadPoolExecutor(len(tars)) as pool:
        list(pool.map(lambda tar: side.dockerd.docker("import", str(tar), tar.stem), tars))
