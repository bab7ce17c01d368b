"""The calls for objects: query, push and pull."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from aiohttp import web

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import InvalidInput
from gearworkers.fetch.source import Chunk
from gearworkers.manager.async_remote import Store
from gearworkers.manager.metrics import Metrics
from gearworkers.manager.pacing import Answer, Body
from gearworkers.manager.uploads import receive_blobs, receive_whole, uploading
from gearworkers.remote import blob_stream, encoding
from gearworkers.remote.manager_messages import Digests, Present

MOST_JSON_BYTES = 2 << 20
_OCTETS = "application/octet-stream"
_FRAMES_TOGETHER = 16
_MEAN_CHUNK_BYTES = 32 << 10
_FOR_EVER = "public, max-age=31536000, immutable"


class Stored(msgspec.Struct, frozen=True):
    """What a push has brought."""

    stored: int


class ObjectCalls:
    """Handlers; each is one call of the API."""

    def __init__(self, store: Store, uploads: Path, patience_s: float, metrics: Metrics) -> None:
        self._store = store
        self._uploads = uploads
        self._patience_s = patience_s
        self._metrics = metrics
        self._most_blob_bytes = max(
            2 * encoding.LARGE_BYTES, store.most_object_bytes // _MEAN_CHUNK_BYTES * encoding.RECORD_BYTES
        )

    async def query_one(self, request: web.Request) -> web.Response:
        """HEAD of an object: its size."""
        digest = _digest(request.match_info["digest"])
        size_bytes = await self._store.run(lambda: self._store.remote.size_bytes(digest))
        return web.Response(headers={**_lasting(digest), "Content-Length": str(size_bytes)})

    async def query(self, request: web.Request) -> web.Response:
        """Which of many are there."""
        asked = await self._digests(request)
        found = await self._store.run(lambda: self._store.remote.has(asked))
        return answer(Present([digest.hex() for digest in found]))

    async def pull_one(self, request: web.Request) -> web.StreamResponse:
        """An object, whole or a range of it."""
        digest = _digest(request.match_info["digest"])
        if request.headers.get("If-None-Match") == _etag(digest):
            return web.Response(status=304, headers=_lasting(digest))
        blob = await self._store.run(lambda: self._store.remote.blobs.get(digest))
        if encoding.is_layout(blob):
            return await self._send_chunks(request, digest, blob)
        content = await self._store.run(lambda: encoding.decode(digest, blob))
        first, end = _range(request, len(content))
        out = await self._started(request, _ranged(request, digest, first, end, len(content)))
        await out.write(content[first:end])
        return out.response

    async def _send_chunks(self, request: web.Request, digest: bytes, layout: bytes) -> web.StreamResponse:
        size_bytes = await self._store.run(lambda: encoding.object_size(digest, layout))
        first, end = _range(request, size_bytes)
        out = await self._started(request, _ranged(request, digest, first, end, size_bytes))
        wanted = _chunks_within(encoding.iter_layout(digest, layout), first, end)
        async for chunk, piece in self._store.steps(self._store.remote.fetch_chunks(wanted)):
            await out.write(memoryview(piece)[max(first - chunk.offset, 0) : end - chunk.offset])
        return out.response

    async def pull_blob(self, request: web.Request) -> web.StreamResponse:
        """What is stored of an object, as it is stored."""
        digest = _digest(request.match_info["digest"])
        blob = await self._store.run(lambda: self._store.remote.blobs.get(digest))
        response = web.StreamResponse(headers=_lasting(digest))
        response.content_type = _OCTETS
        response.content_length = len(blob)
        await (await self._started(request, response)).write(blob)
        return response

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """Many in one stream."""
        return await self._send_blobs(request, await self._digests(request))

    async def push_one(self, request: web.Request) -> web.Response:
        """An object, verified while it comes."""
        digest = _digest(request.match_info["digest"])
        if (request.content_length or 0) > self._store.most_object_bytes:
            raise web.HTTPRequestEntityTooLarge(self._store.most_object_bytes, request.content_length or 0)
        with uploading(self._store, self._uploads) as upload:
            fd = await upload.receive_object(self._body(request), digest)
            is_new = await self._store.put_object(digest, fd, upload.size_bytes)
        self._metrics.stored.inc(is_new)
        return answer(Stored(int(is_new)), status=201 if is_new else 200)

    async def push(self, request: web.Request) -> web.Response:
        """Many blobs in one stream, each verified before it is stored."""
        stored = 0
        with uploading(self._store, self._uploads) as upload:
            async for batch in receive_blobs(self._body(request), upload, self._most_blob_bytes):
                new = await self._store.put_blobs(batch, upload.load)
                self._metrics.stored.inc(new)
                stored += new
        return answer(Stored(stored))

    async def _send_blobs(self, request: web.Request, digests: Sequence[bytes]) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = blob_stream.CONTENT_TYPE
        out = await self._started(request, response)
        async for found in self._store.blobs(digests):
            for start in range(0, len(found), _FRAMES_TOGETHER):
                part = found[start : start + _FRAMES_TOGETHER]
                await out.write(b"".join(blob_stream.frame(digest, blob) for digest, blob in part))
        return response

    async def _digests(self, request: web.Request) -> list[bytes]:
        asked = msgspec.json.decode(await self._json(request), type=Digests).digests
        return [bytes.fromhex(text) for text in asked]

    async def _started(self, request: web.Request, response: web.StreamResponse) -> Answer:
        out = Answer(response, self._patience_s, self._metrics)
        await out.start(request)
        return out

    async def _json(self, request: web.Request) -> bytes:
        return await receive_whole(self._body(request), self._store, self._uploads, MOST_JSON_BYTES)

    def _body(self, request: web.Request) -> Body:
        return Body(request, self._patience_s, self._metrics)


def answer(content: msgspec.Struct | Sequence[msgspec.Struct], status: int = 200) -> web.Response:
    """*content* as JSON."""
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
        raise InvalidInput(f"{text[:80]!r} is no SHA-256 in lower-case hex")
    return digest


def _etag(digest: bytes) -> str:
    return f'"{digest.hex()}"'


def _lasting(digest: bytes) -> dict[str, str]:
    return {"ETag": _etag(digest), "Cache-Control": _FOR_EVER, "Accept-Ranges": "bytes"}


def _range(request: web.Request, size_bytes: int) -> tuple[int, int]:
    """First byte and end of what is asked for.

    Raises:
        HTTPRequestRangeNotSatisfiable: None of it is in the object.
    """
    try:
        asked = request.http_range
        first, end, _ = asked.indices(size_bytes)
    except ValueError as exc:
        raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size_bytes}"}) from exc
    if first >= end and (size_bytes or "Range" in request.headers):
        raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size_bytes}"})
    return first, end


def _ranged(request: web.Request, digest: bytes, first: int, end: int, size_bytes: int) -> web.StreamResponse:
    headers = _lasting(digest)
    is_part = "Range" in request.headers
    if is_part:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size_bytes}"
    response = web.StreamResponse(status=206 if is_part else 200, headers=headers)
    response.content_type = _OCTETS
    response.content_length = end - first
    return response
