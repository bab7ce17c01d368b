"""The images of `applications`, made from Debian's packages and kept in an OCI layout outside the checkout.

`python -m tests.support.appimages [VERSION…]` makes the missing images. It needs the network, so run it before a
sandbox starts. Each image has three versions, as a registry would receive them over time:

    1  Debian's release
    2  rebuilt with Debian's updates of everything except the program itself
    3  the program's own updates as well, and another release of the application's files

The updates are those in Debian's security archive when the images are made. A layer is the difference between two
overlay mounts, archived by GNU tar and compressed by gzip as in `docker push`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gearworkers.images import manifest as m
from gearworkers.images.convert_local import convert_locally
from gearworkers.images.gear_manifest import ConversionReport
from gearworkers.images.plan import plan_conversion
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import Settings
from tests.support.applications import APPLICATIONS, BUILD_TOOLS, FILES, Application, Step
from tests.support.rootfs import cache_dir, mirror, suite

VERSIONS = ("1", "2", "3")
_RECIPE = "2"
"""Part of the cache's name; raise it when the images change."""
_INSIDE_OPTION = "--inside"
_WORK_PREFIX = "images-making-"
_GZIP_LEVEL = 6
_FIRST_RELEASE = "1"
_PROGRAM_NOT_UPDATED = "2"
_APPLICATION_RELEASED = "3"
_APT = (
    "apt-get -q -y -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Options::=--force-confold "
    "-o Dpkg::Use-Pty=0 -o APT::Keep-Downloaded-Packages=true -o Acquire::Languages=none"
)
_NET_BIND_SERVICE = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
"""cap_net_bind_service=ep. Source: Linux include/uapi/linux/capability.h, struct vfs_cap_data."""
_NO_SERVICE_STARTS = "#!/bin/sh\nexit 101\n"


def layout() -> Path:
    """Return the directory of the OCI layout that contains the images, named NAME:VERSION."""
    return cache_dir() / f"images-{_RECIPE}"


def descriptors() -> dict[str, m.JsonObject]:
    """Return the descriptors of the existing images by name."""
    path = layout() / "index.json"
    if not path.exists():
        return {}
    found: list[m.JsonObject] = json.loads(path.read_text())["manifests"]
    return {descriptor["annotations"]["org.opencontainers.image.ref.name"]: descriptor for descriptor in found}


def push(settings: Settings, name: str, target: str) -> None:
    """Push the image NAME:VERSION unchanged to *target*, a reference with a tag.

    Raises:
        FileNotFoundError: The image does not exist; `make images` makes it.
    """
    reference = Reference.parse(target)
    repository = Repository.of(settings.registry, reference)
    descriptor = _descriptor(name)
    data = _blob(descriptor["digest"]).read_bytes()
    manifest = json.loads(data)
    for part in (manifest["config"], *manifest["layers"]):
        with _blob(part["digest"]).open("rb") as file:
            repository.put_blob(part["digest"], file, part["size"])
    repository.put_manifest(reference.tag_or_digest, descriptor["mediaType"], data)


def convert(settings: Settings, name: str, target: str) -> ConversionReport:
    """Convert the image NAME:VERSION to *target*, with its contents in the remote of *settings*.

    Raises:
        FileNotFoundError: The image does not exist; `make images` makes it.
    """
    _descriptor(name)
    plan = plan_conversion(settings.registry, f"oci:{layout()}:{name}", target, m.Platform.here())
    return convert_locally(settings, plan, os.cpu_count() or 1, lambda _digest, _count: None)


def _descriptor(name: str) -> m.JsonObject:
    descriptor = descriptors().get(name)
    if descriptor is None:
        raise FileNotFoundError(f"{layout()} has no {name}: run `make images`")
    return descriptor


def make(versions: Iterable[str]) -> None:
    """Make the missing images of these versions; wait if another process is making images.

    Crash: leaves blobs that no image refers to, and a working directory, which the next call removes.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))
    layout().mkdir(parents=True, exist_ok=True)
    lock = os.open(layout(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [
            version for version in versions if any(f"{app.name}:{version}" not in descriptors() for app in APPLICATIONS)
        ]
        if missing:
            _make(missing)
    finally:
        os.close(lock)


def _make(versions: list[str]) -> None:
    print(f"making images of five applications (once), version {', '.join(versions)}", flush=True)
    for path in cache_dir().glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(path)
    # Mounts, and processes that packages start, end with these namespaces.
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    done = subprocess.run([*command, sys.executable, "-m", "tests.support.appimages", _INSIDE_OPTION, *versions])
    if done.returncode != 0:
        sys.exit("the images could not be made")


def _blob(digest: str) -> Path:
    return layout() / "blobs" / "sha256" / digest.removeprefix("sha256:")


# -- inside the namespaces


def _make_inside(versions: list[str]) -> None:
    for path in (layout() / "blobs" / "sha256", cache_dir() / "apt" / "archives" / "partial"):
        path.mkdir(parents=True, exist_ok=True)
    (layout() / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=cache_dir()) as name, ThreadPoolExecutor(2) as pool:
        workshop = _Workshop(Path(name), pool)
        for version in versions:
            workshop.make_version(version)


@dataclass
class _Tree:
    """A root file system: a stack of directories, topmost first, and the blob of each layer."""

    directories: tuple[Path, ...]
    layers: tuple[Future[_Layer], ...]
    history: tuple[str, ...]


@dataclass(frozen=True)
class _Layer:
    digest: str
    size_bytes: int
    diff_id: str


@dataclass
class _Workshop:
    work: Path
    pool: ThreadPoolExecutor
    debootstrapped: Path | None = None
    built: dict[object, _Tree] = field(default_factory=dict)
    """Trees by their inputs, so that versions and applications share equal layers."""
    serial: int = 0

    def make_version(self, version: str) -> None:
        """Build all five applications and name them in the layout."""
        base = self._base(with_updates=version != _FIRST_RELEASE)
        trees = []
        for application in APPLICATIONS:
            tree = base
            for step in application.steps:
                tree = self._step(tree, step, application, version)
            trees.append((application, tree))
        for application, tree in trees:
            _name_image(application, version, tree)

    def _base(self, *, with_updates: bool) -> _Tree:
        """Return debootstrap's minimal system as one layer, with or without updates."""
        if with_updates in self.built:
            return self.built[with_updates]
        directories: tuple[Path, ...]
        if with_updates:
            below, upper = self._debootstrap(), self._directory()
            with self._mounted((below,), upper, with_updates=True) as root:
                _chroot(root, f"{_APT} update && {_APT} dist-upgrade")
            directories = (upper, below)
        else:
            directories = (self._debootstrap(),)
        merged = self._directory()
        with _overlay(directories, None, merged, self._directory()):
            tar = self._tar(merged)
        self.built[with_updates] = _Tree(directories, (self.pool.submit(_pack, tar),), ("debootstrap",))
        return self.built[with_updates]

    def _debootstrap(self) -> Path:
        if self.debootstrapped is None:
            self.debootstrapped = self._directory()
            _run(["debootstrap", "--variant=minbase", suite(), str(self.debootstrapped), *mirror()])
            policy = self.debootstrapped / "usr/sbin/policy-rc.d"
            policy.write_text(_NO_SERVICE_STARTS)
            policy.chmod(0o755)
        return self.debootstrapped

    def _step(self, below: _Tree, step: Step, application: Application, version: str) -> _Tree:
        with_updates = version != _FIRST_RELEASE
        held = application.program if version == _PROGRAM_NOT_UPDATED and step is not BUILD_TOOLS else ""
        release = "2" if version == _APPLICATION_RELEASED else "1"
        key = (below.directories, step, held, (application.name, release) if step.files else None)
        if key in self.built:
            return self.built[key]
        upper = self._directory()
        with self._mounted(below.directories, upper, with_updates=with_updates, held=held) as root:
            if step.packages:
                _chroot(root, f"{_APT} update && {_APT} install --no-install-recommends {step.packages}")
            if step.files:
                _copy_files(FILES / application.name, root, release)
            for command in step.commands:
                _chroot(root, command.replace("@RELEASE@", release))
            if step.privileged:
                os.setxattr(root / step.privileged, "security.capability", _NET_BIND_SERVICE)
        layer = self.pool.submit(_pack, self._tar(self._as_layer(upper)))
        history = f"packages {step.packages}" if step.packages else "files of the application"
        self.built[key] = _Tree((upper, *below.directories), (*below.layers, layer), (*below.history, history))
        return self.built[key]

    def _directory(self) -> Path:
        self.serial += 1
        path = self.work / str(self.serial)
        path.mkdir()
        return path

    @contextmanager
    def _mounted(self, lowers: tuple[Path, ...], upper: Path, *, with_updates: bool, held: str = "") -> Iterator[Path]:
        """Mount a root to install into. Mounts that only the installation needs are not part of the layer.

        Args:
            lowers: The layers below, topmost first.
            upper: Receives the changes of the installation.
            with_updates: Whether apt installs Debian's updates, except those of *held*.
            held: Patterns of package names, separated by spaces.
        """
        merged = self._directory()
        lists = cache_dir() / "apt" / f"lists-{'updates' if with_updates else 'release'}"
        sources = self.work / "sources"
        release = (lowers[-1] / "etc/apt/sources.list").read_text()
        sources.write_text(release + (_update_sources() if with_updates else ""))
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        preferences = self._directory()
        if held:
            (preferences / "held").write_text(f"Package: {held}\nPin: release l=Debian-Security\nPin-Priority: 100\n")
        with _overlay(lowers, upper, merged, self._directory()):
            mounts = [
                (["--rbind", "/dev"], "dev"),
                (["-t", "proc", "proc"], "proc"),
                (["--bind", "/etc/resolv.conf"], "etc/resolv.conf"),
                (["--bind", str(sources)], "etc/apt/sources.list"),
                (["--bind", str(preferences)], "etc/apt/preferences.d"),
                (["--bind", str(lists)], "var/lib/apt/lists"),
                (["--bind", str(cache_dir() / "apt" / "archives")], "var/cache/apt/archives"),
            ]
            for arguments, target in mounts:
                subprocess.run(["mount", *arguments, str(merged / target)], check=True)
            try:
                yield merged
            finally:
                for _, target in reversed(mounts):
                    subprocess.run(["umount", "--recursive", "--lazy", str(merged / target)], check=True)

    def _as_layer(self, upper: Path) -> Path:
        """Return a hard-linked copy of *upper*, with the overlay's whiteouts in the form of OCI layers."""
        copy = self._directory()
        subprocess.run(["cp", "-al", f"{upper}/.", str(copy)], check=True)
        for directory, names, files in os.walk(copy):
            if _is_opaque(Path(directory)):
                Path(directory, ".wh..wh..opq").touch()
            for name in (*names, *files):
                path = Path(directory, name)
                status = path.lstat()
                if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                    path.unlink()
                    path.with_name(f".wh.{name}").touch()
        return copy

    def _tar(self, root: Path) -> Path:
        self.serial += 1
        target = self.work / f"{self.serial}.tar"
        options = ["--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--xattrs-exclude=trusted.*"]
        excluded = [f"--exclude=./{name}/*" for name in ("dev", "proc", "var/cache/apt", "var/lib/apt/lists", "run")]
        _run(["tar", "-C", str(root), "--format=posix", *options, *excluded, "-cf", str(target), "."])
        return target


def _update_sources() -> str:
    """Return the sources.list lines from which this host's apt gets Debian's updates."""
    filters = ["Created-By: Packages", "Origin: Debian", "Component: main"]
    command = ["apt-get", "indextargets", "--format", "deb $(REPO_URI) $(CODENAME) $(COMPONENT)", *filters]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    lines = (line for line in sorted(set(found)) if f"{suite()}-security" in line or f"{suite()}-updates" in line)
    return "".join(f"{line}\n" for line in lines)


@contextmanager
def _overlay(lowers: tuple[Path, ...], upper: Path | None, merged: Path, work: Path) -> Iterator[None]:
    """Mount an overlay; read-only without *upper*."""
    below = [str(path) for path in lowers] if upper or len(lowers) > 1 else [str(lowers[0]), str(work)]
    options = "lowerdir=" + ":".join(below)
    if upper is not None:
        options += f",upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(merged)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def _is_opaque(directory: Path) -> bool:
    try:
        return os.getxattr(directory, "trusted.overlay.opaque") == b"y"
    except OSError:
        return False


def _copy_files(source: Path, root: Path, release: str) -> None:
    """Copy the application's own files, with @RELEASE@ replaced."""
    for path in sorted(source.rglob("*")):
        target = root / path.relative_to(source)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.unlink(missing_ok=True)
            target.write_text(path.read_text().replace("@RELEASE@", release))
            target.chmod(path.stat().st_mode & 0o755)


def _chroot(root: Path, command: str) -> None:
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    _run(["chroot", str(root), "sh", "-ec", command], environ)


def _run(command: list[str], environ: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-3000:]}")


def _pack(tar: Path) -> _Layer:
    """Compress *tar* into a blob of the layout; remove *tar*."""
    compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    diff_id, digest = hashlib.sha256(), hashlib.sha256()
    packed = tar.with_suffix(".gz")
    with tar.open("rb") as source, packed.open("wb") as target:
        while data := source.read(1 << 20):
            diff_id.update(data)
            piece = compressor.compress(data)
            digest.update(piece)
            target.write(piece)
        piece = compressor.flush()
        digest.update(piece)
        target.write(piece)
    tar.unlink()
    layer = _Layer(f"sha256:{digest.hexdigest()}", packed.stat().st_size, f"sha256:{diff_id.hexdigest()}")
    packed.rename(_blob(layer.digest))
    return layer


def _name_image(application: Application, version: str, tree: _Tree) -> None:
    layers = [layer.result() for layer in tree.layers]
    run: dict[str, Any] = {"Env": [], **application.config}
    run["Env"] = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", *run["Env"]]
    config = {
        "architecture": m.Platform.here().architecture,
        "os": "linux",
        "config": run | {"ExposedPorts": {f"{application.port}/tcp": {}}},
        "history": [{"created_by": text} for text in tree.history],
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": m.DOCKER_MANIFEST,
        "config": _put(m.encode(config), m.DOCKER_CONFIG),
        "layers": [
            {"mediaType": m.DOCKER_LAYER_GZIP, "digest": layer.digest, "size": layer.size_bytes} for layer in layers
        ],
    }
    name = f"{application.name}:{version}"
    descriptor = _put(m.encode(manifest), m.DOCKER_MANIFEST)
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": name}
    named = descriptors() | {name: descriptor}
    temporary = layout() / "index.json.new"
    temporary.write_bytes(m.encode({"schemaVersion": 2, "manifests": list(named.values())}))
    temporary.rename(layout() / "index.json")


def _put(data: bytes, media_type: str) -> dict[str, Any]:
    digest = m.digest_of(data)
    _blob(digest).write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


if __name__ == "__main__":
    if sys.argv[1:2] == [_INSIDE_OPTION]:
        _make_inside(sys.argv[2:])
    else:
        make(sys.argv[1:] or VERSIONS)
