"""A containerd of 1.7 or later and a Docker of 26 or later: this host's own, or those of a newer Debian in the cache.

`python -m tests.support.newer_docker` makes the directory of the programs. It needs the network, so it runs before a
sandbox begins. The programs of newer Debian packages also run on Debian 12.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gearworkers.containerd.config import Version
from gearworkers.util.locks import locked_file
from tests.support.rootfs import cache_dir, mirror

RELEASE = os.environ.get("DOCKER_OF_DEBIAN", "")
"""The release of Debian to use; empty for this host's programs, or those of Debian 13 if these are too old."""
_FALLBACK = "trixie"
_PACKAGES = ("containerd", "docker.io", "docker-cli", "docker-buildx")
_PROGRAMS = ("containerd", "ctr", "containerd-shim-runc-v2", "dockerd", "docker")
_BUILDX = Path("usr/libexec/docker/cli-plugins/docker-buildx")
_MIN_VERSIONS = {"containerd": (1, 7), "dockerd": (26, 0)}
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def programs() -> Path:
    """The directory that has containerd, ctr, its shim, dockerd, docker and docker-buildx.

    Raises:
        FileNotFoundError: It was not made yet.
    """
    path = _directory()
    if not path.exists():
        raise FileNotFoundError(f"{path}: run `make containerd`")
    return path


def containerd_version() -> Version:
    """Return the version of the containerd in `programs`.

    Raises:
        FileNotFoundError: The directory was not made yet.
    """
    command = [str(programs() / "containerd"), "--version"]
    return Version.parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[2])


def make_all() -> None:
    """Make the directory unless it exists; one process at a time.

    Crash: leaves a directory ``making-*`` in the cache directory, which `rootfs.make_all` removes.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    with locked_file(cache_dir() / "lock"):
        if not _directory().exists():
            _make(_directory())


def _directory() -> Path:
    return cache_dir() / f"docker-{RELEASE or 'default'}"


def _make(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="making-", dir=cache_dir()) as name:
        made = Path(name) / "bin"
        made.mkdir()
        if not RELEASE and all(_has_version(program, version) for program, version in _MIN_VERSIONS.items()):
            _link_own(made)
        else:
            print(f"unpacking containerd and Docker of Debian {RELEASE or _FALLBACK} (once)", flush=True)
            _unpack(Path(name), made)
        made.rename(target)


def _has_version(program: str, wanted: tuple[int, int]) -> bool:
    path = shutil.which(program, path=_SYSTEM_PATH)
    if path is None:
        return False
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)\.", text)
    return found is not None and (int(found[1]), int(found[2])) >= wanted


def _link_own(target: Path) -> None:
    for program in _PROGRAMS:
        path = shutil.which(program, path=_SYSTEM_PATH)
        assert path is not None, f"{program} is missing"
        (target / program).symlink_to(path)
    (target / _BUILDX.name).symlink_to(Path("/") / _BUILDX)


def _unpack(directory: Path, target: Path) -> None:
    """Download the packages with apt's checks of signatures, and take their programs."""
    for name in ("state/lists/partial", "cache/archives/partial", "debs", "root"):
        (directory / name).mkdir(parents=True)
    mirrors = mirror()
    if not mirrors:
        sys.exit("apt names no mirror of Debian")
    (directory / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {mirrors[0]} {RELEASE or _FALLBACK} main\n")
    options = {
        "Dir::Etc::sourcelist": directory / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State": directory / "state",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": directory / "cache",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items())]
    for command in ([*apt, "update"], [*apt, "download", *_PACKAGES]):
        subprocess.run(command, cwd=directory / "debs", check=True, stdout=subprocess.DEVNULL)
    for package in (directory / "debs").glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, directory / "root"], check=True)
    for program in _PROGRAMS:
        (found,) = (path for part in ("usr/bin", "usr/sbin") for path in (directory / "root" / part).glob(program))
        shutil.copy2(found, target / program)
    shutil.copy2(directory / "root" / _BUILDX, target / _BUILDX.name)


if __name__ == "__main__":
    make_all()
