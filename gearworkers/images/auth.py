"""Authenticate to a registry, with Basic credentials or with a Bearer token from the registry's token server.

Source: distribution, "Token Authentication Specification" and "OAuth2 Token Authentication"; RFC 9110, section 11.6.
"""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import msgspec

from gearworkers.errors import FailedPrecondition
from gearworkers.images.credentials import Credentials, find_credentials
from gearworkers.images.transport import Transport, error_of, translated
from gearworkers.util.net import is_loopback

_CLIENT = "gearworkers"
_MIN_LIFETIME_S = 60
"""Minimum lifetime of a token, and the specification's default for a token without `expires_in`."""
_EXPIRY_MARGIN_S = 15
_SCHEMES = ("bearer", "basic")
"""The supported schemes, in order of preference."""
_PART = re.compile(r'([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))|([A-Za-z_][A-Za-z0-9_-]*)')
"""A parameter, or a scheme; the parameters after a scheme belong to it."""


class _Token(msgspec.Struct, frozen=True):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


@dataclass(frozen=True, slots=True)
class Challenge:
    """The scheme and parameters of a WWW-Authenticate header."""

    scheme: str
    parameters: Mapping[str, str]

    @classmethod
    def parse(cls, header: str) -> Challenge | None:
        """Find ``Bearer realm="…",service="…"`` or ``Basic realm="…"`` in a header; None if it offers neither."""
        offered: dict[str, dict[str, str]] = {}
        parameters: dict[str, str] = {}
        for key, quoted, bare, scheme in _PART.findall(header):
            if scheme:
                parameters = offered.setdefault(scheme.lower(), {})
            else:
                parameters[key.lower()] = quoted or bare
        return next((cls(scheme, offered[scheme]) for scheme in _SCHEMES if scheme in offered), None)


@dataclass
class Authenticator:
    """The authorizations for one registry, cached until shortly before they expire; many threads may use it at once."""

    host: str
    """As in an image's name."""
    transport: Transport
    docker_config: Path
    tokens: dict[tuple[str, ...], tuple[str, float]] = field(default_factory=dict)
    """Cached Authorization headers and their expiry in monotonic time, by scopes."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cached(self, scopes: tuple[str, ...]) -> str | None:
        """Return the Authorization header for *scopes* if a valid one is cached."""
        with self._lock:
            value, expiry_s = self.tokens.get(scopes, ("", 0.0))
            return value if time.monotonic() < expiry_s else None

    def authorize(self, header: str, scopes: tuple[str, ...]) -> str:
        """Return the Authorization header that answers the challenge *header*, and cache it.

        Raises:
            FailedPrecondition: Credentials are missing or rejected, or would be sent unencrypted.
            Unavailable: The token server does not answer.
        """
        challenge = Challenge.parse(header)
        if challenge is None:
            raise FailedPrecondition(f"{self.host} requires an unsupported authentication scheme: {header[:100]!r}")
        credentials = find_credentials(self.docker_config, self.host)
        if challenge.scheme == "basic":
            value, lifetime_s = self._basic(credentials), float("inf")
        else:
            value, lifetime_s = self._bearer(challenge, credentials, scopes)
        with self._lock:
            self.tokens[scopes] = value, time.monotonic() + lifetime_s
        return value

    def forget(self, scopes: tuple[str, ...]) -> None:
        """Drop an authorization that the registry rejected."""
        with self._lock:
            self.tokens.pop(scopes, None)

    def _basic(self, credentials: Credentials | None) -> str:
        if credentials is None or not credentials.user:
            raise FailedPrecondition(
                f"{self.host} requires a password, but none is stored; run `docker login {self.host}`"
            )
        return _basic(credentials)

    def _bearer(
        self, challenge: Challenge, credentials: Credentials | None, scopes: tuple[str, ...]
    ) -> tuple[str, float]:
        realm = challenge.parameters.get("realm", "")
        self._reject_unencrypted_realm(realm, credentials)
        fields = [("service", challenge.parameters.get("service", "")), *(("scope", scope) for scope in scopes)]
        if credentials is not None and credentials.identity_token:
            token = self._exchange(realm, fields, credentials)
        else:
            token = self._fetch(realm, fields, credentials)
        value = token.token or token.access_token
        if not value:
            raise FailedPrecondition(f"the token server {realm} of {self.host} returned no token")
        return f"Bearer {value}", max(token.expires_in or 0, _MIN_LIFETIME_S) - _EXPIRY_MARGIN_S

    def _reject_unencrypted_realm(self, realm: str, credentials: Credentials | None) -> None:
        with translated(f"get a token for {self.host}"):
            url = urlsplit(realm)
        is_unencrypted = url.scheme == "http" and not is_loopback(url.hostname or "")
        if url.scheme not in ("http", "https") or (is_unencrypted and credentials is not None):
            raise FailedPrecondition(
                f"{self.host} names the token server {realm!r}; credentials are sent over https only"
            )

    def _fetch(self, realm: str, fields: list[tuple[str, str]], credentials: Credentials | None) -> _Token:
        headers = {"Authorization": _basic(credentials)} if credentials else {}
        user = [("account", credentials.user)] if credentials else []
        separator = "&" if "?" in realm else "?"
        return self._token("GET", f"{realm}{separator}{urlencode(fields + user)}", headers, None)

    def _exchange(self, realm: str, fields: list[tuple[str, str]], credentials: Credentials) -> _Token:
        scope = " ".join(value for key, value in fields if key == "scope")
        service = next(value for key, value in fields if key == "service")
        body = urlencode(
            {
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token,
                "service": service,
                "client_id": _CLIENT,
                "scope": scope,
            }
        )
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._token("POST", realm, headers, body.encode())

    def _token(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> _Token:
        response = self.transport.send(method, url, headers=headers, body=body)
        if response.status != 200:
            raise error_of(response, f"get a token for {self.host} from {url.partition('?')[0]}")
        try:
            return msgspec.json.decode(response.data, type=_Token)
        except ValueError as exc:
            raise FailedPrecondition(
                f"the token server {url.partition('?')[0]} of {self.host} returned no token: {exc}"
            ) from exc


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.user}:{credentials.password}".encode()
    return f"Basic {base64.b64encode(pair).decode('ascii')}"
