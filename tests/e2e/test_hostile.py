"""Hostile tars through a real dockerd give the same result as overlay2, or an error that names the entry."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.layers import directory, file, symlink, tar
from tests.conformance.test_hostile import ACCEPTED, REJECTED
from tests.support.dockerd import Dockerd
from tests.support.stack import Stack

LOWER = tar(
    directory("d", 0o750, 5, 6),
    file("d/a", b"lower a"),
    file("d/b", b"lower b"),
    file("etc/passwd", b"lower"),
    symlink("s", "d"),
)
"""The layer below the hostile one, with files, a directory and a symlink of the same names."""
HOSTILE = {case: make_tar for case, (make_tar, _) in (REJECTED | ACCEPTED).items()} | {
    "a parent that is a symlink of the layer below": lambda: tar(file("s/a", b"through")),
    "a parent that is a file of the layer below": lambda: tar(file("etc/passwd/a", b"through")),
}
PEER_ERROR = "duplicates of file paths"
"""dockerd's tar-split, which gearworkers replaces, rejects such tars; overlay2 and gearworkers take the last entry."""
KEPT_TIMES = {"old", "new"}
"""Files with times before 1970 or after 2262: gearworkers keeps the times, Docker sets them to 1970."""
_MADE_BY_DOCKER = ("dev", ".dockerenv", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab", "proc", "sys")

Tree = dict[str, tuple[object, ...]]


@pytest.fixture(scope="module")
def peer(disk: Path) -> Iterator[Dockerd]:
    """Run a dockerd with overlay2 on the same disk."""
    peer = Dockerd("peer", disk / "peer", "overlay2")
    peer.start()
    yield peer
    peer.stop()


def archive(*layers: bytes) -> bytes:
    """Return an archive for `docker load` of an image with these layers."""
    digests = [hashlib.sha256(layer).hexdigest() for layer in layers]
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]}
    config = json.dumps({"os": "linux", "architecture": "amd64", "config": {"Cmd": ["x"]}, "rootfs": rootfs})
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = json.dumps([{"Config": "config.json", "RepoTags": ["hostile:1"], "Layers": names}])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as members:
        for name, content in zip(
            ("config.json", "manifest.json", *names), (config.encode(), manifest.encode(), *layers), strict=True
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            members.addfile(info, io.BytesIO(content))
    return out.getvalue()


def outcome(dockerd: Dockerd, image: bytes) -> tuple[str, Tree]:
    """Load an image; return the error, empty on success, and the files of a container."""
    loaded = dockerd.call("load", stdin=image)
    if loaded.returncode:
        assert dockerd.call("image", "inspect", "hostile:1").returncode, "a rejected image does not exist"
        return (loaded.stdout + loaded.stderr).decode(errors="surrogateescape"), {}
    container = dockerd.docker("create", "hostile:1")
    exported = dockerd.call("export", container)
    dockerd.docker("rm", container)
    dockerd.docker("rmi", "hostile:1")
    assert exported.returncode == 0, exported.stderr
    return "", tree(exported.stdout)


def tree(exported: bytes) -> Tree:
    """Return the metadata of each file in an export, without the files that dockerd makes in a container.

    Times of directories are omitted: Docker gives the current time to a parent directory that it creates.
    """
    found: Tree = {}
    with tarfile.open(fileobj=io.BytesIO(exported), errors="surrogateescape") as members:
        for info in members:
            name = info.name.rstrip("/")
            if name.startswith(_MADE_BY_DOCKER):
                continue
            content = b""
            if info.isreg() or info.islnk():
                extracted = members.extractfile(info)
                assert extracted is not None
                content = extracted.read()
            kind = tarfile.REGTYPE if info.islnk() else info.type
            link = info.linkname if info.issym() else ""
            mtime_s = 0 if info.isdir() or name in KEPT_TIMES else int(info.mtime)
            devices = (info.devmajor, info.devminor) if info.isdev() else ()
            found[name] = (kind, info.mode, info.uid, info.gid, mtime_s, link, devices, content)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", HOSTILE)
def test_the_result_equals_that_of_overlay2_or_is_an_error(
    dockerd: Dockerd, stack: Stack, peer: Dockerd, case: str
) -> None:
    image = archive(LOWER, HOSTILE[case]())
    error, ours = outcome(dockerd, image)
    if error:
        assert "GraphDriver.ApplyDiff" in error and "internal" not in error and "Traceback" not in error
        return
    peer_error, theirs = outcome(peer, image)
    if PEER_ERROR not in peer_error:
        assert (error, ours) == (peer_error, theirs)
