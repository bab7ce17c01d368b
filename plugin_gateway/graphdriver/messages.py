"""Requests and responses of the graphdriver plugin protocol.

Source: moby daemon/graphdriver/proxy.go and pkg/plugins. Where docs/extend/plugins_graphdriver.md differs (the nested
Capabilities, the names in an id map), this module follows the code of Docker 20.10 to 27.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from gearworkers.errors import InvalidInput
from gearworkers.layers.diff.changes import Change
from gearworkers.layers.idmap import IdRange

CONTENT_TYPE = "application/vnd.docker.plugins.v1.1+json"


class LayerRequest(msgspec.Struct, frozen=True, rename="pascal"):
    """The request of every call but Init. dockerd omits empty fields."""

    id: str = msgspec.field(default="", name="ID")
    parent: str = ""
    mount_label: str = ""
    storage_opt: dict[str, str] | None = None
    """`docker run --storage-opt`, in Create and CreateReadWrite."""


class InitRequest(msgspec.Struct, frozen=True, rename="pascal"):
    """The request of Init. Go writes an empty list as null."""

    home: str = ""
    opts: list[str] | None = None
    uid_maps: list[IdRange] | None = msgspec.field(default=None, name="UIDMaps")
    gid_maps: list[IdRange] | None = msgspec.field(default=None, name="GIDMaps")


class WireChange(msgspec.Struct, frozen=True, rename="pascal"):
    """A changed path, in JSON."""

    path: str
    kind: int
    """0 modified, 1 added, 2 deleted."""


class Response(msgspec.Struct, frozen=True, rename="pascal", omit_defaults=True):
    """The response to every call: its result, or Err."""

    err: str = ""
    dir: str = ""
    exists: bool = False
    status: list[tuple[str, str]] = []
    changes: list[WireChange] = []
    size: int = 0
    metadata: dict[str, str] = {}
    capabilities: dict[str, bool] = {}
    implements: list[str] = []


class MalformedRequest(InvalidInput):
    """The body is not JSON, or does not have the fields of the call."""


Request = TypeVar("Request", LayerRequest, InitRequest)


def decode(body: bytes, type: type[Request]) -> Request:
    """Return the request in *body*; an empty body is a call without arguments.

    Raises:
        MalformedRequest: The body is malformed.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=type)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise MalformedRequest(f"malformed request body: {exc}") from exc


def encode(response: Response) -> bytes:
    """Return the response's JSON, which is valid UTF-8, as Go's decoder requires."""
    return msgspec.json.encode(response)


def failure(message: str) -> Response:
    """Return the response with an error message; bytes that are not Unicode become question marks."""
    return Response(err=message.encode("utf-8", "replace").decode())


def error(message: str) -> bytes:
    """Return the JSON of `failure`."""
    return encode(failure(message))


def wire_change(change: Change) -> WireChange:
    """Return the change for JSON; bytes that are not UTF-8 become the replacement character."""
    return WireChange(change.path.decode("utf-8", "replace"), int(change.kind))
