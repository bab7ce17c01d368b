"""Test the registry client against Debian's docker-registry and simulated registries."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, GearError, IntegrityError, InvalidInput, NotFound, Unavailable
from gearworkers.images import registry, transport
from gearworkers.images.layer_reader import read_all
from gearworkers.images.manifest import DOCKER_CONFIG, DOCKER_MANIFEST, digest_of, encode
from gearworkers.images.registry import Repository
from tests.support.answers import Answer, Request, answering
from tests.support.link import linked
from tests.support.ports import free_port
from tests.support.registry import Registry
from tests.support.registry_client import BLOB, logged_in, put, repository


def put_image(target: Repository, version: str) -> bytes:
    config = put(target, b"{}")
    document = {"mediaType": DOCKER_CONFIG, "size": 2, "digest": config}
    data = encode({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": document, "layers": []})
    target.put_manifest(version, DOCKER_MANIFEST, data)
    return data


def test_an_uploaded_blob_can_be_read(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    assert not target.has_blob(digest_of(BLOB))
    digest = put(target, BLOB)
    assert target.has_blob(digest)
    assert read_all(target.blob(digest, len(BLOB))) == BLOB


def test_a_blob_larger_than_a_chunk_is_uploaded_in_chunks(
    peer: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "UPLOAD_CHUNK_BYTES", 100_000)
    target = repository(peer.host, tmp_path)
    assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB


def test_a_broken_chunk_upload_resumes_from_the_registrys_offset(
    peer: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "UPLOAD_CHUNK_BYTES", 300_000)
    target = repository(peer.host, tmp_path)
    broken: list[str] = []
    send = target.registry.send

    def break_once(method: str, url: str, *rest: object, **options: object) -> object:
        response = send(method, url, *rest, **options)  # type: ignore[arg-type]  # the same arguments
        if method == "PATCH" and not broken:
            broken.append(url)
            raise Unavailable("the response was lost")
        return response

    monkeypatch.setattr(target.registry, "send", break_once)
    assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB
    assert broken


def test_an_upload_that_differs_from_its_digest_is_rejected(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    with pytest.raises(GearError, match="DIGEST_INVALID"):
        target.put_blob(digest_of(BLOB), io.BytesIO(BLOB[:-1] + b"x"), len(BLOB))
    assert not target.has_blob(digest_of(BLOB))


def test_a_manifest_is_found_by_tag_and_by_digest(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    data = put_image(target, "v1")
    assert target.manifest("v1") == (data, DOCKER_MANIFEST)
    assert target.manifest(digest_of(data)) == (data, DOCKER_MANIFEST)


def test_missing_manifests_and_blobs_are_not_found(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    with pytest.raises(NotFound, match="MANIFEST_UNKNOWN"):
        target.manifest("v1")
    with pytest.raises(NotFound):
        read_all(target.blob(digest_of(BLOB), None))


def test_a_blob_damaged_in_the_registry_is_an_error(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    digest = put(target, BLOB)
    (stored,) = peer.directory.glob(f"storage/**/{digest.removeprefix('sha256:')}/data")
    stored.write_bytes(BLOB[:-1] + b"x")
    with pytest.raises(IntegrityError):
        read_all(target.blob(digest, len(BLOB)))


def test_a_broken_download_resumes_at_its_offset(peer: Registry, tmp_path: Path) -> None:
    digest = put(repository(peer.host, tmp_path), BLOB)
    with linked(peer.port) as (link, port):
        link.first_cut_after_bytes = [0, 400_000, 300_000]  # the first request only detects a registry
        found = read_all(repository(f"127.0.0.1:{port}", tmp_path).blob(digest, len(BLOB)))
        assert not link.first_cut_after_bytes, "the download broke twice"
    assert found == BLOB


@pytest.mark.slow
def test_an_unreachable_registry_is_unavailable(tmp_path: Path) -> None:
    target = repository(f"127.0.0.1:{free_port()}", tmp_path)
    with pytest.raises(Unavailable):
        target.manifest("v1")


@pytest.mark.slow
def test_plain_http_is_not_tried_on_other_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[str] = []

    def refuse(transport: transport.Transport, method: str, url: str, **options: object) -> object:
        sent.append(url)
        raise Unavailable("no server")

    monkeypatch.setattr(transport.Transport, "send", refuse)
    with pytest.raises(Unavailable):
        repository("registry.example.org", tmp_path).has_blob(digest_of(BLOB))
    assert set(sent) == {"https://registry.example.org/v2/"}


@pytest.mark.slow
def test_a_retry_waits_for_the_time_in_retry_after(tmp_path: Path) -> None:
    answers = [
        Answer(200),
        Answer(429, {"Retry-After": "2"}),
        Answer(200),
    ]  # the first response only shows that it is a registry
    with answering(lambda _: answers.pop(0)) as server:
        began_s = time.monotonic()
        assert repository(server.host, tmp_path).has_blob(digest_of(BLOB))
        assert time.monotonic() - began_s >= 2


def test_a_long_retry_after_is_raised_without_waiting(tmp_path: Path) -> None:
    with answering(lambda _: Answer(503, {"Retry-After": "3600"})) as server:
        with pytest.raises(Unavailable, match="503") as caught:
            repository(server.host, tmp_path).has_blob(digest_of(BLOB))
        assert (len(server.requests), caught.value.retry_after_s) == (2, 3600)


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_any_success_status_confirms_a_manifest(status: int, tmp_path: Path) -> None:
    with answering(lambda _: Answer(status)) as server:
        assert repository(server.host, tmp_path).put_manifest("v1", DOCKER_MANIFEST, b"{}") == digest_of(b"{}")


class _Uploads:
    """A registry that receives one blob in chunks; it first answers *failures* requests of each method with 503."""

    def __init__(self, **failures: int) -> None:
        self.failures = failures
        self.received = b""
        self.finished = False

    def answer(self, request: Request) -> Answer:
        location = {"Location": f"/upload/{len(self.received)}"}
        if request.method == "HEAD":
            return Answer(200 if self.finished else 404)
        if request.method == "PUT" and self.finished:
            return Answer(404)
        if request.method == "PATCH":
            self.received += request.body
        self.finished = self.finished or request.method == "PUT"
        if self.failures.get(request.method, 0):
            self.failures[request.method] -= 1
            return Answer(503)
        if request.method == "GET" and request.path.startswith("/upload"):
            return Answer(204, {**location, "Range": f"0-{len(self.received) - 1}"})
        return Answer({"GET": 200, "PUT": 201}.get(request.method, 202), location)


@pytest.mark.parametrize("failures", [{"PATCH": 3}, {"PUT": 1}, {"GET": 2, "PATCH": 1}], ids=str)
@pytest.mark.slow
def test_an_upload_is_finished_despite_lost_responses(
    failures: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "UPLOAD_CHUNK_BYTES", 300_000)
    uploads = _Uploads(**failures)
    with answering(uploads.answer) as server:
        put(repository(server.host, tmp_path), BLOB)
    assert uploads.received == BLOB
    assert uploads.finished


@pytest.mark.parametrize("status", [400, 404, 405, 416])
def test_a_registry_without_chunk_support_receives_the_blob_in_one_request(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "UPLOAD_CHUNK_BYTES", 300_000)

    def answer(request: Request) -> Answer:
        if request.method == "PUT" and "Authorization" not in request.headers:
            return Answer(401, {"WWW-Authenticate": "Basic"})
        known = {"HEAD": 404, "POST": 202, "PUT": 201, "GET": 200}
        return Answer(known.get(request.method, status), {"Location": "/upload"})

    with answering(answer) as server:
        put(repository(server.host, logged_in(tmp_path, server.host)), BLOB)
    rejected, accepted = (request.body for request in server.requests if request.method == "PUT")
    assert rejected == accepted == BLOB


def test_a_challenge_after_a_redirect_to_another_host_is_not_answered(tmp_path: Path) -> None:
    def challenge(request: Request) -> Answer:
        return Answer(401, {"WWW-Authenticate": f'Bearer realm="{elsewhere.url}/token",service="s"'})

    def redirect(request: Request) -> Answer:
        return Answer(200) if request.path == "/v2/" else Answer(307, {"Location": f"{elsewhere.url}{request.path}"})

    with answering(challenge) as elsewhere, answering(redirect) as registry:
        target = repository(registry.host, logged_in(tmp_path, registry.host))
        with pytest.raises(FailedPrecondition, match="401"):
            target.has_blob(digest_of(BLOB))
    assert elsewhere.requests
    for request in elsewhere.requests:
        assert not request.headers["Authorization"] and "token" not in request.path


def test_urls_with_and_without_the_default_port_have_the_same_server() -> None:
    base = registry.server_of("https://registry.example.org")
    assert registry.server_of("https://Registry.example.org:443/v2/a/blobs/uploads/1?state=x") == base
    for other in ("http://registry.example.org/", "https://registry.example.org:444/", "https://example.org/"):
        assert registry.server_of(other) != base


@pytest.mark.parametrize("status", [202, 307, 401])
def test_a_malformed_url_from_a_registry_is_an_error(status: int, tmp_path: Path) -> None:
    headers = {"Location": "http://[::1/x", "WWW-Authenticate": 'Bearer realm="http://[::1"'}
    known = {"HEAD": Answer(404), "GET": Answer(200), "POST": Answer(status, headers)}
    with answering(lambda request: known[request.method]) as server, pytest.raises(InvalidInput, match="malformed"):
        put(repository(server.host, tmp_path), BLOB)
