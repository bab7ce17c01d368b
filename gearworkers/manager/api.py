"""The manager's API: routes, access, the form of errors, metrics."""

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
from gearworkers.http_service.pacing import TooLarge, TooSlow, abort_started, is_disconnect
from gearworkers.http_service.tokens import Access
from gearworkers.manager.async_remote import AsyncRemote
from gearworkers.manager.documents import DocumentHandlers
from gearworkers.manager.metrics import ManagerMetrics
from gearworkers.manager.nodes import MAX_NAME_CHARS, NodeRegistry
from gearworkers.manager.objects import ObjectHandlers, json_response
from gearworkers.manager.openapi import document, page
from gearworkers.manager.uploads import Uploads
from gearworkers.remote.manager_messages import NODE_HEADER, Problem
from gearworkers.util.prometheus import METRICS_CONTENT_TYPE

_log = structlog.get_logger(__name__)

MAX_REQUESTS = 256
"""Requests at once; further ones get 503 and Retry-After."""

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
class Route:
    """One call of the API."""

    method: str
    path: str
    name: str
    handler: Handler
    access: str
    """``read``, ``write``, or empty: everybody may call it, and MAX_REQUESTS does not apply."""


class ManagerApi:
    """The API over one remote; `application` returns it for a server."""

    def __init__(self, remote: AsyncRemote, access: Access, uploads: Path, client_timeout_s: float) -> None:
        """
        Args:
            remote: Stores everything.
            access: Decides which requests may read and write.
            uploads: A directory for bodies on their way in.
            client_timeout_s: Longest time in which a client sends or receives nothing.
        """
        self.metrics = ManagerMetrics()
        self._access = access
        self._nodes = NodeRegistry()
        self._uploads = Uploads(remote, uploads, client_timeout_s, self.metrics.received.inc)
        self._objects = ObjectHandlers(self._uploads, client_timeout_s, self.metrics)
        self._documents = DocumentHandlers(self._uploads)
        self._in_progress = 0

    def routes(self) -> list[Route]:
        """Return all calls of the API."""
        objects, documents = self._objects, self._documents
        return [
            Route("HEAD", "/v1/objects/{digest}", "query_one", objects.query_one, "read"),
            Route("POST", "/v1/query", "query", objects.query, "read"),
            Route("GET", "/v1/objects/{digest}", "pull_one", objects.pull_one, "read"),
            Route("GET", "/v1/blobs/{digest}", "pull_blob", objects.pull_blob, "read"),
            Route("POST", "/v1/pull", "pull", objects.pull, "read"),
            Route("PUT", "/v1/objects/{digest}", "push_one", objects.push_one, "write"),
            Route("POST", "/v1/push", "push", objects.push, "write"),
            Route("GET", "/v1/documents/{name}", "get_document", documents.get, "read"),
            Route("PUT", "/v1/documents/{name}", "put_document", documents.put, "write"),
            Route("GET", "/v1/nodes", "nodes", self._list_nodes, "read"),
            Route("GET", "/metrics", "metrics", self._show_metrics, "read"),
            Route("GET", "/healthz", "health", self._health, ""),
            Route("GET", "/openapi.json", "openapi", self._openapi, ""),
            Route("GET", "/", "documentation", self._page, ""),
        ]

    def application(self) -> web.Application:
        """Return the application for aiohttp."""
        app = web.Application(middlewares=[self._json_errors])
        for route in self.routes():
            app.router.add_route(route.method, route.path.replace("{name}", "{name:.+}"), self._counted(route))
        return app

    # -- around every call

    @web.middleware
    async def _json_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Give aiohttp's own errors, such as those of unknown paths, the form of the API's errors."""
        try:
            return await handler(request)
        except web.HTTPException as exc:
            if exc.status < 400:
                raise
            return _problem(exc.status, exc.text or exc.reason, dict(exc.headers))

    def _counted(self, route: Route) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            started_s = time.monotonic()
            self._in_progress += 1
            self.metrics.in_progress.inc()
            status = 500
            try:
                response = await self._answer(route, request)
                status = response.status
                return response
            except web.HTTPException as exc:
                status = exc.status
                raise
            finally:
                self._in_progress -= 1
                self.metrics.in_progress.dec()
                self.metrics.requests.labels(route.name, str(status)).inc()
                self.metrics.seconds.labels(route.name).observe(time.monotonic() - started_s)

        return handle

    async def _answer(self, route: Route, request: web.Request) -> web.StreamResponse:
        try:
            if (rejection := self._rejection(route, request)) is not None:
                return rejection
            self._note_node(request)
            return await route.handler(request)
        except (GearError, msgspec.MsgspecError, UnicodeDecodeError, TooLarge, TooSlow) as exc:
            return self._failure(route, request, exc)
        except Exception as exc:
            if is_disconnect(exc):
                return _problem(499, "the client disconnected")
            raise

    def _rejection(self, route: Route, request: web.Request) -> web.Response | None:
        """Return the answer to a request that may not run; None if it may."""
        if route.access and self._in_progress > MAX_REQUESTS:
            return _problem(503, "too many requests are in progress; retry", {"Retry-After": "1"})
        authorization = request.headers.get("Authorization", "")
        may = {"read": self._access.may_read, "write": self._access.may_write}.get(route.access)
        if may is None or may(authorization):
            return None
        if self._access.may_read(authorization) and authorization:
            return _problem(403, "this token does not allow writing")
        return _problem(401, "a bearer token is required", {"WWW-Authenticate": "Bearer"})

    def _failure(self, route: Route, request: web.Request, exc: Exception) -> web.StreamResponse:
        """Answer with the error; once the response has started, abort the connection instead."""
        status = next((status for kind, status in _STATUSES if isinstance(exc, kind)), 500)
        if isinstance(exc, IntegrityError) and route.access == "write":
            status = 422
            self.metrics.refused.inc()
        if isinstance(exc, TooSlow):
            self.metrics.dropped.inc()
        if status >= 500:
            _log.error("a call failed", call=route.name, error=str(exc))
        return abort_started(request) or _problem(status, str(exc) or "the client is too slow")

    def _note_node(self, request: web.Request) -> None:
        name = request.headers.get(NODE_HEADER, "")
        if name and len(name) <= MAX_NAME_CHARS and name.isprintable():
            self._nodes.seen(name, request.remote or "")

    # -- calls for nodes, and for the service itself

    async def _list_nodes(self, request: web.Request) -> web.Response:
        return json_response(self._nodes.alive())

    async def _show_metrics(self, request: web.Request) -> web.Response:
        self.metrics.nodes.set(len(self._nodes.alive()))
        return web.Response(body=generate_latest(self.metrics.registry), headers={"Content-Type": METRICS_CONTENT_TYPE})

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
