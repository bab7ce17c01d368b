"""The calls that other processes make on the lazy file server, over its control socket (`lazyfs.control`)."""

from __future__ import annotations

import http.client
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from gearworkers.errors import InvalidInput, Unavailable
from gearworkers.util.unix_http import UnixHTTPConnection

_TIMEOUT_S = 10.0
REPORT_TIMEOUT_S = 1.0
"""Limit for calls at a container's start, which would otherwise wait for a server that hangs."""

_FIND_TIMEOUT_S = 2.0
_FETCH_TIMEOUT_S = 120.0


class LazyStatus(msgspec.Struct, frozen=True):
    """Counters of the lazy file server since it began, and the objects that it cannot fetch."""

    incomplete_layers: int
    lookups: int
    arriving: int
    serving: int
    fetched_objects: int
    received_bytes: int
    reused_bytes: int
    """Bytes of chunks copied from other large objects of this host."""
    failed: int
    corrupt: int
    on_demand: int
    """Requests with a waiting reader: small objects, layouts and chunks."""
    prefetched: int
    """Small objects and chunks that batch requests delivered."""
    prefetched_bytes: int
    profiles_found: int
    profiles_absent: int
    """Images whose containers started here without a known profile."""
    failures: dict[str, str]
    """Digest in hex to error text, for each object whose last fetch failed."""


class PrefetchRequest(msgspec.Struct, frozen=True):
    """Asks to fetch the layers' missing objects in the background."""

    layers: list[str]


class PrefetchReply(msgspec.Struct, frozen=True):
    """The number of missing objects that are being fetched."""

    objects: int


class ImageEvent(msgspec.Struct, frozen=True):
    """Reports an imported layer, or the start of a container of the image with this topmost layer."""

    layer: str
    starts: bool
    command: str = ""
    """The image's command, if known."""


class ProfileStatus(StrEnum):
    """Whether the server knows an image's profile."""

    FOUND = "found"
    ABSENT = "absent"
    UNKNOWN = "unknown"
    """The server has not looked for it yet."""


class ReadsRequest(msgspec.Struct, frozen=True):
    """Asks for the recent reads of these objects, given in hex."""

    objects: list[str]


ReadRanges = dict[str, list[tuple[int, int]]]
"""Digest in hex to (offset, size in bytes) of each read, in order."""


class LayerIndex(msgspec.Struct, frozen=True):
    """The index of an original layer in the remote; see `images.layer_records`."""

    object_digest: bytes
    """The SHA-256 of the index."""
    size_bytes: int
    diff_id: str
    """The digest of the original layer's tar."""
    tar_bytes: int


class FetchIndexRequest(msgspec.Struct, frozen=True):
    """Asks to write an index to a new file."""

    index: LayerIndex
    path: str
    """The file, in a directory of its own in build/."""


class IndexesRequest(msgspec.Struct, frozen=True):
    """Asks for the indexes of layers, given by their digests."""

    layers: list[str]


def read_status(path: Path) -> LazyStatus | None:
    """Return the status of the server at this socket; None if no server runs."""
    try:
        return msgspec.json.decode(_call(path, "GET", "/status", b""), type=LazyStatus)
    except Unavailable:
        return None


def request_prefetch(path: Path, layers: Sequence[str]) -> int:
    """Request the layers' missing objects in the background; return their number.

    Raises:
        Unavailable: No server runs.
    """
    body = msgspec.json.encode(PrefetchRequest(list(layers)))
    return msgspec.json.decode(_call(path, "POST", "/prefetch", body), type=PrefetchReply).objects


def report_image(path: Path, layer: str, *, starts: bool, command: str = "") -> ProfileStatus:
    """Report a layer, so that the server looks for its profile; immediately if a container *starts*.

    The *command* is the image's, if known.

    Raises:
        Unavailable: No server runs, or it does not answer within a second.
    """
    body = msgspec.json.encode(ImageEvent(layer, starts, command))
    return msgspec.json.decode(_call(path, "POST", "/image", body, REPORT_TIMEOUT_S), type=ProfileStatus)


def read_ranges(path: Path, objects: Sequence[str]) -> ReadRanges:
    """Return the recent reads of these objects, given in hex, from the server.

    Raises:
        Unavailable: No server runs.
    """
    body = msgspec.json.encode(ReadsRequest(list(objects)))
    return msgspec.json.decode(_call(path, "POST", "/reads", body), type=ReadRanges)


def find_indexes(path: Path, layers: Sequence[str]) -> dict[str, LayerIndex]:
    """Return the indexes of the original layers that have one in the remote, by the layers' digests.

    Raises:
        Unavailable: No server runs, or it does not answer in time.
    """
    body = msgspec.json.encode(IndexesRequest(list(layers)))
    return msgspec.json.decode(_call(path, "POST", "/indexes", body, _FIND_TIMEOUT_S), type=dict[str, LayerIndex])


def fetch_index(path: Path, index: LayerIndex, target: Path) -> None:
    """Let the server write an index to the new file *target*, in a directory of its own in build/.

    Raises:
        Unavailable: No server runs.
        InvalidInput: The index cannot be fetched.
    """
    body = msgspec.json.encode(FetchIndexRequest(index, str(target)))
    _call(path, "POST", "/fetch-index", body, _FETCH_TIMEOUT_S)


def _call(path: Path, method: str, url: str, body: bytes, timeout_s: float = _TIMEOUT_S) -> bytes:
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
