"""The graphdriver front door: the HTTP server on the plugin's Unix socket.

The driver answers light calls in threads. Heavy calls become jobs of the dispatcher, which hands the connection over.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import structlog
from aiohttp import web

from gearworkers.errors import GearError, from_os_error
from gearworkers.workers.messages import ApplyDiff, Diff, HeavyJob, HttpConnection
from plugin_gateway.dispatch.dispatcher import Dispatcher
from plugin_gateway.dispatch.maintenance import Maintenance
from plugin_gateway.dispatch.pending_job import PendingJob
from plugin_gateway.graphdriver.calls import LIGHT_CALLS, Driver, layer_id
from plugin_gateway.graphdriver.connection import DockerConnection, HeavyRequest, connection_of
from plugin_gateway.graphdriver.messages import CONTENT_TYPE, MalformedRequest, Response, encode, error, failure
from plugin_gateway.graphdriver.threads import CallThreads
from plugin_gateway.metrics import GatewayMetrics
from plugin_gateway.sockets import BACKLOG, listen

_log = structlog.stdlib.get_logger(__name__)

HEAVY_GRACE_S = 20.0
"""Seconds for heavy calls in progress to end when the server closes."""
LIGHT_GRACE_S = 10.0
"""Seconds for light calls in progress to end when the server closes."""

_REQUEST_LIMIT_BYTES = 1 << 20
_KEEPALIVE_S = 7 * 86400.0  # dockerd closes idle connections itself; if this side did, it could hit a new request
_JOBS: Mapping[str, type[HeavyJob]] = {"GraphDriver.ApplyDiff": ApplyDiff, "GraphDriver.Diff": Diff}
_STATUS = "GraphDriver.Status"
_DROPPED_ERRORS = frozenset(("GraphDriver.Exists", _STATUS))
"""Calls whose errors dockerd does not show."""


class GraphDriverServer:
    """Answers dockerd.

    Args:
        path: The plugin's socket.
        driver: Answers the light calls.
        dispatcher: Runs the heavy calls.
        maintenance: Notified of calls that make maintenance due.
        metrics: Counts the calls.
        light_grace_s: As LIGHT_GRACE_S.
    """

    def __init__(
        self,
        path: Path,
        driver: Driver,
        dispatcher: Dispatcher,
        maintenance: Maintenance,
        metrics: GatewayMetrics,
        *,
        light_grace_s: float = LIGHT_GRACE_S,
    ) -> None:
        self._path = path
        self._driver = driver
        self._dispatcher = dispatcher
        self._maintenance = maintenance
        self._metrics = metrics
        self._threads = CallThreads()
        self._heavy_tasks: set[asyncio.Task[None]] = set()
        self._dedupe_candidates: set[str] = set()
        self._runner = web.AppRunner(
            self._light_app(), access_log=None, keepalive_timeout=_KEEPALIVE_S, shutdown_timeout=light_grace_s
        )
        self._listener: socket.socket | None = None
        self._server: asyncio.AbstractServer | None = None

    # -- life

    def bind(self) -> None:
        """Reserve the socket; connections wait until `open`.

        Raises:
            FailedPrecondition: Another gateway answers there.
            GearError: The kernel refuses.
        """
        self._listener = listen(self._path)

    async def open(self) -> None:
        """Answer calls."""
        await self._runner.setup()
        light = self._runner.server
        assert light is not None and self._listener is not None
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: DockerConnection(light, self._take_heavy), sock=self._listener, backlog=BACKLOG
        )

    async def close(self) -> None:
        """Accept no new connections, finish the calls in progress within their grace, remove the socket."""
        if self._listener is None:
            return
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)  # before the close, after which a next gateway may own the path
        self._listener.close()
        if self._heavy_tasks:
            await asyncio.wait(self._heavy_tasks, timeout=HEAVY_GRACE_S)
        for task in self._heavy_tasks:
            task.cancel()
        await self._runner.cleanup()
        self._threads.close()

    # -- light calls

    def _light_app(self) -> web.Application:
        app = web.Application(client_max_size=_REQUEST_LIMIT_BYTES)
        app.router.add_post("/{method}", self._light)
        app.router.add_route("*", "/{method:.*}", self._unknown)
        return app

    async def _light(self, request: web.Request) -> web.Response:
        method = request.match_info["method"]
        body = await request.read()
        connection_of(request.transport).light_request_ended()
        if method == "Plugin.Activate":
            return _http(200, encode(Response(implements=["GraphDriver"])))
        if method not in LIGHT_CALLS:
            return await self._unknown(request)
        begun_s = time.perf_counter()
        status, response = await self._call(method, body)
        self._metrics.observe(method, time.perf_counter() - begun_s, failed=bool(response.err))
        return _http(status, encode(response))

    async def _unknown(self, request: web.Request) -> web.Response:
        await request.read()
        connection_of(request.transport).light_request_ended()
        return _http(404, error(f"{request.method} {request.path}: this plugin has no such call"))

    async def _call(self, method: str, body: bytes) -> tuple[int, Response]:
        """Call the driver in a thread; return HTTP status and response."""
        try:
            response = await self._threads.call(method, self._driver, body)
            return 200, await self._after_light(method, body, response)
        except MalformedRequest as exc:
            return 400, failure(str(exc))
        except GearError as exc:
            log = _log.error if method in _DROPPED_ERRORS else _log.warning
            log("call failed", method=method, error=str(exc))
            return 200, failure(str(exc))
        except OSError as exc:
            _log.exception("call failed", method=method)
            return 200, failure(str(from_os_error(exc, method)))
        except Exception as exc:
            _log.exception("call failed: a bug", method=method)
            return 500, failure(_internal(exc))

    async def _after_light(self, method: str, body: bytes, response: Response) -> Response:
        """Run the follow-ups of a successful call; return its response."""
        if method == "GraphDriver.Init":
            self._dispatcher.use_broker(self._driver.settings)
        elif method == "GraphDriver.Remove":
            self._dedupe_candidates.discard(layer_id(body))
            self._maintenance.layer_removed()
        elif method == "GraphDriver.Put":
            await self._dedupe_if_finished(layer_id(body))
        elif method == _STATUS:
            return Response(status=[*response.status, *await self._dispatcher.status()])
        return response

    async def _dedupe_if_finished(self, id: str) -> None:
        """Deduplicate a read-write layer after its Diff and its unmount: then it is a snapshot of BuildKit."""
        if id not in self._dedupe_candidates:
            return
        try:
            ready = await self._threads.can_dedupe(self._driver, id)
        except GearError as exc:
            _log.debug("not deduplicated", id=id, error=str(exc))
            return
        if ready and id in self._dedupe_candidates:  # else the Put or the Diff at the same time was first
            self._dedupe_candidates.discard(id)
            self._maintenance.dedupe(id)

    # -- heavy calls

    def _take_heavy(self, request: HeavyRequest, connection: DockerConnection) -> None:
        task = asyncio.get_running_loop().create_task(self._heavy(request, connection))
        self._heavy_tasks.add(task)
        task.add_done_callback(self._heavy_tasks.discard)

    async def _heavy(self, request: HeavyRequest, connection: DockerConnection) -> None:
        """Run the call, and end its connection in any case."""
        begun_s = time.perf_counter()
        failed = True
        try:
            failed = not await self._run_heavy(request, connection)
            if not failed:
                await self._after_heavy(request)
        except BaseException as exc:
            connection.abort()
            if not isinstance(exc, asyncio.CancelledError):
                _log.exception("call failed: a bug", method=request.method, id=request.id)
        finally:
            self._metrics.observe(request.method, time.perf_counter() - begun_s, failed)

    async def _run_heavy(self, request: HeavyRequest, connection: DockerConnection) -> bool:
        """Run the call's job and end the connection; return whether the job succeeded."""
        kind = _JOBS[request.method]
        try:
            job = kind(gear_root=str(self._driver.settings.gear_root), id=request.id, parent=request.parent)
            stream = HttpConnection(request.body_bytes, request.head)
            done = await self._dispatcher.run(job, stream, connection.descriptor())
        except Exception as exc:
            _log.exception("call failed: a bug", method=request.method, id=request.id)
            if kind is Diff:
                connection.abort()  # its response may have begun
            else:  # after an abort dockerd would send the rest of the tar as a new request
                connection.respond(500, error(_internal(exc)))
            return False
        if done.result.error:
            _log.warning("call failed", method=request.method, id=request.id, by=done.by, error=done.result.error)
        _respond(connection, done)
        return not done.result.error

    async def _after_heavy(self, request: HeavyRequest) -> None:
        if request.method == "GraphDriver.ApplyDiff":
            self._maintenance.layer_stored()
        else:
            self._dedupe_candidates.add(request.id)
            await self._dedupe_if_finished(request.id)


def _respond(connection: DockerConnection, done: PendingJob) -> None:
    """End the call's connection; after the first byte of a Diff only an abort can report an error."""
    result = done.result
    if result.error:
        if done.progress.response_begun:
            connection.abort()
        else:
            connection.respond(500, error(result.error))
    elif isinstance(done.job, Diff):
        connection.close()
    else:
        connection.respond(200, encode(Response(size=result.size_bytes)))


def _internal(exc: Exception) -> str:
    return f"internal error: {type(exc).__name__}: {exc}; the gateway's log has more"


def _http(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, headers={"Content-Type": CONTENT_TYPE})
