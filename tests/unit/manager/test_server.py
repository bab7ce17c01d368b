"""`gear manager`, a real process over real sockets: calls, access, limits, shutdown."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jsonschema
import openapi_spec_validator
import pytest

from gearworkers.errors import FailedPrecondition, GearError, Unavailable
from gearworkers.manager.server import ManagerServer
from gearworkers.remote import blob_stream, encoding
from gearworkers.remote.factory import open_remote
from gearworkers.remote.manager import ManagerStore
from gearworkers.remote.remote import Remote
from gearworkers.settings import ManagerSettings, RemoteSettings, Settings
from tests.support.answers import Answer, answering
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.remotes import Service, ask, figures, manager_server

pytestmark = pytest.mark.slow

LARGE = random.Random(7).randbytes(3 << 20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("manager")
    limits = {"GEAR_MANAGER_CLIENT_TIMEOUT_S": "600", "GEAR_MANAGER_MOST_OBJECT_BYTES": str(8 << 20)}
    with manager_server(directory, limits) as server:
        yield server


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def call(
    server: Service, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], bytes]:
    """Return the status, the headers with lower-case names, and the body."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def push(server: Service, content: bytes) -> str:
    assert call(server, "PUT", f"/v1/objects/{sha256(content)}", content)[0] in (200, 201)
    return sha256(content)


def stored_files(server: Service) -> set[Path]:
    return {path for path in (server.daemon.log.parent / "manager").rglob("*") if path.is_file()}


# -- objects


def test_an_object_is_pushed_and_pulled(server: Service) -> None:
    for content in (b"", b"small", LARGE):
        path = f"/v1/objects/{sha256(content)}"
        assert call(server, "PUT", path, content)[0] == 201
        assert call(server, "PUT", path, content)[0] == 200
        status, headers, body = call(server, "GET", path)
        assert (status, body) == (200, content)
        assert call(server, "GET", path, headers={"If-None-Match": headers["etag"]})[0] == 304
        status, headers, body = call(server, "HEAD", path)
        assert (status, headers["content-length"], body) == (200, str(len(content)), b"")


def test_any_range_of_an_object_is_pulled(server: Service) -> None:
    size = len(LARGE)
    for content in (b"0123456789", LARGE):
        path = f"/v1/objects/{push(server, content)}"
        ranges = [(0, 0), (3, 7), (0, len(content) - 1), (len(content) - 1, len(content) - 1)]
        ranges += [(size // 3, size // 2), (100_000, 100_001)] if content is LARGE else []
        for first, last in ranges:
            status, headers, body = call(server, "GET", path, headers={"Range": f"bytes={first}-{last}"})
            assert (status, body) == (206, content[first : last + 1])
            assert headers["content-range"] == f"bytes {first}-{last}/{len(content)}"
        assert call(server, "GET", path, headers={"Range": "bytes=-4"})[2] == content[-4:]
        assert call(server, "GET", path, headers={"Range": f"bytes={len(content)}-"})[0] == 416
        assert call(server, "GET", path, headers={"Range": "bytes=9-3"})[0] == 416


def test_a_wrong_upload_is_rejected_and_leaves_nothing(server: Service) -> None:
    before = stored_files(server)
    for content in (b"wrong", LARGE[::-1]):
        path = f"/v1/objects/{sha256(content + b'!')}"
        status, _, body = call(server, "PUT", path, content)
        assert status == 422
        assert sha256(content) in json.loads(body)["error"]
        assert call(server, "GET", path)[0] == 404
    lie = blob_stream.frame(hashlib.sha256(b"truth").digest(), encoding.encode(b"lie"))
    assert call(server, "POST", "/v1/push", lie)[0] == 422
    assert stored_files(server) == before


def test_a_layout_is_accepted_only_if_its_chunks_make_up_the_object(server: Service) -> None:
    chunks = [b"a" * 1000, b"b" * 1000]
    layout = [(len(chunk), hashlib.sha256(chunk).digest()) for chunk in chunks]
    whole, other = hashlib.sha256(b"".join(chunks)).digest(), hashlib.sha256(b"other").digest()
    blob, lie = encoding.encode_layout(whole, layout), encoding.encode_layout(other, layout)
    assert call(server, "POST", "/v1/push", blob_stream.frame(whole, blob))[0] == 400, "its chunks are absent"
    sent = b"".join(
        blob_stream.frame(digest, encoding.encode(c)) for (_, digest), c in zip(layout, chunks, strict=True)
    )
    assert call(server, "POST", "/v1/push", sent + blob_stream.frame(other, blob))[0] == 422, (
        "it belongs to another object"
    )
    assert call(server, "POST", "/v1/push", blob_stream.frame(other, lie))[0] == 422
    assert call(server, "HEAD", f"/v1/objects/{other.hex()}")[0] == 404
    assert call(server, "POST", "/v1/push", blob_stream.frame(whole, blob))[0] == 200
    assert call(server, "GET", f"/v1/objects/{whole.hex()}")[2] == b"".join(chunks)


def test_an_interrupted_upload_leaves_nothing(server: Service) -> None:
    before = stored_files(server)
    for path in (f"/v1/objects/{sha256(b'x' * 1000)}", "/v1/push"):
        with socket.create_connection(address(server)) as client:
            client.sendall(f"{'PUT' if 'objects' in path else 'POST'} {path} HTTP/1.1\r\nHost: m\r\n".encode())
            client.sendall(b"Content-Length: 1000\r\n\r\n" + b"x" * 500)
    cut = blob_stream.frame(hashlib.sha256(b"cut").digest(), encoding.encode(b"cut"))[:-1]
    assert call(server, "POST", "/v1/push", cut)[0] == 400
    wait_until(lambda: figures(server)["gear_manager_under_way"] <= 1, "the broken uploads have ended")
    assert stored_files(server) == before


def test_malformed_digests_are_rejected(server: Service) -> None:
    for text in ("abc", "g" * 64, sha256(b"x").upper(), sha256(b"x") + "00"):
        assert call(server, "GET", f"/v1/objects/{text}")[0] == 400
        assert call(server, "POST", "/v1/query", json.dumps({"digests": [text]}).encode())[0] == 400


def test_malformed_requests_are_rejected(server: Service) -> None:
    for body in (b"", b"{", b"[]", b'{"digests": 1}', b'{"digests": [null]}'):
        assert call(server, "POST", "/v1/query", body)[0] == 400
    assert call(server, "GET", "/nothing")[0] == 404
    assert call(server, "DELETE", f"/v1/objects/{sha256(b'x')}")[0] == 405


# -- documents, nodes


def test_a_document_has_versions(server: Service) -> None:
    path = "/v1/documents/layers/abc"
    assert call(server, "GET", path)[0] == 404
    assert call(server, "PUT", path, b"one", {"Gear-Version": "1"})[0] == 204
    assert call(server, "PUT", path, b"late", {"Gear-Version": "1"})[0] == 409
    assert call(server, "PUT", path, b"two")[0] == 204
    status, headers, body = call(server, "GET", path)
    assert (status, headers["gear-version"], body) == (200, "2", b"two")
    assert call(server, "PUT", path, b"x", {"Gear-Version": "zero"})[0] == 400
    assert call(server, "PUT", "/v1/documents/../x", b"x")[0] in (400, 404)


def test_nodes_join_and_are_listed(server: Service) -> None:
    assert call(server, "POST", "/v1/join", b'{"node": "alpha"}')[0] == 200
    call(server, "POST", "/v1/query", b'{"digests": []}', {"Gear-Node": "beta"})
    nodes = ask(server, "/v1/nodes")
    assert isinstance(nodes, list)
    assert {"alpha", "beta"} <= {node["node"] for node in nodes}
    assert call(server, "POST", "/v1/join", b'{"node": ""}')[0] == 400


# -- its description and metrics


def test_every_call_is_in_the_openapi_document(server: Service, tmp_path: Path) -> None:
    described = ask(server, "/openapi.json")
    assert isinstance(described, dict)
    documented = {(method.upper(), path) for path, calls in described["paths"].items() for method in calls}
    settings = replace(Settings(), gear_root=tmp_path, manager=ManagerSettings(listen="127.0.0.1:0"))
    served = {(call.method, call.path) for call in ManagerServer(settings).api.routes()}
    assert documented == served
    page = call(server, "GET", "/")[2].decode()
    assert all(path.replace("{", "{") in page for _, path in served)


def test_the_openapi_document_is_valid_and_describes_the_answers(server: Service) -> None:
    described = ask(server, "/openapi.json")
    assert isinstance(described, dict)
    openapi_spec_validator.validate(described, cls=openapi_spec_validator.OpenAPIV31SpecValidator)
    push(server, b"documented")
    call(server, "POST", "/v1/join", b'{"node": "documented"}')
    for method, path, body in (
        ("get", "/v1/nodes", None),
        ("post", "/v1/join", {"node": "documented"}),
        ("post", "/v1/query", {"digests": [sha256(b"documented")]}),
        ("post", "/v1/query", {"digests": ["none"]}),
    ):
        operation = described["paths"][path][method]
        sent = None if body is None else json.dumps(body).encode()
        status, headers, answer = call(server, method.upper(), path, sent)
        response = operation["responses"].get(str(status)) or operation["responses"][f"{status // 100}XX"]
        schema = response["content"][headers["content-type"].partition(";")[0]]["schema"]
        jsonschema.validate(json.loads(answer), {**schema, "components": described["components"]})
        if body is not None and status == 200:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            jsonschema.validate(body, {**schema, "components": described["components"]})


def test_requests_are_counted(server: Service) -> None:
    name = 'gear_manager_requests_total{call="query",status="200"}'
    before = figures(server).get(name, 0)
    call(server, "POST", "/v1/query", b'{"digests": []}')
    assert figures(server)[name] == before + 1
    assert call(server, "GET", "/healthz")[0] == 200


# -- limits


def test_too_large_requests_are_rejected(server: Service) -> None:
    content = bytes(9 << 20)
    assert call_or_break(server, "PUT", f"/v1/objects/{sha256(content)}", content) == 413
    assert call(server, "HEAD", f"/v1/objects/{sha256(content)}")[0] == 404
    assert call_or_break(server, "POST", "/v1/query", b" " * (3 << 20)) == 413
    assert call(server, "GET", "/healthz", headers={"X": "x" * 20_000})[0] == 400
    many = json.dumps({"digests": [sha256(b"x")] * 10_001}).encode()
    assert call(server, "POST", "/v1/query", many)[0] == 400


def test_a_stalled_client_is_dropped(tmp_path: Path) -> None:
    beginnings = [
        b"",
        b"GET /healthz HTTP/1.1\r\nX: ",
        b"POST /v1/query HTTP/1.1\r\nHost: m\r\nContent-Length: 100\r\n\r\n{",
    ]
    with manager_server(tmp_path, {"GEAR_MANAGER_CLIENT_TIMEOUT_S": "2"}) as server:
        for beginning in beginnings:
            with socket.create_connection(address(server), timeout=60) as client:
                client.sendall(beginning)
                while client.recv(4096):
                    pass


def test_a_client_that_reads_nothing_does_not_delay_others(server: Service) -> None:
    digest = push(server, LARGE)
    request = f"GET /v1/objects/{digest} HTTP/1.1\r\nHost: m\r\n\r\n".encode()
    slow = [socket.create_connection(address(server)) for _ in range(50)]
    try:
        for client in slow:
            client.sendall(request)
        assert call(server, "GET", f"/v1/objects/{digest}")[2] == LARGE
    finally:
        for client in slow:
            client.close()


def test_memory_does_not_grow_with_the_size_of_an_object(tmp_path: Path) -> None:
    with manager_server(tmp_path) as server:
        push(server, LARGE)
        before = _resident_bytes(server)
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            file.truncate(600 << 20)
        digest = hashlib.sha256()
        for _ in range(600):
            digest.update(bytes(1 << 20))
        with path.open("rb") as file:
            request = urllib.request.Request(f"{server.url}/v1/objects/{digest.hexdigest()}", file, method="PUT")
            request.add_header("Content-Length", str(600 << 20))
            assert urllib.request.urlopen(request).status == 201
        with urllib.request.urlopen(f"{server.url}/v1/objects/{digest.hexdigest()}") as answer:
            pulled = hashlib.sha256()
            while piece := answer.read(1 << 20):
                pulled.update(piece)
        assert pulled.digest() == digest.digest()
        assert _resident_bytes(server) - before < 100 << 20


# -- access


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


def test_without_its_token_file_it_does_not_report_objects_as_absent(guarded: Service, tmp_path: Path) -> None:
    (tmp_path / "write").unlink()
    assert call(guarded, "GET", f"/v1/objects/{sha256(b'')}", headers={"Authorization": "Bearer some"})[0] == 503


def test_it_serves_more_clients_than_the_soft_limit_on_files(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(map(int, os.listdir("/proc/self/fd"))) + 64  # this process has the limit too, while the server starts
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        with manager_server(tmp_path) as server, ExitStack() as idle:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for _ in range(few + 64):
                idle.enter_context(socket.create_connection(address(server)))
            assert call(server, "GET", "/healthz")[0] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_tokens_it_listens_on_loopback_only(tmp_path: Path) -> None:
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


def test_it_serves_tls_and_reloads_a_renewed_certificate(tmp_path: Path) -> None:
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


# -- its end


def test_it_finishes_its_requests_before_it_stops(tmp_path: Path) -> None:
    with manager_server(tmp_path) as server:
        content = LARGE * 8
        digest = push(server, content)
        with socket.create_connection(address(server)) as client:
            client.sendall(f"GET /v1/objects/{digest} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
            received = bytearray(client.recv(4096))
            ended = threading.Thread(target=server.daemon.stop, args=(PATIENCE_S,))
            ended.start()
            wait_until(lambda: not _accepts(server), "it takes no more connections")
            while more := client.recv(65536):
                received += more
        ended.join()
        assert received.endswith(content)


def test_an_unreachable_manager_is_unavailable(tmp_path: Path) -> None:
    settings = replace(Settings(), remote=RemoteSettings(timeout_s=2))
    with pytest.raises(Unavailable):
        ManagerStore("http://127.0.0.1:1", settings.remote, "test").present([bytes(32)])


@pytest.mark.parametrize(
    "beginning",
    [b"Content-Length: 100000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n186a0\r\n" + bytes(32) + b"\xa0\x86\1\0"],
)
def test_a_manager_that_sends_too_slowly_is_unavailable(beginning: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_drip, args=(listener, b"HTTP/1.1 200 OK\r\n" + beginning))
        thread.start()
        store = ManagerStore(f"http://127.0.0.1:{listener.getsockname()[1]}", RemoteSettings(timeout_s=2.0), "test")
        with pytest.raises(Unavailable, match="bytes missing after"):
            if b"chunked" in beginning:
                list(store.get_many([bytes(32)]))
            else:
                store.get(bytes(32))
        store.close()
        thread.join()


@pytest.mark.parametrize("status", [301, 302, 303, 304, 307, 308])
def test_a_redirect_does_not_confirm_a_push(status: int) -> None:
    with answering(lambda asked: Answer(status, {"Location": "/login"})) as server:
        store = ManagerStore(server.url, RemoteSettings(), "test")
        with pytest.raises(FailedPrecondition, match="is not a manager"):
            store.put_many([(hashlib.sha256(b"x").digest(), encoding.encode(b"x"))])
        assert len(server.asked) == 1


@pytest.mark.parametrize("held", [b"secret\nsecret two\n", b"secret\xff", "se\u20accret".encode()])
def test_the_error_of_a_malformed_token_does_not_contain_it(held: bytes, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(held)
    with pytest.raises(FailedPrecondition, match="a single token of printable") as told:
        ManagerStore("http://127.0.0.1:1", RemoteSettings(token_file=file), "test").present([bytes(32)])
    assert "secret" not in str(told.value)


def _drip(listener: socket.socket, beginning: bytes) -> None:
    """Start a response, then send single bytes until the client disconnects."""
    client, _ = listener.accept()
    with client:
        client.recv(65536)
        client.sendall(beginning)
        while True:
            try:
                client.sendall(b"x")
            except OSError:
                return
            time.sleep(0.02)


def test_the_command_reports_a_wrong_address_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from gearworkers.cli.main import main; main()", "manager"]
    for listen in ("0.0.0.0:2019", "nonsense", "127.0.0.1:99999"):
        environ = {"GEAR_ROOT": str(tmp_path), "GEAR_MANAGER_LISTEN": listen}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=Path(__file__).parents[3])
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert listen in done.stderr


# -- helpers


def address(server: Service) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return host, int(port)


def call_or_break(server: Service, method: str, path: str, body: bytes) -> int:
    """Return the status; a server that answers before it has read the whole body may break the connection."""
    try:
        return call(server, method, path, body)[0]
    except ConnectionError:
        return 413


def iter_frames(stream: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0

    def read(size_bytes: int) -> bytes:
        nonlocal at
        at += size_bytes
        return stream[at - size_bytes : at]

    return blob_stream.read_blobs(read)


def _resident_bytes(server: Service) -> int:
    status = Path(f"/proc/{server.daemon.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def _accepts(server: Service) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address(server)) == 0
