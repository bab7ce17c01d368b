"""What others ask of the lazy file server, over its control socket (`lazyfs.control`)."""

from __future__ import annotations

import http.client
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from gearworkers.errors import InvalidInput, Unavailable
from gearworkers.util.unix_http import UnixHTTPConnection

_TIMEOUT_S = 10.0
_TELL_TIMEOUT_S = 1.0
"""Nobody who starts a container waits longer for a server that hangs."""


class LazyStatus(msgspec.Struct, frozen=True):
    """What the lazy file server has done since it began, and what it cannot get."""

    incomplete_layers: int
    lookups: int
    arriving: int
    serving: int
    fetched_objects: int
    received_bytes: int
    reused_bytes: int
    """Of chunks that another large object of this host had."""
    failed: int
    corrupt: int
    on_demand: int
    """Requests that somebody waited for: small objects, layouts and chunks."""
    prefetched: int
    """Small objects and chunks that came in requests for many."""
    prefetched_bytes: int
    profiles_found: int
    profiles_absent: int
    """Images whose containers have started here though no profile of them was known."""
    failures: dict[str, str]
    """Digest in hex to why, of the objects whose last fetch failed."""


class Layers(msgspec.Struct, frozen=True):
    """Order: have the layers' missing objects fetched behind what containers read."""

    layers: list[str]


class Coming(msgspec.Struct, frozen=True):
    """How many objects are missing and will come."""

    objects: int


class Image(msgspec.Struct, frozen=True):
    """News: this layer is here, or a container begins whose image's topmost layer it is."""

    layer: str
    starts: bool


class Known(StrEnum):
    """What the server knows of an image's profile."""

    FOUND = "found"
    ABSENT = "absent"
    UNKNOWN = "unknown"


class Objects(msgspec.Struct, frozen=True):
    """Question: which parts of these objects, in hex, were read before they were here."""

    objects: list[str]


Reads = dict[str, list[tuple[int, int]]]
"""Of objects in hex: (offset, size in bytes) in the order of reading."""


def read_status(path: Path) -> LazyStatus | None:
    """What the server at this socket tells; None if none runs."""
    try:
        return msgspec.json.decode(_ask(path, "GET", "/status", b""), type=LazyStatus)
    except Unavailable:
        return None


def order_prefetch(path: Path, layers: Sequence[str]) -> int:
    """Have the layers' missing objects fetched behind what containers read; how many they are.

    Raises:
        Unavailable: No server runs.
    """
    body = msgspec.json.encode(Layers(list(layers)))
    return msgspec.json.decode(_ask(path, "POST", "/prefetch", body), type=Coming).objects


def tell(path: Path, layer: str, *, starts: bool) -> Known:
    """Tell the server of a layer that is here, so that its profile is looked for; at once if a container *starts*.

    Raises:
        Unavailable: No server runs, or it does not answer within a second.
    """
    body = msgspec.json.encode(Image(layer, starts))
    return msgspec.json.decode(_ask(path, "POST", "/image", body, _TELL_TIMEOUT_S), type=Known)


def read_parts(path: Path, objects: Sequence[str]) -> Reads:
    """Which parts of these objects, in hex, were read through the server.

    Raises:
        Unavailable: No server runs.
    """
    return msgspec.json.decode(_ask(path, "POST", "/reads", msgspec.json.encode(Objects(list(objects)))), type=Reads)


def _ask(path: Path, method: str, url: str, body: bytes, timeout_s: float = _TIMEOUT_S) -> bytes:
    connection = UnixHTTPConnection(path, timeout_s)
    try:
        connection.request(method, url, body)
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise Unavailable(f"the lazy file server does not answer at {path} ({exc}); start `gear lazyfs`") from exc
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise InvalidInput(f"{method} {url}: {content.decode(errors='replace')}")
    return content
