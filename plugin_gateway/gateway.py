"""The gateway: the HTTP server on the plugin's Unix socket, and its life from start to SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from pathlib import Path

import structlog
from aiohttp import web

from gearworkers.errors import GearError, InvalidInput, from_os_error
from gearworkers.settings import Settings
from gearworkers.util.net import parse_host_port
from gearworkers.util.process import notify_ready
from gearworkers.util.prometheus import METRICS_CONTENT_TYPE
from gearworkers.workers.messages import Answer
from plugin_gateway.dispatch.claims import Body
from plugin_gateway.dispatch.dispatcher import Dispatcher, Outcome, Patience, make_order
from plugin_gateway.dispatch.maintenance import Upkeep
from plugin_gateway.graphdriver.calls import LIGHT_CALLS, Driver, layer_id
from plugin_gateway.graphdriver.connection import DockerConnection, HeavyRequest, connection_of
from plugin_gateway.graphdriver.messages import CONTENT_TYPE, MalformedRequest, Response, encode, error, failure
from plugin_gateway.graphdriver.threads import CallThreads
from plugin_gateway.metrics import Metrics
from plugin_gateway.sockets import BACKLOG, listen

_log = structlog.stdlib.get_logger(__name__)

_REQUEST_LIMIT_BYTES = 1 << 20
_KEEPALIVE_S = 7 * 86400.0  # dockerd closes its idle connections itself; ours to close would race with its requests
_GRACE_S = 20.0
_LIGHT_GRACE_S = 10.0
_STATUS = "GraphDriver.Status"
_QUIET = frozenset(("GraphDriver.Exists", _STATUS))  # dockerd drops their errors


class Gateway:
    """Answers dockerd.

    Args:
        settings: Of the node.
        driver: Does the light calls; what is heavy goes to workers.
        patience: How long workers are waited for.
    """

    def __init__(self, settings: Settings, driver: Driver, patience: Patience | None = None) -> None:
        self._settings = settings
        self._driver = driver
        self.metrics = Metrics()
        self._dispatcher = Dispatcher(settings, self.metrics, patience or Patience())
        self._upkeep = Upkeep(self._dispatcher, lambda: self._driver.settings, self.metrics)
        self._threads = CallThreads()
        self._heavy_tasks: set[asyncio.Task[None]] = set()
        self._to_dedupe: set[str] = set()
        self._runners: list[web.AppRunner] = []
        self._listener: socket.socket | None = None
        self._metrics_socket: Path | None = None
        self._server: asyncio.AbstractServer | None = None
        self._is_prepared = False

    # -- life

    async def serve(self) -> None:
        """Run until SIGTERM or SIGINT; returns when what was under way is finished or has had its time.

        Raises:
            FailedPrecondition: Another gateway runs here.
            GearError: A socket or GEAR_ROOT cannot be used.
        """
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await self.start()
            notify_ready(self._settings.notify_socket)
            await stop.wait()
        finally:
            await self.stop()

    async def start(self) -> None:
        """Repair what a crash left, then answer; raises as `serve`."""
        # Both sockets first: they keep a second gateway from the repairs, of which the one that runs knows nothing.
        self._listener = listen(self._settings.plugin_socket)
        self._make_run_dir()
        self._dispatcher.open()
        await asyncio.to_thread(self._driver.prepare)
        self._is_prepared = True
        self._dispatcher.use_broker(self._driver.settings)  # a dockerd that runs has named another, perhaps
        await self._serve_metrics()
        runner = web.AppRunner(
            self._light_app(), access_log=None, keepalive_timeout=_KEEPALIVE_S, shutdown_timeout=_LIGHT_GRACE_S
        )
        await runner.setup()
        self._runners.append(runner)
        assert runner.server is not None
        light = runner.server
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: DockerConnection(light, self._take_heavy), sock=self._listener, backlog=BACKLOG
        )
        self._upkeep.begin()
        _log.info("gateway listens", socket=str(self._settings.plugin_socket), root=str(self._settings.gear_root))

    async def stop(self) -> None:
        """Take no new connections, finish what is under way within some seconds, remove the sockets."""
        if self._listener is None:
            return
        if self._server is not None:
            self._server.close()
        self._settings.plugin_socket.unlink(missing_ok=True)  # while it is ours: the next one may come at once
        self._listener.close()
        if self._heavy_tasks:
            await asyncio.wait(self._heavy_tasks, timeout=_GRACE_S)
        for task in self._heavy_tasks:
            task.cancel()
        await self._upkeep.close()
        for runner in self._runners:
            await runner.cleanup()
        if self._metrics_socket is not None:
            self._metrics_socket.unlink(missing_ok=True)
        self._dispatcher.close()
        if self._is_prepared:
            await asyncio.to_thread(self._driver.release)
        self._threads.close()
        _log.info("gateway ended")

    def _make_run_dir(self) -> None:
        run_dir = self._settings.run_dir
        try:
            run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise from_os_error(exc, f"make GEAR_RUN_DIR {run_dir}") from exc

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
        status, answer = await self._called(method, body)
        self.metrics.observe(method, time.perf_counter() - begun_s, failed=answer is not None and bool(answer.err))
        return _http(status, encode(answer))

    async def _unknown(self, request: web.Request) -> web.Response:
        await request.read()
        connection_of(request.transport).light_request_ended()
        return _http(404, error(f"{request.method} {request.path}: this plugin has no such call"))

    async def _called(self, method: str, body: bytes) -> tuple[int, Response]:
        """Call the driver in a thread; HTTP status and answer."""
        try:
            answer = await self._threads.call(method, self._driver, body)
            return 200, await self._after(method, body, answer)
        except MalformedRequest as exc:
            return 400, failure(str(exc))
        except GearError as exc:
            log = _log.error if method in _QUIET else _log.warning
            log("call failed", method=method, error=str(exc))
            return 200, failure(str(exc))
        except OSError as exc:
            _log.exception("call failed", method=method)
            return 200, failure(str(from_os_error(exc, method)))
        except Exception as exc:
            _log.exception("call failed: a bug", method=method)
            return 500, failure(_internal(exc))

    async def _after(self, method: str, body: bytes, answer: Response) -> Response:
        """What a call that went well brings about."""
        if method == "GraphDriver.Init":
            self._dispatcher.use_broker(self._driver.settings)
        elif method == "GraphDriver.Remove":
            self._to_dedupe.discard(layer_id(body))
            self._upkeep.removed()
        elif method == "GraphDriver.Put":
            await self._dedupe_when_finished(layer_id(body))
        elif method == _STATUS:
            return Response(status=[*answer.status, *await self._own_status()])
        return answer

    async def _dedupe_when_finished(self, id: str) -> None:
        """A read-write layer whose Diff was taken is BuildKit's snapshot: once unmounted, its contents are shared."""
        if id not in self._to_dedupe:
            return
        try:
            ready = await self._threads.can_dedupe(self._driver, id)
        except GearError as exc:
            _log.debug("not deduplicated", id=id, error=str(exc))
            return
        if ready:
            self._to_dedupe.discard(id)
            self._upkeep.dedupe(id)

    async def _own_status(self) -> list[tuple[str, str]]:
        waiting, desk = await self._dispatcher.look(), self._dispatcher.desk
        at_work = ", ".join(
            f"{desk.serving(by, heavy=True) + desk.serving(by, heavy=False)} by {by}" for by in ("worker", "gateway")
        )
        stalled = desk.stalled("worker") + desk.stalled("gateway")
        if stalled:
            at_work += f"; {stalled} wait for their callers"
        return [("Queue", waiting), ("At Work", at_work), ("Degraded", self._dispatcher.health.summary())]

    # -- heavy calls

    def _take_heavy(self, request: HeavyRequest, connection: DockerConnection) -> None:
        task = asyncio.get_running_loop().create_task(self._heavy(request, connection))
        self._heavy_tasks.add(task)
        task.add_done_callback(self._heavy_tasks.discard)

    async def _heavy(self, request: HeavyRequest, connection: DockerConnection) -> None:
        """Get it done and see that its caller is told, come what may."""
        begun_s = time.perf_counter()
        failed = True
        try:
            outcome = await self._heavy_outcome(request, connection)
            failed = bool(outcome.answer.error)
            if failed:
                _log.warning(
                    "call failed", method=request.method, id=request.id, by=outcome.by, error=outcome.answer.error
                )
            _tell(request, connection, outcome)
            await self._after_heavy(request, failed)
        except BaseException as exc:
            connection.abort()
            if not isinstance(exc, asyncio.CancelledError):
                _log.exception("call failed: a bug", method=request.method, id=request.id)
        finally:
            self.metrics.observe(request.method, time.perf_counter() - begun_s, failed)

    async def _heavy_outcome(self, request: HeavyRequest, connection: DockerConnection) -> Outcome:
        call = "apply_diff" if request.method == "GraphDriver.ApplyDiff" else "diff"
        order = make_order(call, self._driver.settings, request.id, request.parent)
        try:
            return await self._dispatcher.do(order, Body(connection.descriptor(), request.body_bytes, request.head))
        except Exception as exc:  # broken off, dockerd would send the rest of a tar as another
            _log.exception("call failed: a bug", method=request.method, id=request.id)
            return Outcome(Answer(error=_internal(exc)), started=call == "diff", by="")

    async def _after_heavy(self, request: HeavyRequest, failed: bool) -> None:
        if failed:
            return
        if request.method == "GraphDriver.ApplyDiff":
            self._upkeep.stored()
        else:
            self._to_dedupe.add(request.id)
            await self._dedupe_when_finished(request.id)

    # -- metrics

    async def _serve_metrics(self) -> None:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_LIGHT_GRACE_S)
        await runner.setup()
        self._runners.append(runner)
        where = self._settings.effective_metrics_listen
        site: web.BaseSite
        if where.startswith("/"):
            site = web.SockSite(runner, listen(Path(where)))
            self._metrics_socket = Path(where)
        else:
            site = web.TCPSite(runner, *_host_and_port(where))
        try:
            await site.start()
        except OSError as exc:
            raise from_os_error(exc, f"serve metrics at {where}") from exc

    async def _metrics(self, request: web.Request) -> web.Response:
        await self._dispatcher.look()
        return web.Response(body=self.metrics.text(), headers={"Content-Type": METRICS_CONTENT_TYPE})


def _tell(request: HeavyRequest, connection: DockerConnection, outcome: Outcome) -> None:
    """Answer the caller; a Diff that has begun can only be broken off."""
    answer = outcome.answer
    if not answer.error and request.method == "GraphDriver.Diff":
        connection.close()
    elif not answer.error:
        connection.respond(200, encode(Response(size=answer.size_bytes)))
    elif outcome.started:
        connection.abort()
    else:
        connection.respond(500, error(answer.error))


def _internal(exc: Exception) -> str:
    return f"internal error: {type(exc).__name__}: {exc}; the gateway's log has more"


def _host_and_port(where: str) -> tuple[str, int]:
    try:
        host, port = parse_host_port(where)
    except ValueError:
        raise InvalidInput(f"GEAR_METRICS_LISTEN={where}: host:port or an absolute path is needed") from None
    return host or "127.0.0.1", port


def _http(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, headers={"Content-Type": CONTENT_TYPE})
