"""`gear manager`: listens, bounds what connections may take, stops by finishing what it serves."""

from __future__ import annotations

import asyncio
import resource
import signal
from pathlib import Path
from typing import cast

import structlog
from aiohttp import web

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import FailedPrecondition, InvalidInput, from_os_error
from gearworkers.manager.api import Manager
from gearworkers.manager.async_remote import Store
from gearworkers.manager.tls import certificate
from gearworkers.manager.tokens import Access
from gearworkers.remote.factory import open_blobs
from gearworkers.remote.remote import Remote
from gearworkers.settings import Settings
from gearworkers.util.net import is_loopback, parse_host_port
from gearworkers.util.process import tell_ready

_log = structlog.get_logger(__name__)

MOST_CONNECTIONS = 2048
_MOST_LINE_BYTES = 8190
_LINGERING_S = 1.0
FINISHING_S = 60.0
_BACKLOG = 512


class ManagerServer:
    """One listening manager."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            FailedPrecondition: It would listen beyond this machine to whoever comes, or a token file is empty.
            InvalidInput: Where to listen, or the store, cannot be understood.
        """
        self._settings = settings
        self._host, self._port = _address(settings.manager_listen)
        access = Access(settings)
        if access.is_open and not is_loopback(self._host):
            raise FailedPrecondition(
                f"GEAR_MANAGER_LISTEN={settings.manager_listen} can be reached by others, and anybody could write; "
                "set GEAR_MANAGER_WRITE_TOKENS_FILE, or listen on 127.0.0.1"
            )
        self._tls = certificate(settings)
        if self._tls is None and not is_loopback(self._host):
            _log.warning("tokens and objects go over the network in the clear; set GEAR_MANAGER_TLS_CERT_FILE")
        if not settings.manager_store:
            _make(settings.gear_root / "manager")
        remote = Remote(open_blobs(settings.effective_manager_store, settings))
        self._store = Store(remote, settings.manager_most_object_bytes)
        uploads = settings.gear_root / "manager-uploads"
        patience_s = settings.manager_client_timeout_s
        self.manager = Manager(self._store, access, uploads, patience_s)
        self._runner = web.AppRunner(
            self.manager.application(),
            access_log=None,
            keepalive_timeout=patience_s,  # for a connection's first header, too
            lingering_time=_LINGERING_S,
            max_line_size=_MOST_LINE_BYTES,
            max_field_size=_MOST_LINE_BYTES,
            shutdown_timeout=FINISHING_S,
        )
        self._connections = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; the port.

        Raises:
            GearError: The store cannot be used, or the address.
        """
        await self._store.run(lambda: self._store.remote.has([bytes(DIGEST_BYTES)]))
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                self._connection,
                self._host,
                self._port,
                ssl=self._tls.context if self._tls is not None else None,
                ssl_handshake_timeout=None if self._tls is None else self._settings.manager_client_timeout_s,
                backlog=_BACKLOG,
            )
        except OSError as exc:
            raise from_os_error(exc, f"listen on {self._settings.manager_listen}") from exc
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Finish what is served, for a minute at most; nothing new is taken."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
        self._store.close()

    def _connection(self) -> asyncio.Protocol:
        assert self._runner.server is not None
        if self._tls is not None:
            self._tls.refresh()  # asyncio asks for the protocol before it shakes hands
        inner = cast(asyncio.Protocol, self._runner.server())
        return _Counted(inner, self)

    def opened(self) -> bool:
        """Count a connection; whether it may stay."""
        self._connections += 1
        self.manager.metrics.connections.inc()
        return self._connections <= MOST_CONNECTIONS

    def closed(self) -> None:
        """Count it out."""
        self._connections -= 1
        self.manager.metrics.connections.dec()


class _Counted(asyncio.Protocol):
    """aiohttp's connection, but ended at once if there are too many."""

    def __init__(self, inner: asyncio.Protocol, server: ManagerServer) -> None:
        self._inner = inner
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(transport)
        if not self._server.opened():
            cast(asyncio.Transport, transport).abort()

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed()
        self._inner.connection_lost(exc)


def serve(settings: Settings) -> None:
    """Be the manager until SIGTERM or SIGINT.

    Raises:
        GearError: As `ManagerServer`, or it cannot listen.
    """
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # MOST_CONNECTIONS, and files of the store
    asyncio.run(_serve(ManagerServer(settings), settings.notify_socket))


async def _serve(server: ManagerServer, notify_socket: str) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    try:
        port = await server.start()
        _log.info("the manager listens", port=port)
        tell_ready(notify_socket)
        await ended.wait()
    finally:
        await server.stop()


def _address(listen: str) -> tuple[str, int]:
    try:
        host, port = parse_host_port(listen)
    except ValueError as exc:
        raise InvalidInput(f"GEAR_MANAGER_LISTEN={exc}") from None
    if not host:
        raise InvalidInput(f"GEAR_MANAGER_LISTEN={listen}: HOST:PORT is needed")
    return host, port


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise from_os_error(exc, f"make {directory}") from exc
