"""How a registry is told who asks: Basic, or Bearer with a token from the realm that it names.

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
from gearworkers.images.transport import Transport, problem, translated
from gearworkers.util.net import is_loopback

_CLIENT = "gearworkers"
_LEAST_LIFE_S = 60
"""Of a token that says nothing; the specification's own default."""
_MARGIN_S = 15
_SCHEMES = ("bearer", "basic")
"""Those that are known, the better first."""
_PART = re.compile(r'([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))|([A-Za-z_][A-Za-z0-9_-]*)')
"""A parameter, or the scheme of those that follow."""


class _Token(msgspec.Struct, frozen=True):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a registry's WWW-Authenticate asks for."""

    scheme: str
    parameters: Mapping[str, str]

    @classmethod
    def parse(cls, header: str) -> Challenge | None:
        """Read ``Bearer realm="…",service="…"`` or ``Basic realm="…"`` among those offered; None if neither is."""
        offered: dict[str, dict[str, str]] = {}
        parameters: dict[str, str] = {}
        for key, quoted, bare, scheme in _PART.findall(header):
            if scheme:
                parameters = offered.setdefault(scheme.lower(), {})
            else:
                parameters[key.lower()] = quoted or bare
        return next((cls(scheme, offered[scheme]) for scheme in _SCHEMES if scheme in offered), None)


@dataclass
class Authority:
    """Authorizations for one registry, kept until shortly before they end; used from many threads at once."""

    host: str
    """As in an image's name."""
    transport: Transport
    docker_config: Path
    _challenge: Challenge | None = None
    _tokens: dict[tuple[str, ...], tuple[str, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def known(self, scopes: tuple[str, ...]) -> str | None:
        """The Authorization for *scopes* if there is a valid one already."""
        with self._lock:
            value, end_s = self._tokens.get(scopes, ("", 0.0))
            return value if time.monotonic() < end_s else None

    def answer(self, header: str, scopes: tuple[str, ...]) -> str:
        """The Authorization that answers the challenge *header*.

        Raises:
            FailedPrecondition: There are no credentials, they are refused, or they would travel unprotected.
            Unavailable: The realm does not answer.
        """
        challenge = Challenge.parse(header)
        if challenge is None:
            raise FailedPrecondition(f"{self.host} asks for an authentication that is not known: {header[:100]!r}")
        credentials = find_credentials(self.docker_config, self.host)
        if challenge.scheme == "basic":
            value, life_s = self._basic(credentials), float("inf")
        else:
            value, life_s = self._bearer(challenge, credentials, scopes)
        with self._lock:
            self._tokens[scopes] = value, time.monotonic() + life_s
        return value

    def forget(self, scopes: tuple[str, ...]) -> None:
        """Let go of an authorization that was refused."""
        with self._lock:
            self._tokens.pop(scopes, None)

    def _basic(self, credentials: Credentials | None) -> str:
        if credentials is None or not credentials.user:
            raise FailedPrecondition(f"{self.host} asks for a password, and there is none: `docker login {self.host}`")
        return _basic(credentials)

    def _bearer(
        self, challenge: Challenge, credentials: Credentials | None, scopes: tuple[str, ...]
    ) -> tuple[str, float]:
        realm = challenge.parameters.get("realm", "")
        self._refuse_open_realm(realm, credentials)
        fields = [("service", challenge.parameters.get("service", "")), *(("scope", scope) for scope in scopes)]
        if credentials is not None and credentials.identity_token:
            token = self._exchange(realm, fields, credentials)
        else:
            token = self._fetch(realm, fields, credentials)
        value = token.token or token.access_token
        if not value:
            raise FailedPrecondition(f"{realm} answers for {self.host} without a token")
        return f"Bearer {value}", max(token.expires_in or 0, _LEAST_LIFE_S) - _MARGIN_S

    def _refuse_open_realm(self, realm: str, credentials: Credentials | None) -> None:
        with translated(f"get a token for {self.host}"):
            url = urlsplit(realm)
        open_realm = url.scheme == "http" and not is_loopback(url.hostname or "")
        if url.scheme not in ("http", "https") or (open_realm and credentials is not None):
            raise FailedPrecondition(f"{self.host} wants its credentials told to {realm!r}, which is not https")

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
            raise problem(response, f"get a token for {self.host} from {url.partition('?')[0]}")
        try:
            return msgspec.json.decode(response.data, type=_Token)
        except ValueError as exc:
            raise FailedPrecondition(f"{url.partition('?')[0]} answers for {self.host} without a token: {exc}") from exc


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.user}:{credentials.password}".encode()
    return f"Basic {base64.b64encode(pair).decode('ascii')}"
