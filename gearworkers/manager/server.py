"""`gear manager`: listens, and finishes its requests before it stops."""

from __future__ import annotations

import asyncio
import resource
import signal
from pathlib import Path
from typing import cast

import structlog

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import FailedPrecondition, InvalidInput, from_os_error
from gearworkers.http_service.limits import MAX_CONNECTIONS, ConnectionLimit, limited_runner
from gearworkers.http_service.tls import Certificate
from gearworkers.http_service.tokens import Access
from gearworkers.manager.api import ManagerApi
from gearworkers.manager.async_remote import AsyncRemote
from gearworkers.remote.factory import open_blobs
from gearworkers.remote.remote import Remote
from gearworkers.settings import ManagerSettings, Settings
from gearworkers.util.net import is_loopback, parse_host_port
from gearworkers.util.process import notify_ready

_log = structlog.get_logger(__name__)

_BACKLOG = 512


class ManagerServer:
    """One listening manager."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            FailedPrecondition: Without tokens, other machines could reach it; or a token file cannot be used.
            InvalidInput: The address or the store is malformed.
        """
        self._settings = settings
        self._host, self._port = _address(settings.manager.listen)
        access = Access(write_tokens=settings.manager.write_tokens_file, read_tokens=settings.manager.read_tokens_file)
        if access.is_open and not is_loopback(self._host):
            raise FailedPrecondition(
                f"GEAR_MANAGER_LISTEN={settings.manager.listen}: other machines can reach this address, and without "
                "tokens everybody could write; set GEAR_MANAGER_WRITE_TOKENS_FILE, or listen on 127.0.0.1"
            )
        self._certificate = _certificate(settings.manager)
        if self._certificate is None and not is_loopback(self._host):
            _log.warning("tokens and objects are sent unencrypted; set GEAR_MANAGER_TLS_CERT_FILE")
        if not settings.manager.store:
            _make(settings.gear_root / "manager")
        remote = Remote(open_blobs(settings.effective_manager_store, settings))
        self._remote = AsyncRemote(remote, settings.manager.max_object_bytes)
        client_timeout_s = settings.manager.client_timeout_s
        self.api = ManagerApi(self._remote, access, settings.gear_root / "manager-uploads", client_timeout_s)
        self._runner = limited_runner(self.api.application(), client_timeout_s)
        self._connections = ConnectionLimit(MAX_CONNECTIONS, self.api.metrics.connections)
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            GearError: The store or the address cannot be used.
        """
        await self._remote.run(lambda: self._remote.remote.has([bytes(DIGEST_BYTES)]))
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        tls = self._certificate
        try:
            self._server = await loop.create_server(
                self._make_protocol,
                self._host,
                self._port,
                ssl=tls.context if tls is not None else None,
                ssl_handshake_timeout=None if tls is None else self._settings.manager.client_timeout_s,
                backlog=_BACKLOG,
            )
        except OSError as exc:
            raise from_os_error(exc, f"listen on {self._settings.manager.listen}") from exc
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Accept no more connections, and finish requests for up to a minute."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
        self._remote.close()

    def _make_protocol(self) -> asyncio.Protocol:
        assert self._runner.server is not None
        if self._certificate is not None:
            self._certificate.refresh()  # asyncio calls this method before the handshake
        return self._connections.limited(cast(asyncio.Protocol, self._runner.server()))


def serve(settings: Settings) -> None:
    """Run the manager until SIGTERM or SIGINT.

    Raises:
        GearError: As `ManagerServer`, or it cannot listen.
    """
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))  # for MAX_CONNECTIONS and the store's files
    asyncio.run(_serve(ManagerServer(settings), settings.notify_socket))


async def _serve(server: ManagerServer, notify_socket: str) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        port = await server.start()
        _log.info("the manager listens", port=port)
        notify_ready(notify_socket)
        await stopped.wait()
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


def _certificate(settings: ManagerSettings) -> Certificate | None:
    cert = settings.tls_cert_file
    if cert is None:
        return None
    return Certificate(cert, settings.tls_key_file, "GEAR_MANAGER_TLS_CERT_FILE")


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise from_os_error(exc, f"create {directory}") from exc
