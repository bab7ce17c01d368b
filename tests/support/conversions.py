"""Sample layers, and conversions in this process."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from contextlib import closing
from pathlib import Path

from gearworkers.images import manifest as m
from gearworkers.images.convert import convert_layer
from gearworkers.images.gear_manifest import ConversionReport, finish_conversion
from gearworkers.images.layer_records import INLINE_BYTES
from gearworkers.images.plan import plan_conversion
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.images.upload import SMALL_BYTES
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from tests.support.images import Image, Pulled, contents_of, pull, tar_of
from tests.support.registry import Registry

AMD64 = m.Platform("amd64", "linux")


def noise(seed: str, size_bytes: int) -> bytes:
    """Return bytes that do not compress."""
    return hashlib.shake_256(seed.encode()).digest(size_bytes)


def special(name: str, kind: bytes, **fields: object) -> tarfile.TarInfo:
    """Return a tar member of another type than a regular file."""
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


SMALL = noise("small", INLINE_BYTES)
MIDDLE = noise("middle", INLINE_BYTES + 1)
LARGE = noise("large", 3 * SMALL_BYTES)
BASE = tar_of(
    [
        special("dir/", tarfile.DIRTYPE, mode=0o1777, uid=5, mtime=1_600_000_000),
        ("dir/empty", b""),
        ("dir/small", SMALL),
        ("dir/middle", MIDDLE),
        ("dir/large", LARGE),
        ("dir/again", LARGE),
        ("dir/" + "long" * 60, MIDDLE[::-1]),
        ("dir/naïve", MIDDLE * 2),
        special("dir/link", tarfile.SYMTYPE, linkname="small"),
        special("dir/hard", tarfile.LNKTYPE, linkname="dir/large"),
        special("dir/fifo", tarfile.FIFOTYPE, mode=0o600),
        special("dir/null", tarfile.CHRTYPE, devmajor=1, devminor=3),
    ]
)
TOP = tar_of([("dir/.wh.small", b""), ("other/.wh..wh..opq", b""), ("other/middle", MIDDLE)])


def repository(settings: Settings, name: str) -> Repository:
    """Return the repository *name*, ``HOST/NAME``."""
    return Repository.of(settings.registry, Reference.parse(name))


def converted(
    settings: Settings,
    source: str,
    target: str,
    platform: m.Platform | None = AMD64,
    *,
    all_platforms: bool = False,
    again: bool = False,
) -> ConversionReport:
    """Convert an image in this process, one layer after another."""
    wanted = None if all_platforms else platform
    plan = plan_conversion(settings.registry, source, target, wanted, all_platforms=all_platforms, again=again)
    with closing(open_remote(settings)) as remote:
        done = [convert_layer(settings, remote, job, lambda _: None) for job in plan.jobs()]
    return finish_conversion(settings.registry, plan, done)


def pushed(settings: Settings, peer: Registry, image: Image, name: str = "source") -> str:
    """Push *image* to the repository *name*; return the image's name."""
    image.push(repository(settings, f"{peer.host}/{name}"), "v1")
    return f"{peer.host}/{name}:v1"


def converted_image(settings: Settings, peer: Registry, image: Image) -> Pulled:
    """Push *image*, convert it, and return the Gear image."""
    target = f"{peer.host}/gear:v1"
    converted(settings, pushed(settings, peer, image), target)
    return pull(repository(settings, target), "v1")


def sparse_tar(path: Path) -> bytes:
    """Return a tar of the sparse file *path*, as GNU tar writes it."""
    command = ["tar", "--sparse", "--format=pax", "-C", str(path.parent), "-cf", "-", path.name]
    return subprocess.run(command, check=True, capture_output=True).stdout


class Converter:
    """Converts images to one repository, and reads the results."""

    def __init__(self, settings: Settings, host: str) -> None:
        self.settings = settings
        self.host = host
        self.name = f"{host}/{settings.gear_root.parent.name.lower().replace('_', '-')}"
        self.repository = repository(settings, self.name)

    def __call__(
        self, source: str, platform: m.Platform | None = AMD64, *, target: str = "", all_platforms: bool = False
    ) -> None:
        """Convert *source* to *target*; by default, to the tag `gear` of the repository."""
        converted(self.settings, source, target or f"{self.name}:gear", platform, all_platforms=all_platforms)

    def image(self, version: str = "gear") -> Pulled:
        """Return the image with this tag or digest."""
        return pull(self.repository, version)

    def contents(self) -> list[bytes]:
        """Return the contents of the first layer's files."""
        remote = open_remote(self.settings)
        return [content for _, content in contents_of(self.image().tars[0], remote)]

    def platform(self, version: str = "gear") -> str:
        """Return the name of the only file, which `Layout.image_for` named after the platform."""
        entries = [entry.name for entry, _ in contents_of(self.image(version).tars[0])]
        assert len(entries) == 1
        return entries[0].decode()
