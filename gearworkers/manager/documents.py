"""The calls for documents: profiles and what else has a name of its own."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from gearworkers.errors import InvalidInput, NotFound
from gearworkers.manager.async_remote import Store
from gearworkers.manager.metrics import Metrics
from gearworkers.manager.pacing import Body
from gearworkers.manager.uploads import uploading
from gearworkers.remote.blobstore import MAX_DOCUMENT_BYTES
from gearworkers.remote.manager_messages import VERSION_HEADER

MOST_VERSION = 10**10 - 1


class DocumentCalls:
    """Handlers; each is one call of the API."""

    def __init__(self, store: Store, uploads: Path, patience_s: float, metrics: Metrics) -> None:
        self._store = store
        self._uploads = uploads
        self._patience_s = patience_s
        self._metrics = metrics

    async def get(self, request: web.Request) -> web.Response:
        """The newest version."""
        name = request.match_info["name"]
        found = await self._store.run(lambda: self._store.remote.get_document(name))
        if found is None:
            raise NotFound(f"document {name} is not there")
        headers = {VERSION_HEADER: str(found.version), "Cache-Control": "no-cache"}
        return web.Response(body=found.data, headers=headers, content_type="application/octet-stream")

    async def put(self, request: web.Request) -> web.Response:
        """A version, if it is the next; without a version in the request, whatever was there."""
        name = request.match_info["name"]
        version = request.headers.get(VERSION_HEADER)
        if version is not None and not (version.isascii() and version.isdigit() and 0 < int(version) <= MOST_VERSION):
            raise InvalidInput(f"{VERSION_HEADER}: {version!r} is no version")
        with uploading(self._store, self._uploads) as upload:
            await upload.receive_all(Body(request, self._patience_s, self._metrics), MAX_DOCUMENT_BYTES)
            number = int(version) if version is not None else None
            await self._store.put_document(name, number, upload.size_bytes, upload.load_all)
        return web.Response(status=204)
