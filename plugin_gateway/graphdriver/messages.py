"""Requests and answers of the graphdriver plugin protocol.

Source: moby daemon/graphdriver/proxy.go and pkg/plugins; where docs/extend/plugins_graphdriver.md differs (the nested
Capabilities, the names in an id map) this is what the code of 20.10 to 27 sends.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from gearworkers.errors import InvalidInput
from gearworkers.layers.diff.changes import Change
from gearworkers.layers.idmap import IDMap

CONTENT_TYPE = "application/vnd.docker.plugins.v1.1+json"


class LayerRequest(msgspec.Struct, frozen=True, rename="pascal"):
    """Of every call but Init. dockerd leaves out what is empty."""

    id: str = msgspec.field(default="", name="ID")
    parent: str = ""
    mount_label: str = ""
    storage_opt: dict[str, str] | None = None
    """Of Create and CreateReadWrite: `docker run --storage-opt`."""


class InitRequest(msgspec.Struct, frozen=True, rename="pascal"):
    """A dockerd has started. Go writes an empty list as null."""

    home: str = ""
    opts: list[str] | None = None
    uid_maps: list[IDMap] | None = msgspec.field(default=None, name="UIDMaps")
    gid_maps: list[IDMap] | None = msgspec.field(default=None, name="GIDMaps")


class WireChange(msgspec.Struct, frozen=True, rename="pascal"):
    """One path that differs."""

    path: str
    kind: int
    """0 modified, 1 added, 2 deleted."""


class Response(msgspec.Struct, frozen=True, rename="pascal", omit_defaults=True):
    """Of every call: what it gives, or Err."""

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
    """The body is not JSON, or not of the call's shape."""


Request = TypeVar("Request", LayerRequest, InitRequest)


def decode(body: bytes, type: type[Request]) -> Request:
    """The request in *body*; an empty one is that of a call without arguments.

    Raises:
        MalformedRequest: It is not JSON, or not of that shape.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=type)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise MalformedRequest(f"the request's body is not what the call takes: {exc}") from exc


def encode(response: Response) -> bytes:
    """The answer as it goes to Docker; Go's decoder wants no more than valid UTF-8."""
    return msgspec.json.encode(response)


def failure(message: str) -> Response:
    """The answer that says what went wrong; what is not Unicode in it, as a file's name, becomes question marks."""
    return Response(err=message.encode("utf-8", "replace").decode())


def error(message: str) -> bytes:
    """The same as it goes to Docker."""
    return encode(failure(message))


def wire_change(change: Change) -> WireChange:
    """A change as JSON can carry it: bytes that are not UTF-8 become the replacement character."""
    return WireChange(change.path.decode("utf-8", "replace"), int(change.kind))
