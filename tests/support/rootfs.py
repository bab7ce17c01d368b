"""Realistic input: root file systems made by debootstrap, and large trees of files that share no content.

`python -m tests.support.rootfs` makes the cached root file systems. It needs the network, so run it before a sandbox
starts.
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
"""Every 25th file of the second root file system differs: 4 % of the files, so 96 % are shared."""
_VARIES_EVERY = 10
_RECIPE = "3"
"""Part of the names in the cache; raise it when the trees change."""
_STAGING = "making-"
_IN_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Prefix for a command whose processes and mounts all end with it."""
_EXCLUDED = ("./var/cache/apt/*", "./var/lib/apt/lists/*", "./dev/*")


@dataclass(frozen=True)
class TreeSize:
    """Minimum size of a tree."""

    entries: int
    content_bytes: int


ONE_GB = TreeSize(entries=52_000, content_bytes=1_000_000_000)


def cache_dir() -> Path:
    """Return the directory of cached files, outside the checkout."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gearworkers"


def debian() -> Path:
    """Return the tar of a Debian root file system.

    Raises:
        FileNotFoundError: The tar does not exist; `make rootfs` makes it.
    """
    return _cached("debian")


def debian_variant() -> Path:
    """Return the tar of a second root file system that shares all files with debian() except every 25th."""
    return _cached("debian-variant")


def make_all() -> None:
    """Make the missing cached tars; wait if another process is making them.

    Crash: leaves a directory ``making-*`` in the cache directory, which the next call removes, but no incomplete tar.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache_dir().glob(f"{_STAGING}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if not _path("debian").exists():
            print("making a Debian root file system (once)", flush=True)
            _make_debian(_path("debian"))
        if not _path("debian-variant").exists():
            _make_variant(_path("debian"), _path("debian-variant"))


def write_unshared_tree(target: Path, seed: str, size: TreeSize, variant: str = "") -> None:
    """Write a tar of about *size* from the files of the host's /usr, each altered so that no two contents are equal.

    File sizes are distributed as in /usr. The same host, seed and variant give the same tar. Two variants of a seed
    share all files except every tenth.
    """
    entries = content_bytes = 0
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for path, info in _proportional_entries(size):
            info.name = f"tree/{info.name}"
            tar.addfile(info, _altered(path, seed if entries % _VARIES_EVERY else seed + variant, info))
            entries += 1
            content_bytes += info.size
    if entries < size.entries or content_bytes < size.content_bytes:
        raise AssertionError(f"/usr is too small: {entries} entries, {content_bytes} bytes of {size}")


def _proportional_entries(size: TreeSize) -> Iterator[tuple[Path, tarfile.TarInfo]]:
    """Yield entries of /usr, repeatedly if needed, so that the numbers of bytes and entries grow in proportion."""
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
    """Return the tar header for *path*; None unless it is a file, a directory or a symlink."""
    with tarfile.TarFile(fileobj=io.BytesIO(), mode="w") as tar:
        info = tar.gettarinfo(path, name)
    if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
        return None
    if info.islnk():
        info.type, info.size = tarfile.REGTYPE, path.stat().st_size
    return info


def _altered(path: Path, seed: str, info: tarfile.TarInfo) -> io.BytesIO | None:
    """Return the file's content with a hash of *seed* and its name over the first bytes; None for other types."""
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
        done = subprocess.run([*_IN_NAMESPACES, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            sys.exit(f"debootstrap failed:\n{done.stdout[-3000:]}")
        temporary = Path(name) / "tar"
        excluded = [f"--exclude={pattern}" for pattern in _EXCLUDED]
        subprocess.run(["tar", "-C", str(root), "--sort=name", *excluded, "-cf", str(temporary), "."], check=True)
        temporary.rename(target)


def suite() -> str:
    """Return the code name of this host's Debian release."""
    fields = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return fields["VERSION_CODENAME"].strip('"')


def mirror() -> list[str]:
    """Return the mirror of this host's apt; an empty list, for debootstrap's default, if it is unknown."""
    filters = ["Created-By: Packages", "Origin: Debian", f"Codename: {suite()}", "Component: main"]
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *filters]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return [uri for uri in done.stdout.splitlines() if uri.startswith(("http", "file"))][:1]


def _make_variant(source: Path, target: Path) -> None:
    """Copy *source*, with a line added to every 25th non-empty file."""
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
