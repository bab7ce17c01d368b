"""A large image as `docker save` writes it, with gzip layers."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import rootfs
from tests.support.rootfs import TreeSize

NAME = "docker.io/library/large:1"
_LAYER = TreeSize(entries=14_500, content_bytes=310_000_000)


def write_image(
    target: Path, name: str, variant: str = "", layers: int = 5, layer: TreeSize = _LAYER, base: bytes = b""
) -> None:
    """Write an archive of an image; five layers of the default size are 1.5 GB in 72,500 entries.

    Args:
        target: The archive.
        name: The image's name.
        variant: Two variants share 90 % of their files.
        layers: Their number.
        layer: The size of each.
        base: The tar of a further layer below them.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as name_of_directory:
        directory = Path(name_of_directory)
        with ThreadPoolExecutor(2) as pool:
            diff_ids = list(pool.map(lambda number: _write_layer(directory, number, variant, layer), range(layers)))
        names = [f"{number}.tar.gz" for number in range(layers)]
        if base:
            (directory / "base.tar.gz").write_bytes(gzip.compress(base))
            names.insert(0, "base.tar.gz")
            diff_ids.insert(0, f"sha256:{hashlib.sha256(base).hexdigest()}")
        rootfs_field = {"type": "layers", "diff_ids": diff_ids}
        config = {"architecture": "amd64", "os": "linux", "config": {"Cmd": ["true"]}, "rootfs": rootfs_field}
        (directory / "config.json").write_text(json.dumps(config))
        manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": names}]
        (directory / "manifest.json").write_text(json.dumps(manifest))
        with tarfile.open(target, "w") as archive:
            for member in (*names, "config.json", "manifest.json"):
                archive.add(directory / member, member)


def _write_layer(directory: Path, number: int, variant: str, size: TreeSize) -> str:
    """Write one compressed layer; return its diff ID."""
    tar = directory / f"{number}.tar"
    rootfs.write_unshared_tree(tar, f"large{number}", size, variant)
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    subprocess.run(["gzip", "-n", str(tar)], check=True)
    return f"sha256:{digest}"
