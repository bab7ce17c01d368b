"""dockerd's API, for the commands that take the name of an image or a container: it maps names to layers.

Only dockerd knows which layer belongs to which image or container. Its API reveals the layer, since it includes the
answer of the driver's GetMetadata.

Source: Docker Engine API v1.40, "Inspect an image", "Inspect a container".
"""

from __future__ import annotations

import http.client
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

import msgspec

from gearworkers.errors import FailedPrecondition, InvalidInput, Unavailable
from gearworkers.images.manifest import RunConfig
from gearworkers.settings import NodeSettings
from gearworkers.util.unix_http import UnixHTTPConnection

_TIMEOUT_S = 30.0
_SNAPSHOTTER_TYPE = "io.containerd.snapshotter.v1"


class _Driver(msgspec.Struct, frozen=True):
    name: str = msgspec.field(name="Name", default="")
    data: dict[str, str] | None = msgspec.field(name="Data", default=None)


class _ListedContainer(msgspec.Struct, frozen=True):
    id: str = msgspec.field(name="Id")
    names: list[str] = msgspec.field(name="Names", default_factory=list)


class _Inspected(msgspec.Struct, frozen=True):
    id: str = msgspec.field(name="Id")
    driver: _Driver = msgspec.field(name="GraphDriver", default_factory=_Driver)
    config: RunConfig | None = msgspec.field(name="Config", default=None)


class DockerInfo(msgspec.Struct, frozen=True):
    """dockerd's version, and where it stores images."""

    version: str = msgspec.field(name="ServerVersion", default="")
    experimental: bool = msgspec.field(name="ExperimentalBuild", default=False)
    driver: str = msgspec.field(name="Driver", default="")
    """The storage driver; the snapshotter if dockerd uses containerd's image store."""
    driver_status: list[tuple[str, str]] | None = msgspec.field(name="DriverStatus", default=None)

    @property
    def uses_snapshotter(self) -> bool:
        """Whether dockerd uses containerd's image store."""
        return any(value == _SNAPSHOTTER_TYPE for _, value in self.driver_status or ())


class LocalImage(msgspec.Struct, frozen=True):
    """An image that dockerd has stored in this node's GEAR_ROOT."""

    id: str
    """``sha256:…`` of the image's config."""
    is_gear: bool
    top_layer: str
    """The driver's id of the topmost layer; empty for an image without layers."""


def docker_info(settings: NodeSettings) -> DockerInfo:
    """Describe dockerd.

    Raises:
        Unavailable: No dockerd answers.
        InvalidInput: DOCKER_HOST is malformed.
    """
    _, body = _get(settings.docker_host, "/info")
    try:
        return msgspec.json.decode(body, type=DockerInfo)
    except msgspec.MsgspecError as exc:
        raise Unavailable(f"cannot read the answer of dockerd at {settings.docker_host}: {exc}") from exc


def local_image(settings: NodeSettings, name: str) -> LocalImage | None:
    """Return the image that dockerd knows by *name*, a reference or an id; None if it has none.

    Raises:
        Unavailable: No dockerd answers.
        FailedPrecondition: The image is not stored in this GEAR_ROOT.
        InvalidInput: dockerd rejects the name, or DOCKER_HOST is malformed.
    """
    found = _inspected(settings, "images", name)
    if found is None:
        return None
    is_gear = found.config is not None and found.config.is_gear
    return LocalImage(found.id, is_gear, _top_layer(settings, found, name))


def image_layer(settings: NodeSettings, name: str) -> str | None:
    """Return the driver's id of the image's topmost layer; None and errors as `local_image`."""
    image = local_image(settings, name)
    return None if image is None else image.top_layer


def container_layer(settings: NodeSettings, name: str) -> str | None:
    """Return the driver's id of the layer of the container *name*, a name or an id; None if dockerd does not know it.

    Raises:
        Unavailable, FailedPrecondition, InvalidInput: As `local_image`.
    """
    found = _inspected(settings, "containers", name)
    return None if found is None else _top_layer(settings, found, name)


def container_names(settings: NodeSettings) -> dict[str, str]:
    """Return the names of the running containers in this GEAR_ROOT, by the driver's ids of their layers.

    Raises:
        Unavailable, FailedPrecondition, InvalidInput: As `local_image`.
    """
    status, body = _get(settings.docker_host, "/containers/json")
    try:
        listed = msgspec.json.decode(body, type=list[_ListedContainer]) if status == http.HTTPStatus.OK else []
    except msgspec.MsgspecError as exc:
        raise Unavailable(f"cannot read the answer of dockerd at {settings.docker_host}: {exc}") from exc
    names = {}
    for container in listed:
        layer = container_layer(settings, container.id)
        if layer:
            names[layer] = container.names[0].removeprefix("/") if container.names else container.id[:12]
    return names


def _inspected(settings: NodeSettings, kind: str, name: str) -> _Inspected | None:
    status, body = _get(settings.docker_host, f"/{kind}/{quote(name, safe='/:@')}/json")
    if status == http.HTTPStatus.NOT_FOUND:
        return None
    try:
        if status != http.HTTPStatus.OK:
            raise InvalidInput(f"dockerd: {name}: {msgspec.json.decode(body)['message']}")
        return msgspec.json.decode(body, type=_Inspected)
    except (msgspec.MsgspecError, KeyError, TypeError) as exc:
        raise Unavailable(f"cannot read the answer of dockerd at {settings.docker_host}: {exc}") from exc


def _top_layer(settings: NodeSettings, found: _Inspected, name: str) -> str:
    """Return the layer's id; dockerd shows ``UpperDir``, a directory inside the layer's."""
    upper = (found.driver.data or {}).get("UpperDir")
    if not upper:
        return ""
    layer = Path(upper).parent
    if layer.parent not in (settings.gear_images_path, settings.gear_containers_path):
        raise FailedPrecondition(
            f"{name} is stored by driver {found.driver.name} at {upper}, not in GEAR_ROOT={settings.gear_root}; "
            "set DOCKER_HOST to the dockerd that uses the gear driver, and GEAR_ROOT to that driver's directory"
        )
    return layer.name


def _get(docker_host: str, path: str) -> tuple[int, bytes]:
    connection = _connection(docker_host)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise Unavailable(f"no dockerd answers at {docker_host}: {exc}") from exc
    finally:
        connection.close()


def _connection(docker_host: str) -> http.client.HTTPConnection:
    with suppress(ValueError):  # a malformed port or IPv6 address
        parts = urlsplit(docker_host)
        if parts.scheme == "unix":
            return UnixHTTPConnection(parts.path, _TIMEOUT_S)
        if parts.scheme == "tcp" and parts.hostname:
            return http.client.HTTPConnection(parts.hostname, parts.port or 2375, timeout=_TIMEOUT_S)
    raise InvalidInput(f"DOCKER_HOST={docker_host}: set unix:///PATH or tcp://HOST:PORT")
