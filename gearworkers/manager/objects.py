"""The handlers for objects: query, push and pull."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from aiohttp import web

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import InvalidInput
from gearworkers.fetch.source import Chunk
from gearworkers.http_service.pacing import PacedResponse
from gearworkers.manager.metrics import ManagerMetrics
from gearworkers.manager.uploads import Uploads, receive_blobs
from gearworkers.remote import blob_stream, encoding
from gearworkers.remote.manager_messages import Digests, Present

MAX_JSON_BYTES = 2 << 20
_OCTETS = "application/octet-stream"
_BLOBS_PER_WRITE = 16
_MEAN_CHUNK_BYTES = 32 << 10
_CACHE_FOREVER = "public, max-age=31536000, immutable"


class PushResult(msgspec.Struct, frozen=True):
    """The answer to a push."""

    stored: int
    """Number of new blobs or objects."""


class ObjectHandlers:
    """Each method handles one call of the API."""

    def __init__(self, uploads: Uploads, client_timeout_s: float, metrics: ManagerMetrics) -> None:
        self._uploads = uploads
        self._remote = uploads.remote
        self._client_timeout_s = client_timeout_s
        self._metrics = metrics
        self._max_blob_bytes = max(
            2 * encoding.LARGE_BYTES, self._remote.max_object_bytes // _MEAN_CHUNK_BYTES * encoding.RECORD_BYTES
        )

    async def query_one(self, request: web.Request) -> web.Response:
        """Send the size of an object."""
        digest = _digest(request.match_info["digest"])
        size_bytes = await self._remote.run(lambda: self._remote.remote.size_bytes(digest))
        return web.Response(headers={**_immutable_headers(digest), "Content-Length": str(size_bytes)})

    async def query(self, request: web.Request) -> web.Response:
        """Send the digests that are present."""
        digests = await self._digests(request)
        found = await self._remote.run(lambda: self._remote.remote.has(digests))
        return json_response(Present([digest.hex() for digest in found]))

    async def pull_one(self, request: web.Request) -> web.StreamResponse:
        """Send an object, or a range of it."""
        digest = _digest(request.match_info["digest"])
        if request.headers.get("If-None-Match") == _etag(digest):
            return web.Response(status=304, headers=_immutable_headers(digest))
        blob = await self._remote.run(lambda: self._remote.remote.blobs.get(digest))
        if encoding.is_layout(blob):
            return await self._send_chunks(request, digest, blob)
        content = await self._remote.run(lambda: encoding.decode(digest, blob))
        first, end = _range(request, len(content))
        out = await self._started(request, _range_response(request, digest, first, end, len(content)))
        await out.write(content[first:end])
        return out.response

    async def _send_chunks(self, request: web.Request, digest: bytes, layout: bytes) -> web.StreamResponse:
        size_bytes = await self._remote.run(lambda: encoding.object_size(digest, layout))
        first, end = _range(request, size_bytes)
        out = await self._started(request, _range_response(request, digest, first, end, size_bytes))
        chunks = _chunks_within(encoding.iter_layout(digest, layout), first, end)
        async for chunk, data in self._remote.iterate(self._remote.remote.fetch_chunks(chunks)):
            await out.write(memoryview(data)[max(first - chunk.offset, 0) : end - chunk.offset])
        return out.response

    async def pull_blob(self, request: web.Request) -> web.StreamResponse:
        """Send the blob of an object or chunk, as stored."""
        digest = _digest(request.match_info["digest"])
        blob = await self._remote.run(lambda: self._remote.remote.blobs.get(digest))
        response = web.StreamResponse(headers=_immutable_headers(digest))
        response.content_type = _OCTETS
        response.content_length = len(blob)
        await (await self._started(request, response)).write(blob)
        return response

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """Send many blobs in one stream."""
        return await self._send_blobs(request, await self._digests(request))

    async def push_one(self, request: web.Request) -> web.Response:
        """Store an object, verified on its way in."""
        digest = _digest(request.match_info["digest"])
        if (request.content_length or 0) > self._remote.max_object_bytes:
            raise web.HTTPRequestEntityTooLarge(self._remote.max_object_bytes, request.content_length or 0)
        with self._uploads.open() as upload:
            fd = await upload.receive_object(self._uploads.body(request), digest)
            is_new = await self._remote.put_object(digest, fd, upload.size_bytes)
        self._metrics.stored.inc(is_new)
        return json_response(PushResult(int(is_new)), status=201 if is_new else 200)

    async def push(self, request: web.Request) -> web.Response:
        """Store many blobs from one stream, each verified first."""
        stored = 0
        with self._uploads.open() as upload:
            async for batch in receive_blobs(self._uploads.body(request), upload, self._max_blob_bytes):
                new = await self._remote.put_blobs(batch, upload.load)
                self._metrics.stored.inc(new)
                stored += new
        return json_response(PushResult(stored))

    async def _send_blobs(self, request: web.Request, digests: Sequence[bytes]) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = blob_stream.CONTENT_TYPE
        out = await self._started(request, response)
        async for found in self._remote.get_blobs(digests):
            for start in range(0, len(found), _BLOBS_PER_WRITE):
                batch = found[start : start + _BLOBS_PER_WRITE]
                await out.write(b"".join(blob_stream.frame(digest, blob) for digest, blob in batch))
        return response

    async def _digests(self, request: web.Request) -> list[bytes]:
        body = await self._uploads.receive(request, MAX_JSON_BYTES)
        return [bytes.fromhex(text) for text in msgspec.json.decode(body, type=Digests).digests]

    async def _started(self, request: web.Request, response: web.StreamResponse) -> PacedResponse:
        out = PacedResponse(response, self._client_timeout_s, self._metrics.sent.inc)
        await out.start(request)
        return out


def json_response(content: msgspec.Struct | Sequence[msgspec.Struct], status: int = 200) -> web.Response:
    """Return a response with *content* as JSON."""
    return web.Response(body=msgspec.json.encode(content), content_type="application/json", status=status)


def _chunks_within(chunks: Iterable[Chunk], first: int, end: int) -> Iterator[Chunk]:
    for chunk in chunks:
        if chunk.offset >= end:
            return
        if chunk.offset + chunk.size_bytes > first:
            yield chunk


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_BYTES or digest.hex() != text:
        raise InvalidInput(f"{text[:80]!r} is not a SHA-256 in lower-case hex")
    return digest


def _etag(digest: bytes) -> str:
    return f'"{digest.hex()}"'


def _immutable_headers(digest: bytes) -> dict[str, str]:
    return {"ETag": _etag(digest), "Cache-Control": _CACHE_FOREVER, "Accept-Ranges": "bytes"}


def _range(request: web.Request, size_bytes: int) -> tuple[int, int]:
    """Return the offset of the first byte and the end of the requested range.

    Raises:
        HTTPRequestRangeNotSatisfiable: The range is outside the object.
    """
    try:
        first, end, _ = request.http_range.indices(size_bytes)
    except ValueError as exc:
        raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size_bytes}"}) from exc
    if first >= end and (size_bytes or "Range" in request.headers):
        raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size_bytes}"})
    return first, end


def _range_response(request: web.Request, digest: bytes, first: int, end: int, size_bytes: int) -> web.StreamResponse:
    headers = _immutable_headers(digest)
    is_part = "Range" in request.headers
    if is_part:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size_bytes}"
    response = web.StreamResponse(status=206 if is_part else 200, headers=headers)
    response.content_type = _OCTETS
    response.content_length = end - first
    return response
