"""Where images come from: a registry, an OCI layout, or what `docker save` wrote.

Source: OCI image-spec v1.1, image-layout.md; Docker image specification v1.2, "Combined Image JSON + Filesystem
Changeset Format".
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from gearworkers.errors import InvalidInput, NotFound, from_os_error
from gearworkers.images import manifest as m
from gearworkers.images.layer_reader import MAGIC_BYTES, Verified, compression_of, read_all
from gearworkers.images.reference import Reference, check_digest
from gearworkers.images.registry import Repository
from gearworkers.settings import RegistrySettings
from gearworkers.tar.reader import Readable

OCI = "oci:"
DOCKER_ARCHIVE = "docker-archive:"

_REF_NAME = "org.opencontainers.image.ref.name"
_CONTAINERD_NAME = "io.containerd.image.name"
_MAX_LINKS = 8


class Source(Protocol):
    """One named image and what it consists of; its methods may be called from many threads at once.

    Raised by all: NotFound, InvalidInput, IntegrityError, Unavailable, FailedPrecondition.
    """

    def root(self) -> tuple[bytes, str]:
        """The manifest or index that the name stands for, and its type."""

    def manifest(self, digest: str) -> tuple[bytes, str]:
        """A manifest by its digest, verified, and its type."""

    def blob(self, digest: str, size_bytes: int) -> Readable:
        """A blob's bytes, verified as they are read."""


def open_source(settings: RegistrySettings, text: str) -> Source:
    """The image that *text* names: ``oci:PATH[:TAG]`` (a directory or a tar), ``docker-archive:PATH[:TAG]``, or a
    reference to a registry.

    Raises:
        InvalidInput: It is none of them, or the tag is needed or wrong.
        NotFound: The path is not there.
    """
    if text.startswith(OCI):
        return OciLayout(*_opened(text.removeprefix(OCI)))
    if text.startswith(DOCKER_ARCHIVE):
        return DockerArchive(*_opened(text.removeprefix(DOCKER_ARCHIVE)))
    reference = Reference.parse(text)
    return RegistrySource(Repository.of(settings, reference), reference.version)


def is_local(text: str) -> bool:
    """Whether *text* names a path of this machine, which workers elsewhere cannot read."""
    return text.startswith((OCI, DOCKER_ARCHIVE))


def refuse_path(text: str) -> None:
    """For a process that works for others: a path of its machine is none of theirs.

    Raises:
        InvalidInput: *text* names one.
    """
    if is_local(text):
        raise InvalidInput(f"{text[:200]}: a worker reads images from registries only; convert it where the path is")


def small_blob(source: Source, descriptor: m.Descriptor) -> bytes:
    """A config.

    Raises:
        InvalidInput: It says to be too large for one.
    """
    if descriptor.size > m.MAX_CONFIG_BYTES:
        raise InvalidInput(f"config {descriptor.digest}: larger than {m.MAX_CONFIG_BYTES} bytes")
    return read_all(source.blob(descriptor.digest, descriptor.size))


@dataclass(frozen=True, slots=True)
class RegistrySource:
    """An image in a registry."""

    repository: Repository
    version: str

    def root(self) -> tuple[bytes, str]:
        """As `Source.root`."""
        return self.manifest(self.version)

    def manifest(self, digest: str) -> tuple[bytes, str]:
        """As `Source.manifest`; also by tag."""
        data, told = self.repository.manifest(digest)
        return data, m.media_type_of(data, told, f"manifest {digest} of {self.repository.name}")

    def blob(self, digest: str, size_bytes: int) -> Readable:
        """As `Source.blob`."""
        return self.repository.blob(digest, size_bytes)


class Part:
    """A file, or a part of one; closed when nobody has it any more."""

    def __init__(self, fd: int, offset: int, size_bytes: int) -> None:
        self._fd = fd
        self._at = offset
        self._end = offset + size_bytes
        self.size_bytes = size_bytes

    def __del__(self) -> None:
        os.close(self._fd)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill some of *buffer*; 0 at the end."""
        try:
            count = os.preadv(self._fd, [buffer[: self._end - self._at]], self._at)
        except OSError as exc:
            raise from_os_error(exc, "read an image's file") from exc
        self._at += count
        return count


class Files(Protocol):
    """A directory, or a tar of one."""

    @property
    def path(self) -> Path:
        """Where it is."""

    def open(self, name: str) -> Part:
        """One of its files, from its first byte.

        Raises:
            NotFound: It has none of that name.
        """


class OciLayout:
    """An image in an OCI layout."""

    def __init__(self, files: Files, tag: str) -> None:
        self._files = files
        self._index = b""
        """What stands for several platforms under one name."""
        self._root = self._chosen(tag)

    def root(self) -> tuple[bytes, str]:
        """As `Source.root`."""
        return self.manifest(self._root.digest)

    def manifest(self, digest: str) -> tuple[bytes, str]:
        """As `Source.manifest`."""
        is_root = digest == self._root.digest
        data = self._index if is_root and self._index else _small(self._open(digest), m.MAX_MANIFEST_BYTES)
        what = f"manifest {digest} of {self._files.path}"
        told = self._root.media_type if is_root else ""
        return m.verified(data, digest, what), m.media_type_of(data, told or m.OCI_MANIFEST, what)

    def blob(self, digest: str, size_bytes: int) -> Readable:
        """As `Source.blob`."""
        return Verified(self._open(digest), digest, size_bytes)

    def _open(self, digest: str) -> Part:
        return self._files.open(f"blobs/sha256/{check_digest(digest).removeprefix('sha256:')}")

    def _chosen(self, tag: str) -> m.Descriptor:
        path = self._files.path
        data = _small(self._files.open("index.json"), m.MAX_MANIFEST_BYTES)
        found = m.decode_index(data, f"{path}: index.json").manifests
        names = [_layout_names(descriptor) for descriptor in found]
        called = _called(names, tag)
        if not _are_platforms_of_one(called, found, names):
            return found[_choose(names, tag, path)]
        documents = msgspec.json.decode(data)["manifests"]
        self._index = m.encode(
            {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": [documents[at] for at in called]}
        )
        return m.Descriptor(m.OCI_INDEX, m.digest_of(self._index), len(self._index))


class DockerArchive:
    """An image in a tar that `docker save` wrote."""

    def __init__(self, files: Files, tag: str) -> None:
        self._files = files
        data = _small(files.open("manifest.json"), m.MAX_MANIFEST_BYTES)
        images = m.decode(data, list[_Saved], f"{files.path}: manifest.json")
        saved = images[_choose([image.tags or () for image in images], tag, files.path)]
        config = _small(files.open(saved.config), m.MAX_CONFIG_BYTES)
        self._names = {m.digest_of(config): saved.config}
        self._manifest = self._made(config, saved)

    def root(self) -> tuple[bytes, str]:
        """As `Source.root`: a manifest made of what the archive says."""
        return self._manifest, m.DOCKER_MANIFEST

    def manifest(self, digest: str) -> tuple[bytes, str]:
        """As `Source.manifest`; there is only one."""
        return m.verified(self._manifest, digest, f"manifest of {self._files.path}"), m.DOCKER_MANIFEST

    def blob(self, digest: str, size_bytes: int) -> Readable:
        """As `Source.blob`."""
        if digest not in self._names:
            raise NotFound(f"{self._files.path}: no blob {digest}")
        return Verified(self._files.open(self._names[digest]), digest, size_bytes)

    def _made(self, config: bytes, saved: _Saved) -> bytes:
        what = f"{self._files.path}: {saved.config}"
        diff_ids = m.decode(config, m.Config, what).rootfs.diff_ids
        if len(diff_ids) != len(saved.layers):
            raise InvalidInput(f"{what}: {len(diff_ids)} layers, and manifest.json has {len(saved.layers)}")
        layers = [self._layer(name, diff_id) for name, diff_id in zip(saved.layers, diff_ids, strict=True)]
        head = {"mediaType": m.DOCKER_CONFIG, "size": len(config), "digest": m.digest_of(config)}
        return m.encode({"schemaVersion": 2, "mediaType": m.DOCKER_MANIFEST, "config": head, "layers": layers})

    def _layer(self, name: str, diff_id: str) -> m.Document:
        """Docker writes plain tars, whose digest is the diff ID; other programs compress them."""
        size_bytes = self._files.open(name).size_bytes
        digest, media_type = check_digest(diff_id), m.DOCKER_LAYER
        head = memoryview(bytearray(MAGIC_BYTES))
        kind = m.DOCKER_LAYERS.get(compression_of(bytes(head[: self._files.open(name).readinto(head)])))
        if kind is not None:
            digest, media_type = _digest(self._files.open(name)), kind
        self._names[digest] = name
        return {"mediaType": media_type, "size": size_bytes, "digest": digest}


class _Saved(msgspec.Struct, frozen=True):
    config: str = msgspec.field(name="Config")
    layers: tuple[str, ...] = msgspec.field(name="Layers", default=())
    tags: tuple[str, ...] | None = msgspec.field(name="RepoTags", default=None)


def _small(part: Part, limit_bytes: int) -> bytes:
    if part.size_bytes > limit_bytes:
        raise InvalidInput(f"a file of an image's archive has {part.size_bytes} bytes; {limit_bytes} at most are read")
    return read_all(part)


def _digest(part: Part) -> str:
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while count := part.readinto(buffer):
        hasher.update(buffer[:count])
    return f"sha256:{hasher.hexdigest()}"


@dataclass(frozen=True, slots=True)
class _Directory:
    path: Path

    def open(self, name: str) -> Part:
        if os.path.isabs(name) or ".." in name.split("/"):
            raise InvalidInput(f"{self.path}: {name} lies outside of it")
        try:
            fd = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise from_os_error(exc, f"{self.path}: open {name}") from exc
        part = Part(fd, 0, os.fstat(fd).st_size)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput(f"{self.path}: {name} is no regular file")
        return part


@dataclass(frozen=True, slots=True)
class _Tar:
    path: Path
    members: dict[str, tarfile.TarInfo]

    @classmethod
    def read(cls, path: Path) -> _Tar:
        try:
            with tarfile.open(path, "r:") as tar:
                return cls(path, {os.path.normpath(member.name): member for member in tar})
        except tarfile.TarError as exc:
            raise InvalidInput(f"{path}: {exc}; a compressed archive is to be uncompressed first") from exc
        except OSError as exc:
            raise from_os_error(exc, f"read {path}") from exc

    def open(self, name: str) -> Part:
        """Older `docker save`s share layers by symbolic links, and who packs their directory anew by hard links."""
        found = os.path.normpath(name)
        for _ in range(_MAX_LINKS):
            member = self.members.get(found)
            if member is None:
                break
            if member.isreg():
                return Part(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), member.offset_data, member.size)
            origin = os.path.dirname(found) if member.issym() else ""
            found = os.path.normpath(os.path.join(origin, member.linkname))
        raise NotFound(f"{self.path}: no file {name} in it")


def _opened(text: str) -> tuple[Files, str]:
    """``PATH[:TAG]`` as what lies there and the tag, which may have colons of its own."""
    path, tag = text, ""
    while not Path(path).exists() and ":" in path:
        path = path.rpartition(":")[0]
        tag = text[len(path) + 1 :]
    if not Path(path).exists():
        raise NotFound(f"{text}: no such directory or archive")
    return (_Directory(Path(path)) if Path(path).is_dir() else _Tar.read(Path(path))), tag


def _layout_names(descriptor: m.Descriptor) -> tuple[str, ...]:
    annotations = descriptor.annotations or {}
    return tuple(annotations[key] for key in (_REF_NAME, _CONTAINERD_NAME) if key in annotations)


def _choose(names: Sequence[Sequence[str]], tag: str, path: Path) -> int:
    """Which image is meant: the one of that name or tag, or the only one."""
    found = _called(names, tag)
    if len(found) == 1:
        return found[0]
    shown = ", ".join(name for known in names for name in known) or "none with a name"
    wanted = f"{len(found)} of them are called {tag}" if tag else "say which, behind the path and a colon"
    raise InvalidInput(f"{path} holds {len(names)} images ({shown}); {wanted}")


def _called(names: Sequence[Sequence[str]], tag: str) -> list[int]:
    """Which images have that name or tag; all for none."""
    return [at for at, known in enumerate(names) if not tag or any(_is_called(name, tag) for name in known)]


def _are_platforms_of_one(called: Sequence[int], found: Sequence[m.Descriptor], names: Sequence[Sequence[str]]) -> bool:
    """Whether several manifests have the same names, or all none, and differ in their platforms."""
    platforms = {found[at].platform for at in called}
    return len({tuple(names[at]) for at in called}) == 1 < len(called) == len(platforms)


def _is_called(name: str, tag: str) -> bool:
    return tag in (name, name.rpartition(":")[2])
