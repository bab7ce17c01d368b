"""A repository of a registry: manifests and blobs read, verified, and written.

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
from gearworkers.images.auth import Authority
from gearworkers.images.layer_reader import Verified
from gearworkers.images.manifest import INDEXES, MANIFESTS, MAX_MANIFEST_BYTES, digest_of, verified
from gearworkers.images.reference import Reference
from gearworkers.images.transport import Transport, make_transport, problem, translated
from gearworkers.settings import RegistrySettings
from gearworkers.tar.reader import Readable
from gearworkers.util.retry import ATTEMPTS, retried

UPLOAD_CHUNK_BYTES = 16 << 20
"""A blob of up to this size goes in one request; what one more costs in memory."""

_MANIFEST_TYPES = ", ".join(sorted(MANIFESTS | INDEXES))
_OCTETS = {"Content-Type": "application/octet-stream"}
_WELL = range(200, 300)
_PORTS = {"https": 443, "http": 80}


@dataclass
class Registry:
    """One registry; used from many threads at once.

    The first request finds out whether it speaks TLS; only on a loopback address plain HTTP will do.
    """

    reference: Reference
    transport: Transport
    authority: Authority
    _base: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, settings: RegistrySettings, reference: Reference) -> Registry:
        """The registry that *reference* names; connects to nothing yet."""
        transport = make_transport(settings, reference.host)
        return cls(reference, transport, Authority(reference.host, transport, settings.docker_config))

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
        """One authorized request.

        Args:
            method: HTTP's.
            target: A path, or a URL the registry gave; who we are is told to the registry's own host alone.
            scopes: What the token must allow.
            expected: The good statuses; any other is raised.
            headers: Beside Authorization.
            body: Sent again if a token is asked for; of a file all, and *headers* say how long it is.
            stream: Leave the answer's body to be read.

        Raises:
            NotFound, Unavailable, FailedPrecondition, InvalidInput: By the status, with the registry's words.
        """
        base = self._base_url()
        with translated(f"{method} {target.partition('?')[0]}"):
            url = urljoin(base, target)
            ours = _server(url) == _server(base)
        for again in (False, True):
            authorization = self.authority.known(scopes) if ours else None
            sent = {**(headers or {}), **({"Authorization": authorization} if authorization else {})}
            if body is not None and not isinstance(body, bytes):
                body.seek(0)
            response = self.transport.send(method, url, headers=sent, body=body, preload_content=not stream)
            if response.status != 401 or again or _server(urljoin(url, response.url or "")) != _server(base):
                break  # also where the registry redirected: only its own challenge is answered
            response.drain_conn()
            self.authority.forget(scopes)
            self.authority.answer(response.headers.get("WWW-Authenticate", ""), scopes)
        if response.status not in expected:
            raise problem(response, f"{method} {url.partition('?')[0]}")
        return response

    def _base_url(self) -> str:
        with self._lock:
            self._base = self._base or self._found_base()
            return self._base

    def _found_base(self) -> str:
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
    """One repository; every method is idempotent, is retried within bounds, and may be called from many threads.

    Raised by all: NotFound, Unavailable (after the retries), FailedPrecondition (not allowed), InvalidInput.
    """

    registry: Registry
    name: str

    @classmethod
    def of(cls, settings: RegistrySettings, reference: Reference) -> Repository:
        """The repository that *reference* names; connects to nothing yet."""
        return cls(Registry.of(settings, reference), reference.repository)

    @retried
    def manifest(self, version: str) -> tuple[bytes, str]:
        """A manifest or index by tag or digest, and the type that the registry tells of it; by digest it is verified.

        Raises:
            IntegrityError: It is not what its digest says, or too large.
        """
        response = self._get(f"manifests/{version}", {"Accept": _MANIFEST_TYPES})
        what = f"manifest {version} of {self.name}"
        with translated(f"read {what}"):
            data = response.read(MAX_MANIFEST_BYTES + 1)
            response.release_conn()
        if len(data) > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"{what}: larger than {MAX_MANIFEST_BYTES} bytes")
        if version.startswith("sha256:"):
            verified(data, version, what)
        return data, response.headers.get("Content-Type", "")

    def blob(self, digest: str, size_bytes: int | None) -> Readable:
        """A blob's bytes, verified as they are read; a connection that breaks is made anew where it broke."""
        return Verified(
            _Download(lambda at: self._open(digest, at), f"blob {digest} of {self.name}"), digest, size_bytes
        )

    @retried
    def has_blob(self, digest: str) -> bool:
        """Whether the repository, which may not have begun, has it; asked as one who pushes, as others may not know."""
        found = self.registry.send("HEAD", self._path(f"blobs/{digest}"), self._push, (200, 404))
        return found.status == 200

    @retried
    def mount(self, digest: str, origin: str) -> bool:
        """Take a blob over from the repository *origin* of the same registry; whether it is here now."""
        query = urlencode({"mount": digest, "from": origin})
        scopes = (*self._push, f"repository:{origin}:pull")
        response = self.registry.send("POST", self._path(f"blobs/uploads/?{query}"), scopes, (201, 202))
        if response.status == 202:
            self._cancel(response.headers.get("Location", ""))
        return response.status == 201

    def put_blob(self, digest: str, file: BinaryIO, size_bytes: int) -> None:
        """Upload *file* from its first byte if the repository lacks it; visible only when whole and verified there."""
        if self.has_blob(digest):
            return
        if size_bytes <= UPLOAD_CHUNK_BYTES:
            file.seek(0)
            self._put_at_once(digest, file.read(size_bytes), size_bytes)
            return
        try:
            self._put_in_chunks(digest, file, size_bytes)
        except (InvalidInput, NotFound):  # some registries, as Google's, take no chunks
            self._put_at_once(digest, file, size_bytes)

    @retried
    def put_manifest(self, version: str, media_type: str, data: bytes) -> str:
        """Let *version*, a tag or the digest, name the manifest *data*; its digest."""
        digest = digest_of(data)
        path = self._path(f"manifests/{version}")
        response = self.registry.send("PUT", path, self._push, _WELL, headers={"Content-Type": media_type}, body=data)
        told = response.headers.get("Docker-Content-Digest", digest)
        if told != digest:
            raise IntegrityError(f"manifest {version} of {self.name}: {digest} was pushed, and {told} is there")
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
    def _open(self, digest: str, at: int) -> urllib3.BaseHTTPResponse:
        """The blob's bytes from *at* on; of a registry that knows no ranges, what comes before is skipped."""
        response = self._get(f"blobs/{digest}", {"Range": f"bytes={at}-"} if at else {})
        skipped = at if response.status == 200 else 0
        with translated(f"read blob {digest} of {self.name}"):
            while skipped and (data := response.read(min(skipped, 1 << 20))):
                skipped -= len(data)
        return response

    @retried
    def _put_at_once(self, digest: str, data: bytes | BinaryIO, size_bytes: int) -> None:
        self._finish(self._begin(), digest, data, size_bytes)

    def _put_in_chunks(self, digest: str, file: BinaryIO, size_bytes: int) -> None:
        """Chunk by chunk; after a break it goes on where the registry says that it is."""
        upload = _Upload(retried(self._begin)())
        while upload.at < size_bytes:
            self._put_chunk(upload, file, size_bytes)
        self._end_upload(upload, digest)

    @retried
    def _put_chunk(self, upload: _Upload, file: BinaryIO, size_bytes: int) -> None:
        if upload.is_broken:
            self._resume(upload)
        file.seek(upload.at)
        data = file.read(min(UPLOAD_CHUNK_BYTES, size_bytes - upload.at))
        if not data:
            return  # of the last one only the answer was lost
        headers = {**_OCTETS, "Content-Range": f"{upload.at}-{upload.at + len(data) - 1}"}
        upload.is_broken = True
        upload.follow(self.registry.send("PATCH", upload.location, self._push, _WELL, headers=headers, body=data))
        upload.at += len(data)

    def _resume(self, upload: _Upload) -> None:
        """Find out where it goes on; if the registry has lost it, as docker-registry 2.8 may, begin anew."""
        try:
            response = self.registry.send("GET", upload.location, self._push, (202, 204))
            upload.at = _received_bytes(response)
            upload.follow(response)
        except NotFound:
            upload.losses += 1
            if upload.losses >= ATTEMPTS:
                raise
            upload.location, upload.at, upload.is_broken = self._begin(), 0, False

    @retried
    def _end_upload(self, upload: _Upload, digest: str) -> None:
        """Have it be the blob; it is already if only the answer to that was lost."""
        try:
            self._finish(upload.location, digest, b"", 0)
        except NotFound:
            if not self.has_blob(digest):
                raise

    def _begin(self) -> str:
        begun = self.registry.send("POST", self._path("blobs/uploads/"), self._push, (202,))
        location = begun.headers.get("Location", "")
        if not location:
            raise NotFound(f"{self.registry.reference.host} begins an upload to {self.name} without saying where")
        return str(location)

    def _finish(self, location: str, digest: str, data: bytes | BinaryIO, size_bytes: int) -> None:
        with translated(f"end an upload to {self.name}"):
            parts = urlsplit(location)
        query = urlencode([*parse_qsl(parts.query, keep_blank_values=True), ("digest", digest)])
        target = urlunsplit(parts._replace(query=query))
        headers = {**_OCTETS, "Content-Length": str(size_bytes)}
        self.registry.send("PUT", target, self._push, _WELL, headers=headers, body=data)

    def _cancel(self, location: str) -> None:
        if location:
            try:
                self.registry.send("DELETE", location, self._push, (202, 204, 404, 405))
            except Unavailable:
                pass  # the registry ends it by itself


@dataclass(slots=True)
class _Upload:
    """One that goes in chunks."""

    location: str
    at: int = 0
    is_broken: bool = False
    """Whether it is not known what of the last chunk has come."""
    losses: int = 0

    def follow(self, response: urllib3.BaseHTTPResponse) -> None:
        """The registry says where it goes on."""
        self.location = str(response.headers.get("Location") or self.location)
        self.is_broken = False


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _received_bytes(response: urllib3.BaseHTTPResponse) -> int:
    """How much of an upload a registry says that it has; 0-0 is how it says nothing."""
    end = str(response.headers.get("Range", "")).rpartition("-")[2]
    return int(end) + 1 if end.isdigit() and end != "0" else 0


class _Download:
    """A body that is asked for again, from where it broke, as long as something comes each time."""

    def __init__(self, open_at: Callable[[int], urllib3.BaseHTTPResponse], what: str) -> None:
        self._open_at = open_at
        self._what = what
        self._response: urllib3.BaseHTTPResponse | None = None
        self._at = 0
        self._breaks = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill some of *buffer*; 0 at the end.

        Raises:
            Unavailable: It broke too often without a byte in between.
        """
        while True:
            self._response = self._response or self._open_at(self._at)
            try:
                return self._read(self._response, buffer)
            except Unavailable:
                self._response = None
                self._breaks += 1
                if self._breaks >= ATTEMPTS:
                    raise

    def _read(self, response: urllib3.BaseHTTPResponse, buffer: memoryview) -> int:
        with translated(f"read {self._what}"):
            data = response.read(len(buffer), decode_content=False)
        buffer[: len(data)] = data
        self._at += len(data)
        if data:
            self._breaks = 0
        else:
            response.release_conn()
        return len(data)
