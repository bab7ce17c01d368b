"""Blobs of a manager (`gear manager`), over HTTP."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Timeout

from gearworkers.errors import (
    AlreadyExists,
    FailedPrecondition,
    GearError,
    IntegrityError,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from gearworkers.remote import blob_stream, encoding
from gearworkers.remote.blobstore import Document
from gearworkers.settings import RemoteSettings
from gearworkers.util.fs import read_small
from gearworkers.util.http_errors import asked_to_wait_s, from_http_error

NODE_HEADER = "Gear-Node"
VERSION_HEADER = "Gear-Version"
MOST_DIGESTS = 10_000
"""What one query or pull may name."""

_CONNECT_S = 5.0
_VERIFY_BYTES_PER_S = 50e6
_LEAST_BYTES_PER_S = 4096
TOKEN = re.compile("[!-~]+")
"""What a bearer token may be."""

_KINDS: dict[int, type[GearError]] = {
    400: InvalidInput,
    401: FailedPrecondition,
    403: FailedPrecondition,
    404: NotFound,
    408: Unavailable,
    409: AlreadyExists,
    422: IntegrityError,
    429: Unavailable,
    507: ResourceExhausted,
}


Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""A digest in lower-case hex."""


class Digests(msgspec.Struct, frozen=True):
    """What a query or a pull names."""

    digests: Annotated[list[Hex], msgspec.Meta(max_length=MOST_DIGESTS)]


class Present(msgspec.Struct, frozen=True):
    """What a query finds."""

    present: list[Hex]


class Problem(msgspec.Struct, frozen=True):
    """The body of an error."""

    error: str


class ManagerStore:
    """A `BlobStore` that is a manager; tries once: for decorators to better.

    At most settings.fetch_threads requests at once. The token file is read for each request.
    """

    def __init__(self, url: str, settings: RemoteSettings, node: str) -> None:
        self._url = url.rstrip("/")
        self._settings = settings
        self._node = node
        self._timeout_s = settings.timeout_s
        self._pool = urllib3.PoolManager(
            maxsize=settings.fetch_threads, block=True, retries=False, ssl_context=_trust(url, settings)
        )

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """One request for MOST_DIGESTS."""
        found: set[bytes] = set()
        for part in _parts(digests):
            body = msgspec.json.encode(Digests([digest.hex() for digest in part]))
            with self._asked("POST", "/v1/query", body=body) as response, self._translated("query"):
                answer = msgspec.json.decode(response.read(), type=Present)
            found.update(bytes.fromhex(digest) for digest in answer.present)
        return found

    def get(self, digest: bytes) -> bytes:
        """One request."""
        with self._asked("GET", f"/v1/blobs/{digest.hex()}") as response, self._translated(f"get {digest.hex()}"):
            size_bytes = int(response.headers["Content-Length"])
            blob = self._read(response, size_bytes)
            if len(blob) < size_bytes:
                raise Unavailable(f"{self._url}: get {digest.hex()}: {len(blob)} of {size_bytes} bytes came")
            return blob

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """One request for MOST_DIGESTS, in the order asked for."""
        for part in _parts(digests):
            body = msgspec.json.encode(Digests([digest.hex() for digest in part]))
            with self._asked("POST", "/v1/pull", body=body) as response:
                yield from self._frames(response)

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """One request."""
        body = b"".join(blob_stream.frame(digest, blob) for digest, blob in blobs)
        timeout_s = self._timeout_s + sum(_size_bytes(digest, blob) for digest, blob in blobs) / _VERIFY_BYTES_PER_S
        with self._asked("POST", "/v1/push", body=body, kind=blob_stream.CONTENT_TYPE, timeout_s=timeout_s):
            pass

    def get_document(self, name: str) -> Document | None:
        """One request."""
        try:
            with self._asked("GET", f"/v1/documents/{name}") as response, self._translated(f"get document {name}"):
                return Document(bytes(response.read()), int(response.headers[VERSION_HEADER]))
        except NotFound:
            return None

    def put_document(self, name: str, document: Document) -> None:
        """One request."""
        with self._asked(
            "PUT",
            f"/v1/documents/{name}",
            body=document.data,
            kind="application/octet-stream",
            headers={VERSION_HEADER: str(document.version)},
        ):
            pass

    def join(self) -> None:
        """Tell the manager of this node; to be told again within a few minutes.

        Raises:
            Unavailable: It does not answer.
        """
        with self._asked("POST", "/v1/join", body=msgspec.json.encode({"node": self._node})):
            pass

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    # -- HTTP

    def _frames(self, response: urllib3.BaseHTTPResponse) -> Iterator[tuple[bytes, bytes]]:
        stream = blob_stream.read_frames(lambda size_bytes: self._read(response, size_bytes))
        while True:
            with self._translated("pull"):
                try:
                    found = next(stream, None)
                except InvalidInput as exc:
                    raise Unavailable(f"{self._url}: {exc}") from exc
            if found is None:
                return
            yield found

    def _read(self, response: urllib3.BaseHTTPResponse, size_bytes: int) -> bytes:
        """So many bytes; fewer only at the end.

        Raises:
            Unavailable: They come, but so slowly that a reader would wait for ever.
        """
        began_s = time.monotonic()
        parts: list[bytes] = []
        left_bytes = size_bytes
        while left_bytes and (data := response.read1(left_bytes)):
            parts.append(data)
            left_bytes -= len(data)
            allowed_s = self._timeout_s + (size_bytes - left_bytes) / _LEAST_BYTES_PER_S
            if left_bytes and time.monotonic() - began_s > allowed_s:
                raise Unavailable(f"{self._url}: {left_bytes} of {size_bytes} bytes missing after {allowed_s:.0f} s")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """The answer of a request that went well; its connection is used again if it was read to the end."""
        sent: dict[str, Any] = {NODE_HEADER: self._node, **self._authorization(), **(headers or {})}
        if body is not None:
            sent["Content-Type"] = kind
        with self._translated(f"{method} {path}"):
            response = self._pool.request(
                method,
                self._url + path,
                body=body,
                headers=sent,
                timeout=Timeout(connect=_CONNECT_S, read=timeout_s or self._timeout_s),
                preload_content=False,
                decode_content=False,
            )
        try:
            if not 200 <= response.status < 300:  # a redirect has taken nothing
                raise self._problem(response, f"{method} {path}")
            yield response
        except BaseException:
            response.close()
            raise
        finally:
            response.release_conn()

    def _authorization(self) -> dict[str, str]:
        token, origin, file = self._settings.token, "GEAR_REMOTE_TOKEN", self._settings.token_file
        if file is not None:
            origin = f"GEAR_REMOTE_TOKEN_FILE={file}"
            try:
                token = read_small(file).decode("latin-1").strip()
            except NotFound as exc:  # what was asked for may be there
                raise FailedPrecondition(f"{origin}: {exc}") from exc
        if not token and file is None:
            return {}
        if not TOKEN.fullmatch(token):  # the header's own error would show it
            raise FailedPrecondition(f"{origin}: one token is needed, a line of letters, digits and signs")
        return {"Authorization": f"Bearer {token}"}

    def _problem(self, response: urllib3.BaseHTTPResponse, tried: str) -> GearError:
        kind = _KINDS.get(response.status) or (Unavailable if response.status >= 500 else InvalidInput)
        if response.status < 400:
            kind, tried = FailedPrecondition, f"{tried}: no manager answers, but something that is in its place"
        try:
            said = msgspec.json.decode(response.read(64 << 10), type=Problem).error
        except (HTTPError, OSError, ValueError):
            said = response.reason or ""
        return kind(f"{self._url}: {tried}: {response.status} {said}").after(asked_to_wait_s(response))

    @contextmanager
    def _translated(self, tried: str) -> Iterator[None]:
        try:
            yield
        except (HTTPError, OSError) as exc:
            raise from_http_error(exc, f"{self._url}: {tried}", "GEAR_REMOTE_CA_FILE") from exc
        except (KeyError, ValueError) as exc:
            raise Unavailable(f"{self._url}: {tried}: not a manager's answer ({exc})") from exc


def _trust(url: str, settings: RemoteSettings) -> ssl.SSLContext | None:
    if not url.startswith("https://"):
        return None
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as exc:
        raise FailedPrecondition(f"GEAR_REMOTE_CA_FILE={settings.ca_file}: {exc}") from exc


def _parts(digests: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (digests[start : start + MOST_DIGESTS] for start in range(0, len(digests), MOST_DIGESTS))


def _size_bytes(digest: bytes, blob: bytes) -> int:
    """What the manager reads to verify it."""
    return encoding.layout_bytes(digest, blob) if encoding.is_layout(blob) else len(blob)
