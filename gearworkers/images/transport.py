"""HTTP to registries: connections, certificates, proxies, and what an answer means that was not hoped for.

urllib3, since it is what the well-known clients stand on, has nothing to do at import, gives a body by readinto
without copies in Python, and drops Authorization on a redirect to another host, which registries send to their
storage.
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
"""Certificates by registry, as Docker's daemon has them."""

_TIMEOUT = Timeout(connect=15, read=60)
_PUT_TIMEOUT = Timeout(connect=15, read=600)
"""A registry over a bucket copies a blob of many GB before it confirms it."""
_REDIRECTS = Retry(total=8, connect=0, read=0, status=0, other=0, redirect=8, respect_retry_after_header=False)
_CONNECTIONS = 8
_SHOWN_ERROR_BYTES = 64 << 10
_PROBLEMS: Mapping[int, type[GearError]] = {
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
    """Connections to one registry and to where it redirects; used from many threads at once."""

    pool: urllib3.PoolManager

    def send(self, method: str, url: str, **options: Any) -> urllib3.BaseHTTPResponse:
        """One request; redirects are followed, nothing is tried twice.

        Raises:
            Unavailable: No connection, or it broke before the answer.
            FailedPrecondition: The server's certificate is not trusted.
        InvalidInput: The URL, or one that it redirects to, is none, or a header cannot be sent.
        """
        with translated(f"{method} {url.partition('?')[0]}"):
            timeout = _PUT_TIMEOUT if method == "PUT" else _TIMEOUT
            return self.pool.request(method, url, timeout=timeout, retries=_REDIRECTS, **options)


def make_transport(settings: RegistrySettings, host: str) -> Transport:
    """Connections for the registry *host*, with its certificates of CERTIFICATES and the proxy of *settings*.

    Raises:
        FailedPrecondition: A certificate there cannot be read.
        InvalidInput: The proxy is none that is known.
    """
    context = _context(CERTIFICATES / host)
    name = host_name(host)
    if settings.https_proxy and not is_loopback(name) and not _bypassed(name, settings.no_proxy):
        return Transport(_proxy(settings.https_proxy, context))
    return Transport(urllib3.PoolManager(ssl_context=context, maxsize=_CONNECTIONS))


@contextmanager
def translated(tried: str) -> Iterator[None]:
    """Tell urllib3's errors in ours.

    Args:
        tried: What was being done: the first half of the message.
    """
    try:
        yield
    except (HTTPError, OSError) as exc:
        raise from_http_error(exc, tried, f"{CERTIFICATES}/HOST/ca.crt") from exc
    except ValueError:  # its text may be a token
        raise InvalidInput(f"{tried}: the URL, or the token, that was given for it is malformed") from None


def problem(response: urllib3.BaseHTTPResponse, tried: str) -> GearError:
    """What a status that was not hoped for means; reads the body for the registry's own words."""
    status = response.status
    kind = _PROBLEMS.get(status) or (Unavailable if status >= 500 else InvalidInput)
    advice = "; `docker login` may help" if status in (401, 403) else ""
    return kind(f"{tried}: HTTP {status}{_said(response)}{advice}").after(retry_after_s(response))


def _said(response: urllib3.BaseHTTPResponse) -> str:
    try:
        body = response.read(_SHOWN_ERROR_BYTES) or response.data  # the latter, if it was read already
        found = msgspec.json.decode(body, type=_Errors).errors
    except (HTTPError, OSError, ValueError):
        return ""
    return "".join(f": {item.code} {item.message}".rstrip() for item in found[:3])


def _proxy(text: str, context: ssl.SSLContext) -> urllib3.ProxyManager:
    """The proxy at ``[http[s]://][USER:PASSWORD@]HOST:PORT``."""
    try:
        url = parse_url(text if "://" in text else f"http://{text}")
        headers = make_headers(proxy_basic_auth=unquote(url.auth)) if url.auth else None
        return urllib3.ProxyManager(url.url, proxy_headers=headers, ssl_context=context, maxsize=_CONNECTIONS)
    except (LocationParseError, ProxySchemeUnknown, UnicodeEncodeError):  # they would show its password
        raise InvalidInput("HTTPS_PROXY: http[s]://[USER:PASSWORD@]HOST:PORT is needed") from None


def _bypassed(name: str, no_proxy: str) -> bool:
    """Whether *name* is, or lies in a domain, on the list *no_proxy*; ``*`` is all."""
    entries = [entry.strip().removeprefix("*").lstrip(".") or "*" for entry in no_proxy.split(",") if entry.strip()]
    return any(entry == "*" or name == entry or name.endswith(f".{entry}") for entry in entries)


def _context(directory: Path) -> ssl.SSLContext:
    """The system's trust, and what *directory* holds: ``*.crt`` are CAs, ``*.cert`` and ``*.key`` a client's pair."""
    context = ssl.create_default_context()
    try:
        for path in sorted(directory.glob("*.crt")):
            context.load_verify_locations(path)
        for path in sorted(directory.glob("*.cert")):
            context.load_cert_chain(path, path.with_suffix(".key"))
    except OSError as exc:
        raise FailedPrecondition(f"a certificate of {directory} cannot be used: {exc}") from exc
    return context
