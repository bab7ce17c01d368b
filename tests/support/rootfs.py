"""Real input: root file systems made by debootstrap, and large trees of real files that share nothing.

`python -m tests.support.rootfs` makes the cached ones; it needs the network, so it runs before a sandbox begins.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "python3-minimal,git"
CHANGED_EVERY = 25
"""In the second root file system every n-th file differs: 4 % of the files, so 96 % are shared."""
_RECIPE = "3"
"""Part of the cache's names; raise it when the trees below change."""
_STAGING = "making-"
_ENDING_WHOLE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Processes and mounts of debootstrap end with it."""
_UNWANTED = ("./var/cache/apt/*", "./var/lib/apt/lists/*", "./dev/*")


@dataclass(frozen=True)
class TreeSize:
    """Files that a tree must hold."""

    entries: int
    content_bytes: int


ONE_GB = TreeSize(entries=52_000, content_bytes=1_000_000_000)


def cache_dir() -> Path:
    """The directory of cached trees, outside the checkout."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gearworkers"


def debian() -> Path:
    """The tar of a Debian root file system.

    Raises:
        FileNotFoundError: It was not made yet.
    """
    return _cached("debian")


def debian_variant() -> Path:
    """The tar of a second root file system that shares all but every 25th file with debian()."""
    return _cached("debian-variant")


def make_all() -> None:
    """Make the missing cached tars; one process at a time.

    Crash: leaves a directory ``making-*`` in the cache directory, which the next call removes; never a short tar.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache_dir().glob(f"{_STAGING}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not _path("debian").exists():
            print("making a Debian root file system (once)", flush=True)
            _make_debian(_path("debian"))
        if not _path("debian-variant").exists():
            _make_variant(_path("debian"), _path("debian-variant"))


def write_unshared_tree(target: Path, seed: str, size: TreeSize) -> None:
    """Write a tar of about *size* made of the host's own /usr, each file altered so that no two contents are equal.

    The mix of sizes is that of /usr; the same host and seed give the same tar.
    """
    entries = content_bytes = 0
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for path, info in _paced(size):
            info.name = f"tree/{info.name}"
            tar.addfile(info, _altered(path, seed, info))
            entries += 1
            content_bytes += info.size
    if entries < size.entries or content_bytes < size.content_bytes:
        raise AssertionError(f"/usr holds too little: {entries} entries, {content_bytes} bytes of {size}")


def _paced(size: TreeSize) -> Iterator[tuple[Path, tarfile.TarInfo]]:
    """Files and directories of /usr, over and over, so chosen that bytes and entries run out together."""
    entries = content_bytes = 0
    per_entry = size.content_bytes / size.entries
    slack = min(size.content_bytes // 20, 16 << 20)
    for turn in range(100):
        for path in _walk(Path("/usr")):
            info = _info(path, f"{turn}{path}")
            if info is None or content_bytes + info.size > per_entry * (entries + 1) + slack:
                continue
            yield path, info
            entries += 1
            content_bytes += info.size
            if entries >= size.entries and content_bytes >= size.content_bytes:
                return


def _walk(root: Path) -> Iterator[Path]:
    for directory, directories, files in os.walk(root):
        directories.sort()
        yield Path(directory)
        yield from (Path(directory, name) for name in sorted(files))


def _info(path: Path, name: str) -> tarfile.TarInfo | None:
    """The tar header for *path*; None unless it is a file, a directory or a symlink."""
    with tarfile.TarFile(fileobj=io.BytesIO(), mode="w") as tar:
        info = tar.gettarinfo(path, name)
    if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
        return None
    if info.islnk():
        info.type, info.size = tarfile.REGTYPE, path.stat().st_size
    return info


def _altered(path: Path, seed: str, info: tarfile.TarInfo) -> io.BytesIO | None:
    """The file's bytes with a mark of *seed* and its name over the first ones."""
    if not info.isreg():
        return None
    mark = hashlib.sha256(f"{seed}:{info.name}".encode()).digest()
    content = path.read_bytes()[: info.size].ljust(info.size, b"\0")
    return io.BytesIO((mark + content[len(mark) :])[: info.size])


def _cached(name: str) -> Path:
    path = _path(name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: run `make rootfs`")
    return path


def _path(name: str) -> Path:
    return cache_dir() / f"{name}-{_RECIPE}.tar"


def _make_debian(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=target.parent, ignore_cleanup_errors=True) as name:
        root = Path(name) / "root"
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite(), str(root), *mirror()]
        command[:0] = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]  # ends whole, mounts too
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            sys.exit(f"debootstrap failed:\n{done.stdout[-3000:]}")
        temporary = Path(name) / "tar"
        unwanted = [f"--exclude={pattern}" for pattern in _UNWANTED]
        subprocess.run(["tar", "-C", str(root), "--sort=name", *unwanted, "-cf", str(temporary), "."], check=True)
        temporary.rename(target)


def suite() -> str:
    """This host's release of Debian."""
    fields = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return fields["VERSION_CODENAME"].strip('"')


def mirror() -> list[str]:
    """Where this host's own apt gets Debian from; nothing, for debootstrap's default, if that cannot be told."""
    wanted = ["Created-By: Packages", "Origin: Debian", f"Codename: {suite()}", "Component: main"]
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return [uri for uri in done.stdout.splitlines() if uri.startswith(("http", "file"))][:1]


def _make_variant(source: Path, target: Path) -> None:
    """Copy *source*, a line added to every 25th non-empty file."""
    number = 0
    temporary = target.with_name(f"{_STAGING}variant")
    with tarfile.open(source) as old, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as new:
        for info in old:
            if not (info.isreg() and info.size):
                new.addfile(info)
                continue
            number += 1
            content = old.extractfile(info)
            assert content is not None
            if number % CHANGED_EVERY:
                new.addfile(info, content)
            else:
                changed = content.read() + b"\n# changed\n"
                info.size = len(changed)
                new.addfile(info, io.BytesIO(changed))
    temporary.rename(target)


if __name__ == "__main__":
    make_all()
