"""Blobs of a manager (`gear manager`), over HTTP."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
from gearworkers.remote.manager_messages import (
    MAX_DIGESTS,
    NODE_HEADER,
    VERSION_HEADER,
    Digests,
    Present,
    Problem,
)
from gearworkers.remote.name import remote_name
from gearworkers.settings import RemoteSettings
from gearworkers.util.bearer_token import BEARER_TOKEN
from gearworkers.util.fs import read_small
from gearworkers.util.http_errors import from_http_error, retry_after_s

_CONNECT_S = 5.0
_VERIFY_BYTES_PER_S = 50e6
_MIN_BYTES_PER_S = 4096

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


class ManagerStore:
    """A `BlobStore` that is a manager; it does not retry.

    It sends at most settings.fetch_threads requests at once, each with timeouts. It reads the token file for each
    request.
    """

    def __init__(self, url: str, settings: RemoteSettings, node: str) -> None:
        self._url = url.rstrip("/")
        self._name = remote_name(url)
        self._settings = settings
        self._node = node
        self._timeout_s = settings.timeout_s
        self._pool = urllib3.PoolManager(
            maxsize=settings.fetch_threads, block=True, retries=False, ssl_context=_ssl_context(url, settings)
        )

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Send one request for each MAX_DIGESTS."""
        found: set[bytes] = set()
        for batch in _batches(digests):
            body = msgspec.json.encode(Digests([digest.hex() for digest in batch]))
            with self._response("POST", "/v1/query", body=body) as response, self._translated("query"):
                answer = msgspec.json.decode(response.read(), type=Present)
            found.update(bytes.fromhex(digest) for digest in answer.present)
        return found

    def get(self, digest: bytes) -> bytes:
        """Send one request."""
        with self._response("GET", f"/v1/blobs/{digest.hex()}") as response, self._translated(f"get {digest.hex()}"):
            size_bytes = int(response.headers["Content-Length"])
            blob = self._read(response, size_bytes)
            if len(blob) < size_bytes:
                raise Unavailable(f"{self._name}: get {digest.hex()}: received {len(blob)} of {size_bytes} bytes")
            return blob

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Send one request for each MAX_DIGESTS; the blobs come in the order of *digests*."""
        for batch in _batches(digests):
            body = msgspec.json.encode(Digests([digest.hex() for digest in batch]))
            with self._response("POST", "/v1/pull", body=body) as response:
                yield from self._blobs(response)

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Send one request."""
        body = b"".join(blob_stream.frame(digest, blob) for digest, blob in blobs)
        timeout_s = self._timeout_s + sum(_verified_bytes(digest, blob) for digest, blob in blobs) / _VERIFY_BYTES_PER_S
        with self._response("POST", "/v1/push", body=body, kind=blob_stream.CONTENT_TYPE, timeout_s=timeout_s):
            pass

    def get_document(self, name: str) -> Document | None:
        """Send one request."""
        try:
            with self._response("GET", f"/v1/documents/{name}") as response, self._translated(f"get document {name}"):
                return Document(bytes(response.read()), int(response.headers[VERSION_HEADER]))
        except NotFound:
            return None

    def put_document(self, name: str, document: Document) -> None:
        """Send one request."""
        with self._response(
            "PUT",
            f"/v1/documents/{name}",
            body=document.data,
            kind="application/octet-stream",
            headers={VERSION_HEADER: str(document.version)},
        ):
            pass

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    # -- HTTP

    def _blobs(self, response: urllib3.BaseHTTPResponse) -> Iterator[tuple[bytes, bytes]]:
        stream = blob_stream.read_blobs(lambda size_bytes: self._read(response, size_bytes))
        while True:
            with self._translated("pull"):
                try:
                    found = next(stream, None)
                except InvalidInput as exc:
                    raise Unavailable(f"{self._name}: {exc}") from exc
            if found is None:
                return
            yield found

    def _read(self, response: urllib3.BaseHTTPResponse, size_bytes: int) -> bytes:
        """Return that many bytes; fewer only at the end.

        Raises:
            Unavailable: They arrive more slowly than _MIN_BYTES_PER_S.
        """
        started_s = time.monotonic()
        parts: list[bytes] = []
        missing_bytes = size_bytes
        while missing_bytes and (data := response.read1(missing_bytes)):
            parts.append(data)
            missing_bytes -= len(data)
            allowed_s = self._timeout_s + (size_bytes - missing_bytes) / _MIN_BYTES_PER_S
            if missing_bytes and time.monotonic() - started_s > allowed_s:
                raise Unavailable(
                    f"{self._name}: {missing_bytes} of {size_bytes} bytes missing after {allowed_s:.0f} s"
                )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @contextmanager
    def _response(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """Yield the response of a successful request; if the caller reads all of it, the connection is used again."""
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
            if not 200 <= response.status < 300:  # a redirect is an error: the request was not executed
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
            except NotFound as exc:  # NotFound would mean that the remote lacks the object
                raise FailedPrecondition(f"{origin}: {exc}") from exc
        if not token and file is None:
            return {}
        if not BEARER_TOKEN.fullmatch(token):  # the error of an invalid header would contain the token
            raise FailedPrecondition(f"{origin}: a single token of printable ASCII characters without spaces is needed")
        return {"Authorization": f"Bearer {token}"}

    def _problem(self, response: urllib3.BaseHTTPResponse, tried: str) -> GearError:
        kind = _KINDS.get(response.status) or (Unavailable if response.status >= 500 else InvalidInput)
        if response.status < 400:
            kind, tried = FailedPrecondition, f"{tried}: the server is not a manager; check GEAR_REMOTE"
        try:
            message = msgspec.json.decode(response.read(64 << 10), type=Problem).error
        except (HTTPError, OSError, ValueError):
            message = response.reason or ""
        return kind(f"{self._name}: {tried}: {response.status} {message}").with_retry_after(retry_after_s(response))

    @contextmanager
    def _translated(self, tried: str) -> Iterator[None]:
        try:
            yield
        except (HTTPError, OSError) as exc:
            raise from_http_error(exc, f"{self._name}: {tried}", "GEAR_REMOTE_CA_FILE") from exc
        except (KeyError, ValueError) as exc:
            raise Unavailable(f"{self._name}: {tried}: the response is not a manager's ({exc})") from exc


def _ssl_context(url: str, settings: RemoteSettings) -> ssl.SSLContext | None:
    if not url.startswith("https://"):
        return None
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as exc:
        raise FailedPrecondition(f"GEAR_REMOTE_CA_FILE={settings.ca_file}: {exc}") from exc


def _batches(digests: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (digests[start : start + MAX_DIGESTS] for start in range(0, len(digests), MAX_DIGESTS))


def _verified_bytes(digest: bytes, blob: bytes) -> int:
    """Return the bytes that the manager reads to verify a blob."""
    return encoding.object_size(digest, blob) if encoding.is_layout(blob) else len(blob)
