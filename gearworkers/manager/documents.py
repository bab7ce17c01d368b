"""The handlers for documents, such as profiles."""

from __future__ import annotations

from aiohttp import web

from gearworkers.errors import InvalidInput, NotFound
from gearworkers.manager.uploads import Uploads
from gearworkers.remote.blobstore import MAX_DOCUMENT_BYTES
from gearworkers.remote.manager_messages import VERSION_HEADER

MAX_VERSION = 10**10 - 1


class DocumentHandlers:
    """Each method handles one call of the API."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._remote = uploads.remote

    async def get(self, request: web.Request) -> web.Response:
        """Send the newest version."""
        name = request.match_info["name"]
        found = await self._remote.run(lambda: self._remote.remote.get_document(name))
        if found is None:
            raise NotFound(f"document {name}: not found")
        headers = {VERSION_HEADER: str(found.version), "Cache-Control": "no-cache"}
        return web.Response(body=found.data, headers=headers, content_type="application/octet-stream")

    async def put(self, request: web.Request) -> web.Response:
        """Store the version that the request names if it is the next one; without a version, store the next one."""
        name = request.match_info["name"]
        text = request.headers.get(VERSION_HEADER)
        if text is not None and not (text.isascii() and text.isdigit() and 0 < int(text) <= MAX_VERSION):
            raise InvalidInput(f"{VERSION_HEADER}: {text!r} is not a version")
        with self._uploads.open() as upload:
            await upload.receive_all(self._uploads.body(request), MAX_DOCUMENT_BYTES)
            version = int(text) if text is not None else None
            await self._remote.put_document(name, version, upload.size_bytes, upload.load_all)
        return web.Response(status=204)
