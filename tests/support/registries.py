"""Registries with authentication, with TLS, or behind a connection that breaks."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.support.ports import free_port
from tests.support.registry import Registry

USER, PASSWORD = "gear", "of:workers"
SERVICE = "a registry of tests"


@contextmanager
def registry(directory: Path, *, auth: str = "", http: str = "") -> Iterator[Registry]:
    """Run a docker-registry.

    Args:
        directory: Contains config, storage and log.
        auth: The section ``auth`` of the config.
        http: Further lines of the section ``http``, indented by two spaces.
    """
    server = Registry(directory, free_port())
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: warn}\n"
        f"storage:\n  filesystem: {{rootdirectory: {directory / 'storage'}}}\n  delete: {{enabled: true}}\n"
        f'http:\n  addr: "127.0.0.1:{server.port}"\n{http}{auth}'
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()


def basic_auth(directory: Path) -> str:
    """Return the section ``auth`` of a registry that accepts USER with PASSWORD."""
    script = "print crypt($ARGV[0], '$2y$05$abcdefghijklmnopqrstuu')"
    hashed = subprocess.run(["perl", "-e", script, PASSWORD], check=True, capture_output=True, text=True).stdout
    directory.mkdir(exist_ok=True)
    (directory / "htpasswd").write_text(f"{USER}:{hashed}\n")
    return f"auth:\n  htpasswd:\n    realm: tests\n    path: {directory / 'htpasswd'}\n"


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """Make a self-signed certificate for 127.0.0.1; return the paths of certificate and key."""
    directory.mkdir(exist_ok=True)
    certificate, key = directory / "ca.crt", directory / "ca.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tests"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return certificate, key


@dataclass
class TokenServer:
    """A token server: it gives USER all requested rights, and anonymous clients the right to pull.

    The registry verifies the tokens.
    """

    directory: Path
    lifetime_s: int = 300
    port: int = field(default_factory=free_port)
    asked: list[str] = field(default_factory=list)
    """``METHOD scope scope…`` of each request."""

    def __post_init__(self) -> None:
        self._certificate, self._key = make_certificate(self.directory)

    @property
    def auth(self) -> str:
        """The section ``auth`` of the registry's config."""
        return (
            f"auth:\n  token:\n    realm: http://127.0.0.1:{self.port}/token\n    service: {SERVICE}\n"
            f"    issuer: tests\n    rootcertbundle: {self._certificate}\n"
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the token server."""
        server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def token(self, scopes: list[str], all_allowed: bool) -> str:
        """Return a signed token.

        Source: distribution documentation, "Token Authentication Implementation".
        """
        der = subprocess.run(
            ["openssl", "x509", "-in", str(self._certificate), "-outform", "der"], check=True, capture_output=True
        ).stdout
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            allowed = [action for action in actions.split(",") if all_allowed or action == "pull"]
            access.append({"type": kind, "name": name, "actions": allowed})
        now = int(time.time())
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        claims = {"iss": "tests", "aud": SERVICE, "nbf": now - 10, "iat": now, "exp": now + self.lifetime_s}
        signed = f"{_part(head)}.{_part(claims | {'sub': '', 'jti': '1', 'access': access})}"
        command = ["openssl", "dgst", "-sha256", "-sign", str(self._key)]
        signature = subprocess.run(command, input=signed.encode(), check=True, capture_output=True).stdout
        return f"{signed}.{_base64url(signature)}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                known = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
                authorization = self.headers.get("Authorization")
                if authorization not in (None, f"Basic {known}"):
                    self.send_error(401)
                    return
                self._answer("GET", query.get("scope", []), authorization is not None)

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                if form["refresh_token"] != ["identity"] or form["grant_type"] != ["refresh_token"]:
                    self.send_error(401)
                    return
                self._answer("POST", form["scope"][0].split(), True)

            def _answer(self, method: str, scopes: list[str], all_allowed: bool) -> None:
                owner.asked.append(" ".join([method, *scopes]))
                body = {"access_token": owner.token(scopes, all_allowed), "expires_in": owner.lifetime_s}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def _part(document: object) -> str:
    return _base64url(json.dumps(document).encode())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
