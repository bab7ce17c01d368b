"""containerd's images and containers, for the commands that take their names.

An image's name leads to its manifest, its config, the diff IDs and the chain ID, which is the name of the topmost
snapshot. The gateway knows the layer of each snapshot; containerd does not.

Source: containerd's api/services; OCI image-spec v1.1, config.md, "Layer ChainID".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from gearworkers.cli.local_images import LocalImage
from gearworkers.containerd.config import SNAPSHOTTER
from gearworkers.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable
from gearworkers.images.manifest import chain_id
from gearworkers.images.reference import Reference
from gearworkers.images.source import CONTENT, open_source
from gearworkers.images.survey import survey
from gearworkers.settings import NodeSettings, RegistrySettings

if TYPE_CHECKING:
    from gearworkers.containerd.client import Client

_DIGITS = re.compile(r"(?:sha256:)?([0-9a-f]{12,64})")
"""Ids as nerdctl and crictl print them, shortened or whole."""
_NERDCTL_NAME = "nerdctl/name"


class StoredImage(NamedTuple):
    """An image in containerd's content store."""

    digest: str
    """Of its manifest or index."""
    source: str
    """Its name as `open_source` takes it."""


class Containerd:
    """The containerd at CONTAINERD_ADDRESS, in one namespace; a `local_images.Daemon`."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._namespace = settings.containerd_namespace

    def __str__(self) -> str:
        return f"containerd at {self._settings.containerd_address} (namespace {self._namespace})"

    def image(self, name: str) -> LocalImage | None:
        """As `Daemon.image`. A short name is completed as Docker does; an id is a target's or a config's digest."""
        found = self.stored(name)
        if found is None:
            return None
        image = open_source(RegistrySettings(), found.source)
        config = survey(image, name, None, all_platforms=False).images[0].config
        top = chain_id(config.rootfs.diff_ids)
        return LocalImage(found.digest, config.is_gear, snapshot_layer(self._settings, self._namespace, top, name))

    def stored(self, name: str) -> StoredImage | None:
        """Return where containerd has the image; None if it does not have it.

        Raises:
            Unavailable, InvalidInput: As `Daemon`; or an id is that of several images.
        """
        with self._connected() as client:
            images = client.images(*_image_filters(name))
            named = {image.name: image.target.digest for image in images}
            digests = {named[known] for known in _full_names(name) if known in named} or set(named.values())
            if not digests:
                return None
            if len(digests) > 1:
                raise InvalidInput(f"{name}: {self} has several such images: {', '.join(sorted(named))}")
            (digest,) = digests
            return StoredImage(digest, f"{CONTENT}{client.content_directory()}@{digest}")

    def container_layer(self, name: str) -> str | None:
        """As `Daemon.container_layer`; a name is one that nerdctl has given."""
        with self._connected() as client:
            containers = client.containers(*_container_filters(name))
        exact = [container for container in containers if container.id == name] or containers
        if not exact:
            return None
        if len(exact) > 1:
            raise InvalidInput(f"{name}: {self} has several such containers: {', '.join(one.id for one in exact)}")
        return snapshot_layer(self._settings, self._namespace, exact[0].snapshot_key, name)

    @contextmanager
    def _connected(self) -> Iterator[Client]:
        address = self._settings.containerd_address
        if not _exists(address):
            raise Unavailable(f"no containerd answers at {address}")
        from gearworkers.containerd.client import connected  # gRPC takes long to import

        with connected(address, self._namespace) as client:
            yield client


def snapshot_layer(settings: NodeSettings, namespace: str, key: str, name: str) -> str:
    """Return the engine's id of the layer of a snapshot of containerd.

    Args:
        settings: With GEAR_ROOT and the gateway's socket.
        namespace: containerd's.
        key: Of the snapshot; empty for none.
        name: Of the image or container, for messages.

    Raises:
        FailedPrecondition: Another snapshotter or GEAR_ROOT has the image or container, or the gateway does not answer.
    """
    if not key:
        return ""
    socket = settings.effective_containerd_socket
    if socket is None:
        raise FailedPrecondition(f"{name} is in containerd, but GEAR_CONTAINERD_SOCKET is off")
    from gearworkers.containerd.client import GATEWAY, connected

    try:
        with connected(socket, namespace, server=GATEWAY) as gateway:
            found = gateway.find_layer(key)
    except NotFound as exc:
        raise FailedPrecondition(
            f"{name} is in containerd's namespace {namespace}, but the snapshotter {SNAPSHOTTER} has not unpacked it"
        ) from exc
    except Unavailable as exc:
        raise FailedPrecondition(f"{name} is in containerd's namespace {namespace}, but {exc}") from exc
    if Path(found.root).resolve() != settings.gear_root.resolve():
        raise FailedPrecondition(f"{name} is stored in {found.root}, not in GEAR_ROOT={settings.gear_root}")
    return found.layer


def _image_filters(name: str) -> list[str]:
    filters = [f"name=={_quoted(known)}" for known in _full_names(name)]
    if digits := _DIGITS.fullmatch(name):
        prefix = _quoted(f"^sha256:{digits[1]}")
        filters += [f"target.digest~={prefix}", f"name~={prefix}"]  # the CRI also names an image by its config
    return filters


def _container_filters(name: str) -> list[str]:
    filters = [f"id=={_quoted(name)}", f"labels.{_quoted(_NERDCTL_NAME)}=={_quoted(name)}"]
    return [*filters, f"id~={_quoted(f'^{name}')}"] if _DIGITS.fullmatch(name) else filters


def _full_names(name: str) -> list[str]:
    """Return the names that an image may have: the given one, and the one with registry and tag."""
    try:
        return [name, str(Reference.parse(name))]
    except InvalidInput:
        return [name]


def _quoted(text: str) -> str:
    """Quote a value of a filter, which has the syntax of Go's strings."""
    return msgspec.json.encode(text).decode()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as exc:
        raise Unavailable(f"{exc}; run `gear` as root") from exc
