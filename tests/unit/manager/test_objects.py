"""Push and pull objects, through a manager in a process of its own."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

import pytest

from gearworkers.remote import blob_stream, encoding
from tests.support.manager_calls import LARGE, address, call, push, sha256
from tests.support.processes import wait_until
from tests.support.remotes import Service, figures

pytestmark = pytest.mark.slow


def stored_files(server: Service) -> set[Path]:
    return {path for path in (server.daemon.log.parent / "manager").rglob("*") if path.is_file()}


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
    wrong = blob_stream.frame(hashlib.sha256(b"content").digest(), encoding.encode(b"another"))
    assert call(server, "POST", "/v1/push", wrong)[0] == 422
    assert stored_files(server) == before


def test_a_layout_is_accepted_only_if_its_chunks_make_up_the_object(server: Service) -> None:
    chunks = [b"a" * 1000, b"b" * 1000]
    layout = [(len(chunk), hashlib.sha256(chunk).digest()) for chunk in chunks]
    whole, other = hashlib.sha256(b"".join(chunks)).digest(), hashlib.sha256(b"other").digest()
    blob, wrong = encoding.encode_layout(whole, layout), encoding.encode_layout(other, layout)
    assert call(server, "POST", "/v1/push", blob_stream.frame(whole, blob))[0] == 400, "its chunks are absent"
    sent = b"".join(
        blob_stream.frame(digest, encoding.encode(c)) for (_, digest), c in zip(layout, chunks, strict=True)
    )
    assert call(server, "POST", "/v1/push", sent + blob_stream.frame(other, blob))[0] == 422, (
        "it belongs to another object"
    )
    assert call(server, "POST", "/v1/push", blob_stream.frame(other, wrong))[0] == 422
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
