"""dockerd's API, for the commands that take the name of an image or a container: it maps names to layers.

Only dockerd knows which layer belongs to which image or container. Its API reveals the layer, since it includes the
answer of the driver's GetMetadata. If dockerd uses containerd's image store, it reveals the names of the snapshots:
the chain ID of an image, the id of a container.

Source: Docker Engine API v1.40, "Inspect an image", "Inspect a container", "Get system information", "Export an image".
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from gearworkers.cli.containerd_images import snapshot_layer
from gearworkers.cli.local_images import LocalImage
from gearworkers.containerd.config import SNAPSHOTTER, SNAPSHOTTER_TYPE
from gearworkers.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable
from gearworkers.images.manifest import RunConfig, chain_id, decode
from gearworkers.settings import NodeSettings
from gearworkers.util.unix_http import UnixHTTPConnection

_TIMEOUT_S = 30.0
_SAVE_TIMEOUT_S = 600.0
"""dockerd writes the layers to its own disk before it sends the first byte."""
_COPY_BYTES = 1 << 20
_T = TypeVar("_T")


class _Driver(msgspec.Struct, frozen=True):
    name: str = msgspec.field(name="Name", default="")
    data: dict[str, str] = msgspec.field(name="Data", default_factory=dict)


class _ListedContainer(msgspec.Struct, frozen=True):
    id: str = msgspec.field(name="Id")
    names: list[str] = msgspec.field(name="Names", default_factory=list)


class _RootFs(msgspec.Struct, frozen=True):
    layers: tuple[str, ...] = msgspec.field(name="Layers", default=())
    """Diff IDs."""


class _Namespaces(msgspec.Struct, frozen=True):
    containers: str = msgspec.field(name="Containers", default="moby")


class _Containerd(msgspec.Struct, frozen=True):
    namespaces: _Namespaces = msgspec.field(name="Namespaces", default_factory=_Namespaces)


class DockerInfo(msgspec.Struct, frozen=True):
    """dockerd's version, and where it stores images."""

    version: str = msgspec.field(name="ServerVersion", default="")
    experimental: bool = msgspec.field(name="ExperimentalBuild", default=False)
    driver: str = msgspec.field(name="Driver", default="")
    """The storage driver; the snapshotter if dockerd uses containerd's image store."""
    driver_status: tuple[tuple[str, str], ...] | None = msgspec.field(name="DriverStatus", default=())
    containerd: _Containerd = msgspec.field(name="Containerd", default_factory=_Containerd)
    """From API 1.46 on."""

    @property
    def uses_snapshotter(self) -> bool:
        """Whether dockerd uses containerd's image store."""
        return any(value == SNAPSHOTTER_TYPE for _, value in self.driver_status or ())


class _Refusal(msgspec.Struct, frozen=True):
    message: str = ""


class _Inspected(msgspec.Struct, frozen=True):
    id: str = msgspec.field(name="Id")
    rootfs: _RootFs = msgspec.field(name="RootFS", default_factory=_RootFs)
    driver: _Driver = msgspec.field(name="GraphDriver", default_factory=_Driver)
    config: RunConfig | None = msgspec.field(name="Config", default=None)


class Dockerd:
    """The dockerd at DOCKER_HOST; a `local_images.Daemon`.

    It has the driver's layers, or containerd's snapshots if it uses containerd's image store.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._host = settings.docker_host

    def __str__(self) -> str:
        return f"dockerd at {self._host}"

    def info(self) -> DockerInfo:
        """Describe dockerd.

        Raises:
            Unavailable: No dockerd answers.
            InvalidInput: DOCKER_HOST is malformed.
        """
        return self._answer("/info", DockerInfo) or DockerInfo()

    def image(self, name: str) -> LocalImage | None:
        """As `Daemon.image`."""
        found = self._inspected("images", name)
        if found is None:
            return None
        is_gear = found.config is not None and found.config.is_gear
        return LocalImage(found.id, is_gear, self._layer(found, name, chain_id(found.rootfs.layers)))

    def container_layer(self, name: str) -> str | None:
        """As `Daemon.container_layer`."""
        found = self._inspected("containers", name)
        return None if found is None else self._layer(found, name, found.id)

    def container_names(self) -> dict[str, str]:
        """Return the names of the running containers, by the engine's ids of their layers; errors as `Daemon`."""
        listed = self._answer("/containers/json", tuple[_ListedContainer, ...]) or ()
        names = {}
        for container in listed:
            layer = self.container_layer(container.id)
            if layer:
                names[layer] = container.names[0].removeprefix("/") if container.names else container.id[:12]
        return names

    def save(self, name: str, file: BinaryIO) -> None:
        """Write the image *name* to *file*, as `docker save` does.

        Raises:
            NotFound: dockerd does not have it.
            Unavailable, InvalidInput: As `Daemon`.
            OSError: The file cannot be written.
        """
        with self._response(f"/images/{_in_path(name)}/get", _SAVE_TIMEOUT_S) as response:
            if response.status == http.HTTPStatus.NOT_FOUND:
                raise NotFound(f"{self} does not have {name}")
            if response.status != http.HTTPStatus.OK:
                raise InvalidInput(f"dockerd: {name}: {self._read(response).decode(errors='replace')}")
            while piece := self._read(response, _COPY_BYTES):
                file.write(piece)
        file.flush()

    def _layer(self, found: _Inspected, name: str, snapshot: str) -> str:
        """Return the id of the layer of an image or a container.

        The graphdriver's answer includes ``UpperDir``, a directory inside the layer's.

        Args:
            found: dockerd's answer.
            name: Of the image or container, for messages.
            snapshot: The name of containerd's snapshot, if dockerd uses containerd's image store.
        """
        upper = found.driver.data.get("UpperDir")
        if not upper:
            return self._layer_of_snapshot(snapshot, name)
        layer = Path(upper).parent
        if layer.parent not in (self._settings.gear_images_path, self._settings.gear_containers_path):
            raise FailedPrecondition(
                f"{name} is stored by driver {found.driver.name} at {upper}, not in GEAR_ROOT="
                f"{self._settings.gear_root}; set DOCKER_HOST to the dockerd that uses gearworkers, and GEAR_ROOT to "
                "its directory"
            )
        return layer.name

    def _layer_of_snapshot(self, snapshot: str, name: str) -> str:
        info = self.info()
        if not info.uses_snapshotter:
            return ""  # the graphdriver has no layer for an image without layers
        if info.driver != SNAPSHOTTER:
            raise FailedPrecondition(f"{name} is stored by dockerd's snapshotter {info.driver}, not by {SNAPSHOTTER}")
        return snapshot_layer(self._settings, info.containerd.namespaces.containers, snapshot, name)

    def _inspected(self, kind: str, name: str) -> _Inspected | None:
        return self._answer(f"/{kind}/{_in_path(name)}/json", _Inspected, name)

    def _answer(self, path: str, of: type[_T], name: str = "") -> _T | None:
        """Return the answer to a request; None if dockerd has no such image or container."""
        with self._response(path, _TIMEOUT_S) as response:
            body = self._read(response)
        if response.status == http.HTTPStatus.NOT_FOUND:
            return None
        if response.status != http.HTTPStatus.OK:
            raise InvalidInput(f"dockerd: {name or path}: {self._decoded(body, _Refusal).message}")
        return self._decoded(body, of)

    def _decoded(self, body: bytes, of: type[_T]) -> _T:
        try:
            return decode(body, of, f"cannot read the answer of {self}")
        except InvalidInput as exc:
            raise Unavailable(str(exc)) from exc

    @contextmanager
    def _response(self, path: str, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
        connection = _connection(self._host, timeout_s)
        try:
            with self._errors_translated():
                connection.request("GET", path)
                response = connection.getresponse()
            yield response
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse, size_bytes: int | None = None) -> bytes:
        with self._errors_translated():
            return response.read(size_bytes)

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException) as exc:
            raise Unavailable(f"no dockerd answers at {self._host}: {exc}") from exc


def _in_path(name: str) -> str:
    return quote(name, safe="/:@")


def _connection(docker_host: str, timeout_s: float) -> http.client.HTTPConnection:
    with suppress(ValueError):  # a malformed port or IPv6 address
        parts = urlsplit(docker_host)
        if parts.scheme == "unix":
            return UnixHTTPConnection(parts.path, timeout_s)
        if parts.scheme == "tcp" and parts.hostname:
            return http.client.HTTPConnection(parts.hostname, parts.port or 2375, timeout=timeout_s)
    raise InvalidInput(f"DOCKER_HOST={docker_host}: set unix:///PATH or tcp://HOST:PORT")
