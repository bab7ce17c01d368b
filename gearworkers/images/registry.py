"""Read and write the manifests and blobs of a repository; verify them.

Source: OCI distribution-spec v1.1 and Docker's registry API v2.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

import urllib3

from gearworkers.errors import IntegrityError, InvalidInput, NotFound, Unavailable
from gearworkers.images.auth import Authenticator
from gearworkers.images.layer_reader import VerifiedBlob
from gearworkers.images.manifest import INDEXES, MANIFESTS, MAX_MANIFEST_BYTES, digest_of, verified
from gearworkers.images.reference import Reference
from gearworkers.images.transport import Transport, error_of, open_transport, translated
from gearworkers.settings import RegistrySettings
from gearworkers.tar.reader import Readable
from gearworkers.util.retry import ATTEMPTS, retried

UPLOAD_CHUNK_BYTES = 16 << 20
"""Size of the largest blob that is uploaded in one request, and memory that an upload in chunks needs."""

_MANIFEST_TYPES = ", ".join(sorted(MANIFESTS | INDEXES))
_OCTETS = {"Content-Type": "application/octet-stream"}
_SUCCESS = range(200, 300)
_PORTS = {"https": 443, "http": 80}


@dataclass
class Registry:
    """One registry; many threads may use it at once.

    The first request finds out whether the registry speaks TLS. Plain HTTP is accepted on loopback addresses only.
    """

    reference: Reference
    transport: Transport
    authenticator: Authenticator
    _base: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, settings: RegistrySettings, reference: Reference) -> Registry:
        """Return the registry that *reference* names; do not connect yet."""
        transport = open_transport(settings, reference.host)
        return cls(reference, transport, Authenticator(reference.host, transport, settings.docker_config))

    def send(
        self,
        method: str,
        target: str,
        scopes: tuple[str, ...],
        expected: Container[int],
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | BinaryIO | None = None,
        stream: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """Send one request, authorized if the registry asks for it.

        Args:
            method: HTTP method.
            target: A path, or a URL from the registry; only the registry's own host receives the Authorization.
            scopes: The access that the token must allow.
            expected: Statuses to return; any other status raises an error.
            headers: Headers besides Authorization.
            body: Bytes, or a file with its length in *headers*; sent whole, and again if a token is needed.
            stream: Leave the response's body unread.

        Raises:
            NotFound, Unavailable, FailedPrecondition, InvalidInput: By the status, with the registry's message.
        """
        base = self._base_url()
        with translated(f"{method} {target.partition('?')[0]}"):
            url = urljoin(base, target)
            is_own_host = server_of(url) == server_of(base)
        for is_retry in (False, True):
            authorization = self.authenticator.cached(scopes) if is_own_host else None
            sent = {**(headers or {}), **({"Authorization": authorization} if authorization else {})}
            if body is not None and not isinstance(body, bytes):
                body.seek(0)
            response = self.transport.send(method, url, headers=sent, body=body, preload_content=not stream)
            if response.status != 401 or is_retry or server_of(urljoin(url, response.url or "")) != server_of(base):
                break  # answer only the registry's own challenge, not one of a server that it redirects to
            response.drain_conn()
            self.authenticator.forget(scopes)
            self.authenticator.authorize(response.headers.get("WWW-Authenticate", ""), scopes)
        if response.status not in expected:
            raise error_of(response, f"{method} {url.partition('?')[0]}")
        return response

    def _base_url(self) -> str:
        with self._lock:
            self._base = self._base or self._find_base()
            return self._base

    def _find_base(self) -> str:
        host = self.reference.api_host
        try:
            self.transport.send("GET", f"https://{host}/v2/")
            return f"https://{host}"
        except Unavailable:
            if not self.reference.is_loopback:
                raise
        self.transport.send("GET", f"http://{host}/v2/")
        return f"http://{host}"


@dataclass(frozen=True, slots=True)
class Repository:
    """One repository. All methods are idempotent and retry a few times; many threads may call them at once.

    All methods raise NotFound, Unavailable (after the retries), FailedPrecondition (access denied) or InvalidInput.
    """

    registry: Registry
    name: str

    @classmethod
    def of(cls, settings: RegistrySettings, reference: Reference) -> Repository:
        """Return the repository that *reference* names; do not connect yet."""
        return cls(Registry.of(settings, reference), reference.repository)

    @retried
    def manifest(self, tag_or_digest: str) -> tuple[bytes, str]:
        """Return a manifest or index, verified if requested by digest, and the media type that the registry declares.

        Raises:
            IntegrityError: The manifest differs from its digest, or is too large.
        """
        response = self._get(f"manifests/{tag_or_digest}", {"Accept": _MANIFEST_TYPES})
        label = f"manifest {tag_or_digest} of {self.name}"
        with translated(f"read {label}"):
            data = response.read(MAX_MANIFEST_BYTES + 1)
            response.release_conn()
        if len(data) > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"{label}: larger than {MAX_MANIFEST_BYTES} bytes")
        if tag_or_digest.startswith("sha256:"):
            verified(data, tag_or_digest, label)
        return data, response.headers.get("Content-Type", "")

    def blob(self, digest: str, size_bytes: int | None) -> Readable:
        """Return the bytes of a blob, verified as they are read; a broken download resumes where it stopped."""
        return VerifiedBlob(
            _Download(lambda offset: self._open(digest, offset), f"blob {digest} of {self.name}"), digest, size_bytes
        )

    @retried
    def has_blob(self, digest: str) -> bool:
        """Return whether the repository, which may not exist yet, has the blob.

        The request asks for push access: without it, some registries deny access to a missing repository.
        """
        found = self.registry.send("HEAD", self._path(f"blobs/{digest}"), self._push, (200, 404))
        return found.status == 200

    def put_blob(self, digest: str, file: BinaryIO, size_bytes: int) -> None:
        """Upload *file* from its first byte if the repository lacks the blob.

        The blob becomes visible when the registry has all of it and has verified its digest.
        """
        if self.has_blob(digest):
            return
        if size_bytes <= UPLOAD_CHUNK_BYTES:
            file.seek(0)
            self._put_at_once(digest, file.read(size_bytes), size_bytes)
            return
        try:
            self._put_in_chunks(digest, file, size_bytes)
        except (InvalidInput, NotFound):  # some registries, such as Google's, accept no chunks
            self._put_at_once(digest, file, size_bytes)

    @retried
    def put_manifest(self, tag_or_digest: str, media_type: str, data: bytes) -> str:
        """Put the manifest *data* under a tag or its digest; return the digest."""
        digest = digest_of(data)
        path = self._path(f"manifests/{tag_or_digest}")
        response = self.registry.send(
            "PUT", path, self._push, _SUCCESS, headers={"Content-Type": media_type}, body=data
        )
        stored = response.headers.get("Docker-Content-Digest", digest)
        if stored != digest:
            raise IntegrityError(
                f"manifest {tag_or_digest} of {self.name}: {digest} was pushed, and the registry stored {stored}"
            )
        return digest

    @property
    def _pull(self) -> tuple[str, ...]:
        return (f"repository:{self.name}:pull",)

    @property
    def _push(self) -> tuple[str, ...]:
        return (f"repository:{self.name}:pull,push",)

    def _path(self, rest: str) -> str:
        return f"/v2/{self.name}/{rest}"

    def _get(self, rest: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        plain = {"Accept-Encoding": "identity", **headers}
        return self.registry.send("GET", self._path(rest), self._pull, (200, 206), headers=plain, stream=True)

    @retried
    def _open(self, digest: str, offset: int) -> urllib3.BaseHTTPResponse:
        """Request the blob from byte *offset*; skip the bytes before it if the registry does not support ranges."""
        response = self._get(f"blobs/{digest}", {"Range": f"bytes={offset}-"} if offset else {})
        skipped = offset if response.status == 200 else 0
        with translated(f"read blob {digest} of {self.name}"):
            while skipped and (data := response.read(min(skipped, 1 << 20))):
                skipped -= len(data)
        return response

    @retried
    def _put_at_once(self, digest: str, data: bytes | BinaryIO, size_bytes: int) -> None:
        self._finish(self._begin(), digest, data, size_bytes)

    def _put_in_chunks(self, digest: str, file: BinaryIO, size_bytes: int) -> None:
        """Upload in chunks; after a broken request, continue from the byte that the registry reports."""
        upload = _Upload(retried(self._begin)())
        while upload.offset < size_bytes:
            self._put_chunk(upload, file, size_bytes)
        self._end_upload(upload, digest)

    @retried
    def _put_chunk(self, upload: _Upload, file: BinaryIO, size_bytes: int) -> None:
        if upload.is_broken:
            self._resume(upload)
        file.seek(upload.offset)
        data = file.read(min(UPLOAD_CHUNK_BYTES, size_bytes - upload.offset))
        if not data:
            return  # the registry has the last chunk; only the response was lost
        headers = {**_OCTETS, "Content-Range": f"{upload.offset}-{upload.offset + len(data) - 1}"}
        upload.is_broken = True
        upload.follow(self.registry.send("PATCH", upload.location, self._push, _SUCCESS, headers=headers, body=data))
        upload.offset += len(data)

    def _resume(self, upload: _Upload) -> None:
        """Ask the registry how much it has; restart the upload if the registry lost it, as docker-registry 2.8 may."""
        try:
            response = self.registry.send("GET", upload.location, self._push, (202, 204))
            upload.offset = _received_bytes(response)
            upload.follow(response)
        except NotFound:
            upload.losses += 1
            if upload.losses >= ATTEMPTS:
                raise
            upload.location, upload.offset, upload.is_broken = self._begin(), 0, False

    @retried
    def _end_upload(self, upload: _Upload, digest: str) -> None:
        """Finish the upload, which an earlier attempt may have finished if only its response was lost."""
        try:
            self._finish(upload.location, digest, b"", 0)
        except NotFound:
            if not self.has_blob(digest):
                raise

    def _begin(self) -> str:
        begun = self.registry.send("POST", self._path("blobs/uploads/"), self._push, (202,))
        location = begun.headers.get("Location", "")
        if not location:
            raise NotFound(f"{self.registry.reference.host} started an upload to {self.name} but sent no Location")
        return str(location)

    def _finish(self, location: str, digest: str, data: bytes | BinaryIO, size_bytes: int) -> None:
        with translated(f"end an upload to {self.name}"):
            parts = urlsplit(location)
        query = urlencode([*parse_qsl(parts.query, keep_blank_values=True), ("digest", digest)])
        target = urlunsplit(parts._replace(query=query))
        headers = {**_OCTETS, "Content-Length": str(size_bytes)}
        self.registry.send("PUT", target, self._push, _SUCCESS, headers=headers, body=data)


@dataclass(slots=True)
class _Upload:
    """The state of an upload in chunks."""

    location: str
    offset: int = 0
    is_broken: bool = False
    """Whether the last request broke, so that the number of received bytes is unknown."""
    losses: int = 0
    """How often the registry lost the upload."""

    def follow(self, response: urllib3.BaseHTTPResponse) -> None:
        """Take the location of the next request from *response*."""
        self.location = str(response.headers.get("Location") or self.location)
        self.is_broken = False


def server_of(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of *url*; the scheme's default port if it names none."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _received_bytes(response: urllib3.BaseHTTPResponse) -> int:
    """Return the number of bytes of an upload that the registry has; ``0-0`` means none."""
    end = str(response.headers.get("Range", "")).rpartition("-")[2]
    return int(end) + 1 if end.isdigit() and end != "0" else 0


class _Download:
    """A response body; if the connection breaks, the rest is requested again, as long as attempts make progress."""

    def __init__(self, open_at: Callable[[int], urllib3.BaseHTTPResponse], label: str) -> None:
        self._open_at = open_at
        self._label = label
        self._response: urllib3.BaseHTTPResponse | None = None
        self._offset = 0
        self._breaks = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill part of *buffer*; return the number of bytes, 0 at the end.

        Raises:
            Unavailable: Too many attempts in a row broke before the first byte.
        """
        while True:
            self._response = self._response or self._open_at(self._offset)
            try:
                return self._read(self._response, buffer)
            except Unavailable:
                self._response = None
                self._breaks += 1
                if self._breaks >= ATTEMPTS:
                    raise

    def _read(self, response: urllib3.BaseHTTPResponse, buffer: memoryview) -> int:
        with translated(f"read {self._label}"):
            data = response.read(len(buffer), decode_content=False)
        buffer[: len(data)] = data
        self._offset += len(data)
        if data:
            self._breaks = 0
        else:
            response.release_conn()
        return len(data)
