"""containerd's snapshotters: unpack an image of five gzip layers that is in the content store already."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.frame import Figure, Pairs, fresh_disk, seconds
from tests.support import rootfs
from tests.support.containerd_host import Containerd
from tests.support.rootfs import TreeSize
from tests.support.stack import Stack

TURNS = 3
_LAYERS = 5
_LAYER = TreeSize(entries=14_500, content_bytes=310_000_000)
_NAME = "docker.io/library/large:1"
_PEER = "overlayfs"


def unpack() -> list[Figure]:
    """Measure the unpacking of a new image, and of the same image in another namespace.

    overlayfs does not sync what it unpacks; gearworkers does. The sync that overlayfs lacks is a figure of its own.
    """
    first, again, sync = Pairs(), Pairs(), list[float]()
    with fresh_disk() as disk:
        archive = disk / "image.tar"
        _write_image(archive, disk)
        for turn in range(TURNS):
            with _host(disk / f"turn{turn}") as containerd:
                for namespace in ("one", "two"):
                    containerd.ctr("images", "import", "--no-unpack", str(archive), namespace=namespace)
                for snapshotter in ("gear", _PEER) if turn % 2 else (_PEER, "gear"):
                    os.sync()
                    is_ours = snapshotter != _PEER
                    first.add_value(is_ours, seconds(_unpack, containerd, snapshotter, "one"))
                    synced_s = seconds(os.sync)
                    if not is_ours:
                        sync.append(synced_s)
                    again.add_value(is_ours, seconds(_unpack, containerd, snapshotter, "two"))
                    os.sync()
    return [
        first.figure("unpack of 5 gzip layers, 1.5 GB, s", 0.45),
        again.figure("unpack of the same image in another namespace, s", 0.02),
        Figure("sync after overlayfs's unpack, s", sorted(sync)[len(sync) // 2], None, None),
    ]


@contextmanager
def _host(directory: Path) -> Iterator[Containerd]:
    """A stack and a containerd with empty roots."""
    name = f"b{directory.name[-1]}"
    stack = Stack(directory / "stack", name)
    stack.set(CONTAINERD_ADDRESS=f"/run/docker/private/{name}-ctr/containerd.sock")
    stack.start()
    containerd = Containerd(directory / "containerd", stack)
    containerd.start()
    try:
        yield containerd
    finally:
        containerd.stop()
        stack.stop()


def _unpack(containerd: Containerd, snapshotter: str, namespace: str) -> None:
    listed = containerd.ctr("images", "ls", f"name=={_NAME}", namespace=namespace).splitlines()[1]
    digest = listed.split()[2]
    containerd.ctr("snapshots", "--snapshotter", snapshotter, "unpack", digest, namespace=namespace)


def _write_image(target: Path, directory: Path) -> None:
    """Write the image as `docker save` does, with compressed layers."""
    names, diff_ids = list[str](), list[str]()
    with tarfile.open(target, "w") as archive:
        for number in range(_LAYERS):
            tar = directory / f"{number}.tar"
            rootfs.write_unshared_tree(tar, f"unpack{number}", _LAYER)
            diff_ids.append(f"sha256:{_sha256(tar)}")
            subprocess.run(["gzip", "-n", str(tar)], check=True)
            names.append(f"{number}/layer.tar")
            archive.add(f"{tar}.gz", names[-1])
            Path(f"{tar}.gz").unlink()
        config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers"}}
        config["rootfs"]["diff_ids"] = diff_ids  # type: ignore[index]  # a dictionary
        (directory / "config.json").write_text(json.dumps(config))
        archive.add(directory / "config.json", "config.json")
        manifest = [{"Config": "config.json", "RepoTags": [_NAME], "Layers": names}]
        (directory / "manifest.json").write_text(json.dumps(manifest))
        archive.add(directory / "manifest.json", "manifest.json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
