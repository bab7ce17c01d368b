"""HTTP to registries: connections, certificates, proxies, and errors for unexpected responses.

urllib3 was chosen because well-known clients build on it, it imports quickly, reads bodies without copies in Python,
and drops Authorization on a redirect to another host: registries redirect to their storage.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import urllib3
from urllib3.exceptions import HTTPError, LocationParseError, ProxySchemeUnknown
from urllib3.util import Retry, Timeout, make_headers, parse_url

from gearworkers.errors import FailedPrecondition, GearError, InvalidInput, NotFound, Unavailable
from gearworkers.settings import RegistrySettings
from gearworkers.util.http_errors import from_http_error, retry_after_s
from gearworkers.util.net import host_name, is_loopback

CERTIFICATES = Path("/etc/docker/certs.d")
"""Directory that holds each registry's certificates; dockerd uses it as well."""

_TIMEOUT = Timeout(connect=15, read=60)
_PUT_TIMEOUT = Timeout(connect=15, read=600)
"""A registry on a bucket may copy a blob of many GB before it confirms the upload."""
_REDIRECTS = Retry(total=8, connect=0, read=0, status=0, other=0, redirect=8, respect_retry_after_header=False)
_CONNECTIONS = 8
_MAX_ERROR_BYTES = 64 << 10
_ERRORS_BY_STATUS: Mapping[int, type[GearError]] = {
    401: FailedPrecondition,
    403: FailedPrecondition,
    404: NotFound,
    408: Unavailable,
    425: Unavailable,
    429: Unavailable,
}


class _ErrorItem(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct, frozen=True):
    errors: tuple[_ErrorItem, ...] = ()


@dataclass(frozen=True, slots=True)
class Transport:
    """Connections to one registry and to the servers it redirects to; many threads may use it at once."""

    pool: urllib3.PoolManager

    def send(self, method: str, url: str, **options: Any) -> urllib3.BaseHTTPResponse:
        """Send one request; follow redirects, but retry nothing.

        Raises:
            Unavailable: The connection failed, or broke before the response.
            FailedPrecondition: The server's certificate is not trusted.
            InvalidInput: The URL or a redirect's target is malformed, or a header cannot be sent.
        """
        with translated(f"{method} {url.partition('?')[0]}"):
            timeout = _PUT_TIMEOUT if method == "PUT" else _TIMEOUT
            return self.pool.request(method, url, timeout=timeout, retries=_REDIRECTS, **options)


def open_transport(settings: RegistrySettings, host: str) -> Transport:
    """Return the transport to the registry *host*, with its certificates in CERTIFICATES and the proxy in *settings*.

    Raises:
        FailedPrecondition: A certificate cannot be read.
        InvalidInput: The proxy's URL is malformed or has an unknown scheme.
    """
    context = _context(CERTIFICATES / host)
    name = host_name(host)
    if settings.https_proxy and not is_loopback(name) and not _bypassed(name, settings.no_proxy):
        return Transport(_proxy(settings.https_proxy, context))
    return Transport(urllib3.PoolManager(ssl_context=context, maxsize=_CONNECTIONS))


@contextmanager
def translated(tried: str) -> Iterator[None]:
    """Translate the errors of urllib3 that the context raises.

    Args:
        tried: The attempted operation; the first half of the message.
    """
    try:
        yield
    except (HTTPError, OSError) as exc:
        raise from_http_error(exc, tried, f"{CERTIFICATES}/HOST/ca.crt") from exc
    except ValueError:  # its text may contain a token
        raise InvalidInput(f"{tried}: the URL or the token for it is malformed") from None


def error_of(response: urllib3.BaseHTTPResponse, tried: str) -> GearError:
    """Return the error for an unexpected status, with the registry's message from the body."""
    status = response.status
    kind = _ERRORS_BY_STATUS.get(status) or (Unavailable if status >= 500 else InvalidInput)
    advice = "; `docker login` may help" if status in (401, 403) else ""
    return kind(f"{tried}: HTTP {status}{_messages(response)}{advice}").with_retry_after(retry_after_s(response))


def _messages(response: urllib3.BaseHTTPResponse) -> str:
    try:
        body = response.read(_MAX_ERROR_BYTES) or response.data  # data holds a body that was read before
        found = msgspec.json.decode(body, type=_Errors).errors
    except (HTTPError, OSError, ValueError):
        return ""
    return "".join(f": {item.code} {item.message}".rstrip() for item in found[:3])


def _proxy(text: str, context: ssl.SSLContext) -> urllib3.ProxyManager:
    """Return the proxy at ``[http[s]://][USER:PASSWORD@]HOST:PORT``."""
    try:
        url = parse_url(text if "://" in text else f"http://{text}")
        headers = make_headers(proxy_basic_auth=unquote(url.auth)) if url.auth else None
        return urllib3.ProxyManager(url.url, proxy_headers=headers, ssl_context=context, maxsize=_CONNECTIONS)
    except (LocationParseError, ProxySchemeUnknown, UnicodeEncodeError):  # their messages would show the password
        raise InvalidInput("HTTPS_PROXY is malformed; set http[s]://[USER:PASSWORD@]HOST:PORT") from None


def _bypassed(name: str, no_proxy: str) -> bool:
    """Return whether the list *no_proxy* contains *name* or a parent domain; ``*`` matches all names."""
    entries = [entry.strip().removeprefix("*").lstrip(".") or "*" for entry in no_proxy.split(",") if entry.strip()]
    return any(entry == "*" or name == entry or name.endswith(f".{entry}") for entry in entries)


def _context(directory: Path) -> ssl.SSLContext:
    """Return a TLS context with the system's CAs, and the CAs (``*.crt``) and client certificates of *directory*."""
    context = ssl.create_default_context()
    try:
        for path in sorted(directory.glob("*.crt")):
            context.load_verify_locations(path)
        for path in sorted(directory.glob("*.cert")):
            context.load_cert_chain(path, path.with_suffix(".key"))
    except OSError as exc:
        raise FailedPrecondition(f"cannot use a certificate in {directory}: {exc}") from exc
    return context
