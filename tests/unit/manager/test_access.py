"""Control access to a manager: tokens, listening addresses, TLS."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, GearError
from gearworkers.manager.server import ManagerServer
from gearworkers.remote.factory import open_remote
from gearworkers.remote.manager import ManagerStore
from gearworkers.remote.remote import Remote
from gearworkers.settings import ManagerSettings, RemoteSettings, Settings
from tests.support.manager_calls import address, call, sha256
from tests.support.remotes import Service, manager_server

pytestmark = pytest.mark.slow


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "read").write_text("# readers\nreader\n")
    (tmp_path / "write").write_text("writer\n")
    environ = {
        "GEAR_MANAGER_READ_TOKENS_FILE": str(tmp_path / "read"),
        "GEAR_MANAGER_WRITE_TOKENS_FILE": str(tmp_path / "write"),
    }
    with manager_server(tmp_path / "manager", environ) as server:
        yield server


def test_tokens_grant_reading_and_writing(guarded: Service) -> None:
    path = f"/v1/objects/{sha256(b'secret')}"
    expected = {None: (401, 401), "nobody": (401, 401), "": (401, 401), "reader": (403, 404), "writer": (201, 200)}
    for token, statuses in expected.items():
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        assert (call(guarded, "PUT", path, b"secret", headers)[0], call(guarded, "GET", path, headers=headers)[0]) == (
            statuses
        )
    assert call(guarded, "GET", "/metrics")[0] == 401
    assert call(guarded, "GET", "/openapi.json")[0] == 200


def test_changed_tokens_apply_without_a_restart(guarded: Service, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("writer\n")
    settings = replace(
        Settings(), gear_root=tmp_path / "gear", remote=RemoteSettings(url=guarded.url, token_file=token)
    )
    remote = open_remote(settings)
    remote.put_many([(hashlib.sha256(b"1").digest(), b"1")])
    (tmp_path / "write").write_text("another\n")
    with pytest.raises(FailedPrecondition):
        remote.put_many([(hashlib.sha256(b"2").digest(), b"2")])
    token.write_text("another\n")
    remote.put_many([(hashlib.sha256(b"2").digest(), b"2")])
    (tmp_path / "write").unlink()
    with pytest.raises(GearError):
        Remote(ManagerStore(guarded.url, settings.remote, "test")).has([bytes(32)])
    remote.close()


def test_bytes_that_are_not_text_are_rejected_as_token_and_ignored_as_node(guarded: Service) -> None:
    with socket.create_connection(address(guarded)) as client:
        client.sendall(b"GET /v1/nodes HTTP/1.1\r\nHost: m\r\nConnection: close\r\nAuthorization: Bearer \xff\r\n\r\n")
        assert client.makefile("rb").readline().split()[1] == b"401"
    with socket.create_connection(address(guarded)) as client:
        client.sendall(b"GET /v1/nodes HTTP/1.1\r\nHost: m\r\nConnection: close\r\nAuthorization: Bearer writer\r\n")
        client.sendall(b"Gear-Node: \xff\r\n\r\n")
        assert client.makefile("rb").readline().split()[1] == b"200"


def test_a_manager_without_its_token_file_does_not_report_objects_as_absent(guarded: Service, tmp_path: Path) -> None:
    (tmp_path / "write").unlink()
    assert call(guarded, "GET", f"/v1/objects/{sha256(b'')}", headers={"Authorization": "Bearer some"})[0] == 503


def test_a_manager_without_tokens_listens_on_loopback_only(tmp_path: Path) -> None:
    settings = replace(Settings(), gear_root=tmp_path, manager=ManagerSettings(listen="0.0.0.0:0"))
    with pytest.raises(FailedPrecondition, match="TOKENS"):
        ManagerServer(settings)
    (tmp_path / "empty").write_text("# none yet\n")
    with pytest.raises(FailedPrecondition, match="no token"):
        ManagerServer(replace(settings, manager=replace(settings.manager, write_tokens_file=tmp_path / "empty")))
    (tmp_path / "one").write_text("token\n")
    with pytest.raises(GearError, match="none"):
        ManagerServer(replace(settings, manager=replace(settings.manager, write_tokens_file=tmp_path / "none")))
    for listen in ("0.0.0.0:0", "[::]:0"):
        ManagerServer(
            replace(settings, manager=replace(settings.manager, write_tokens_file=tmp_path / "one", listen=listen))
        )


def make_certificate(cert: Path, key: Path) -> None:
    subprocess.run(
        shlex.split(
            "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
            f"-addext subjectAltName=DNS:localhost -keyout {key} -out {cert}"
        ),
        check=True,
        capture_output=True,
    )


def test_the_manager_serves_tls_and_reloads_a_renewed_certificate(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(cert, key)
    environ = {"GEAR_MANAGER_TLS_CERT_FILE": str(cert), "GEAR_MANAGER_TLS_KEY_FILE": str(key)}
    with manager_server(tmp_path / "manager", environ) as server:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        settings = replace(Settings(), gear_root=tmp_path / "gear", remote=RemoteSettings(url=url))
        trusted = Path(shutil.copy(cert, tmp_path / "trusted.pem"))
        trusting = open_remote(replace(settings, remote=replace(settings.remote, ca_file=trusted)))
        trusting.put_many([(hashlib.sha256(b"x").digest(), b"x")])
        assert trusting.has([hashlib.sha256(b"x").digest()])
        with pytest.raises(FailedPrecondition, match="GEAR_REMOTE_CA_FILE"):
            open_remote(settings).has([bytes(32)])
        cert.write_text("half of a new one")
        open_remote(replace(settings, remote=replace(settings.remote, ca_file=trusted))).has([bytes(32)])
        make_certificate(cert, key)
        with pytest.raises(FailedPrecondition, match="GEAR_REMOTE_CA_FILE"):
            open_remote(replace(settings, remote=replace(settings.remote, ca_file=trusted))).has([bytes(32)])
        open_remote(replace(settings, remote=replace(settings.remote, ca_file=cert))).has([bytes(32)])
        trusting.close()
