"""The manager's calls put together: routes, who may, what errors look like, what is counted."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog
from aiohttp import web
from prometheus_client import generate_latest

from gearworkers.errors import (
    AlreadyExists,
    GearError,
    IntegrityError,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from gearworkers.manager.async_remote import Store
from gearworkers.manager.documents import DocumentCalls
from gearworkers.manager.metrics import Metrics
from gearworkers.manager.nodes import MOST_NODE_CHARS, Joining, Nodes
from gearworkers.manager.objects import MOST_JSON_BYTES, ObjectCalls, answer
from gearworkers.manager.openapi import document, page
from gearworkers.manager.pacing import Body, TooLarge, TooSlow, broken_off, is_gone
from gearworkers.manager.tokens import Access
from gearworkers.manager.uploads import receive_whole
from gearworkers.remote.manager_messages import NODE_HEADER, Problem
from gearworkers.util.prometheus import METRICS_CONTENT_TYPE

_log = structlog.get_logger(__name__)

MOST_UNDER_WAY = 256
"""Requests at once; what comes beyond is asked to come again."""

_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (NotFound, 404),
    (AlreadyExists, 409),
    (InvalidInput, 400),
    (ResourceExhausted, 507),
    (Unavailable, 503),
    (GearError, 500),
    (msgspec.MsgspecError, 400),
    (UnicodeDecodeError, 400),
    (TooLarge, 413),
    (TooSlow, 408),
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the API."""

    method: str
    path: str
    name: str
    handler: Handler
    right: str
    """``read``, ``write``, or nothing: open to all."""


class Manager:
    """The API over one store; `application` is what a server serves."""

    def __init__(self, store: Store, access: Access, uploads: Path, patience_s: float) -> None:
        """
        Args:
            store: What is kept.
            access: Who may.
            uploads: A directory for what is on its way in.
            patience_s: For a client that sends or takes nothing.
        """
        self.metrics = Metrics()
        self._access = access
        self._nodes = Nodes()
        self._store = store
        self._uploads = uploads
        self._patience_s = patience_s
        self._under_way = 0
        self._objects = ObjectCalls(store, uploads, patience_s, self.metrics)
        self._documents = DocumentCalls(store, uploads, patience_s, self.metrics)

    def calls(self) -> list[Call]:
        """All of them."""
        objects, documents = self._objects, self._documents
        return [
            Call("HEAD", "/v1/objects/{digest}", "query_one", objects.query_one, "read"),
            Call("POST", "/v1/query", "query", objects.query, "read"),
            Call("GET", "/v1/objects/{digest}", "pull_one", objects.pull_one, "read"),
            Call("GET", "/v1/blobs/{digest}", "pull_blob", objects.pull_blob, "read"),
            Call("POST", "/v1/pull", "pull", objects.pull, "read"),
            Call("PUT", "/v1/objects/{digest}", "push_one", objects.push_one, "write"),
            Call("POST", "/v1/push", "push", objects.push, "write"),
            Call("GET", "/v1/documents/{name}", "get_document", documents.get, "read"),
            Call("PUT", "/v1/documents/{name}", "put_document", documents.put, "write"),
            Call("POST", "/v1/join", "join", self._join, "read"),
            Call("GET", "/v1/nodes", "nodes", self._list_nodes, "read"),
            Call("GET", "/metrics", "metrics", self._show_metrics, "read"),
            Call("GET", "/healthz", "health", self._health, ""),
            Call("GET", "/openapi.json", "openapi", self._openapi, ""),
            Call("GET", "/", "documentation", self._page, ""),
        ]

    def application(self) -> web.Application:
        """For aiohttp to serve."""
        app = web.Application(middlewares=[self._guard])
        for call in self.calls():
            app.router.add_route(call.method, call.path.replace("{name}", "{name:.+}"), self._answering(call))
        return app

    # -- around every call

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """For what no call is there for, too."""
        try:
            return await handler(request)
        except web.HTTPException as exc:
            if exc.status < 400:
                raise
            return _problem(exc.status, exc.text or exc.reason, dict(exc.headers))

    def _answering(self, call: Call) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            began_s = time.monotonic()
            self._under_way += 1
            self.metrics.under_way.inc()
            status = 500
            try:
                response = await self._answer(call, request)
                status = response.status
                return response
            except web.HTTPException as exc:
                status = exc.status
                raise
            finally:
                self._under_way -= 1
                self.metrics.under_way.dec()
                self.metrics.requests.labels(call.name, str(status)).inc()
                self.metrics.seconds.labels(call.name).observe(time.monotonic() - began_s)

        return handle

    async def _answer(self, call: Call, request: web.Request) -> web.StreamResponse:
        try:
            if (refusal := self._refused(call, request)) is not None:
                return refusal
            self._note_node(request)
            return await call.handler(request)
        except (GearError, msgspec.MsgspecError, UnicodeDecodeError, TooLarge, TooSlow) as exc:
            return self._told(call, request, exc)
        except Exception as exc:
            if is_gone(exc):
                return _problem(499, "the client left")
            raise

    def _refused(self, call: Call, request: web.Request) -> web.Response | None:
        if call.right and self._under_way > MOST_UNDER_WAY:
            return _problem(503, "too much is under way; come again", {"Retry-After": "1"})
        authorization = request.headers.get("Authorization", "")
        may = {"read": self._access.may_read, "write": self._access.may_write}.get(call.right)
        if may is None or may(authorization):
            return None
        if self._access.may_read(authorization) and authorization:
            return _problem(403, "this token may not write")
        return _problem(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    def _told(self, call: Call, request: web.Request, exc: Exception) -> web.StreamResponse:
        """An error as an answer; after the first byte of a body, a broken connection."""
        status = next((status for kind, status in _STATUSES if isinstance(exc, kind)), 500)
        if isinstance(exc, IntegrityError) and call.right == "write":
            status = 422
            self.metrics.refused.inc()
        if isinstance(exc, TooSlow):
            self.metrics.dropped.inc()
        if status >= 500:
            _log.error("a call failed", call=call.name, error=str(exc))
        return broken_off(request) or _problem(status, str(exc) or "too slow")

    def _note_node(self, request: web.Request) -> None:
        name = request.headers.get(NODE_HEADER, "")
        if name and len(name) <= MOST_NODE_CHARS and name.isprintable():
            self._nodes.seen(name, request.remote or "")

    # -- calls of no other room

    async def _join(self, request: web.Request) -> web.Response:
        body = Body(request, self._patience_s, self.metrics)
        asked = await receive_whole(body, self._store, self._uploads, MOST_JSON_BYTES)
        joining = msgspec.json.decode(asked, type=Joining)
        return answer(self._nodes.seen(joining.node, request.remote or ""))

    async def _list_nodes(self, request: web.Request) -> web.Response:
        return answer(self._nodes.alive())

    async def _show_metrics(self, request: web.Request) -> web.Response:
        self.metrics.nodes.set(len(self._nodes.alive()))
        return web.Response(
            body=generate_latest(self.metrics.registry),
            headers={"Content-Type": METRICS_CONTENT_TYPE},
        )

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.Response(
            body=msgspec.json.encode(document(tokens=not self._access.is_open)), content_type="application/json"
        )

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=page(), content_type="text/html")


def _problem(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    kept = {name: value for name, value in (headers or {}).items() if not name.lower().startswith("content-t")}
    kept.pop("Content-Length", None)
    body = msgspec.json.encode(Problem(text))
    return web.Response(body=body, status=status, headers=kept, content_type="application/json")
