"""The registry client, against Debian's own docker-registry."""

from __future__ import annotations

import base64
import io
import json
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, GearError, IntegrityError, InvalidInput, NotFound, Unavailable
from gearworkers.images import registry, transport
from gearworkers.images.auth import Challenge
from gearworkers.images.credentials import Credentials, find_credentials
from gearworkers.images.layer_reader import read_all
from gearworkers.images.manifest import DOCKER_CONFIG, DOCKER_MANIFEST, digest_of, encode
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import RegistrySettings, Settings
from tests.support import registries
from tests.support.answers import Answer, Asked, answering
from tests.support.link import linked
from tests.support.ports import free_port
from tests.support.registries import PASSWORD, USER, TokenServer
from tests.support.registry import Registry

BLOB = bytes(range(256)) * 4000


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Registry]:
    with registries.registry(tmp_path / "registry") as running:
        yield running


def repository(host: str, docker_config: Path, name: str = "some/image") -> Repository:
    return Repository.of(RegistrySettings(docker_config=docker_config), Reference.parse(f"{host}/{name}"))


def put(target: Repository, data: bytes) -> str:
    target.put_blob(digest_of(data), io.BytesIO(data), len(data))
    return digest_of(data)


def put_image(target: Repository, version: str) -> bytes:
    config = put(target, b"{}")
    document = {"mediaType": DOCKER_CONFIG, "size": 2, "digest": config}
    data = encode({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": document, "layers": []})
    target.put_manifest(version, DOCKER_MANIFEST, data)
    return data


def logged_in(directory: Path, host: str, **auth: str) -> Path:
    """A directory with the config.json that `docker login` writes."""
    directory.mkdir(exist_ok=True)
    pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {host: auth or {"auth": pair}}}))
    return directory


def test_a_blob_that_was_put_is_read_back(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    assert not target.has_blob(digest_of(BLOB))
    digest = put(target, BLOB)
    assert target.has_blob(digest)
    assert read_all(target.blob(digest, len(BLOB))) == BLOB


def test_a_blob_larger_than_a_chunk_goes_in_chunks(
    peer: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "UPLOAD_CHUNK_BYTES", 100_000)
    target = repository(peer.host, tmp_path)
    assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB


def test_a_chunk_that_broke_is_sent_from_where_the_registry_is(
    peer: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "UPLOAD_CHUNK_BYTES", 300_000)
    target = repository(peer.host, tmp_path)
    broken: list[str] = []
    send = target.registry.send

    def breaks_once(method: str, url: str, *rest: object, **options: object) -> object:
        answer = send(method, url, *rest, **options)  # type: ignore[arg-type]  # the same arguments
        if method == "PATCH" and not broken:
            broken.append(url)
            raise Unavailable("the answer was lost")
        return answer

    monkeypatch.setattr(target.registry, "send", breaks_once)
    assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB
    assert broken


def test_an_upload_of_other_bytes_is_refused(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    with pytest.raises(GearError, match="DIGEST_INVALID"):
        target.put_blob(digest_of(BLOB), io.BytesIO(BLOB[:-1] + b"x"), len(BLOB))
    assert not target.has_blob(digest_of(BLOB))


def test_a_blob_is_mounted_from_another_repository(peer: Registry, tmp_path: Path) -> None:
    digest = put(repository(peer.host, tmp_path, "one"), BLOB)
    other = repository(peer.host, tmp_path, "other")
    assert not other.has_blob(digest)
    assert other.mount(digest, "one")
    assert other.has_blob(digest)


def test_what_is_not_there_cannot_be_mounted(peer: Registry, tmp_path: Path) -> None:
    assert not repository(peer.host, tmp_path).mount(digest_of(BLOB), "one")


def test_a_manifest_is_found_by_tag_and_by_digest(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    data = put_image(target, "v1")
    assert target.manifest("v1") == (data, DOCKER_MANIFEST)
    assert target.manifest(digest_of(data)) == (data, DOCKER_MANIFEST)


def test_what_is_not_there_is_not_found(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    with pytest.raises(NotFound, match="MANIFEST_UNKNOWN"):
        target.manifest("v1")
    with pytest.raises(NotFound):
        read_all(target.blob(digest_of(BLOB), None))


def test_a_blob_that_is_damaged_in_the_registry_is_an_error(peer: Registry, tmp_path: Path) -> None:
    target = repository(peer.host, tmp_path)
    digest = put(target, BLOB)
    (stored,) = peer.directory.glob(f"storage/**/{digest.removeprefix('sha256:')}/data")
    stored.write_bytes(BLOB[:-1] + b"x")
    with pytest.raises(IntegrityError):
        read_all(target.blob(digest, len(BLOB)))


def test_a_download_goes_on_where_it_broke(peer: Registry, tmp_path: Path) -> None:
    digest = put(repository(peer.host, tmp_path), BLOB)
    with linked(peer.port) as (link, port):
        link.first_cut_after_bytes = [0, 400_000, 300_000]  # the first only asks whether it is a registry
        found = read_all(repository(f"127.0.0.1:{port}", tmp_path).blob(digest, len(BLOB)))
        assert not link.first_cut_after_bytes, "it broke twice"
    assert found == BLOB


@pytest.mark.slow
def test_a_registry_that_is_away_is_unavailable(tmp_path: Path) -> None:
    target = repository(f"127.0.0.1:{free_port()}", tmp_path)
    with pytest.raises(Unavailable):
        target.manifest("v1")


@pytest.mark.slow
def test_plain_http_is_not_tried_on_other_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[str] = []

    def refuses(transport: transport.Transport, method: str, url: str, **options: object) -> object:
        sent.append(url)
        raise Unavailable("nobody there")

    monkeypatch.setattr(transport.Transport, "send", refuses)
    with pytest.raises(Unavailable):
        repository("registry.example.org", tmp_path).has_blob(digest_of(BLOB))
    assert set(sent) == {"https://registry.example.org/v2/"}


@pytest.mark.slow
def test_a_registry_that_asks_to_wait_is_left_alone_so_long(tmp_path: Path) -> None:
    answers = [Answer(200), Answer(429, {"Retry-After": "2"}), Answer(200)]  # the first: it is a registry
    with answering(lambda asked: answers.pop(0)) as server:
        began_s = time.monotonic()
        assert repository(server.host, tmp_path).has_blob(digest_of(BLOB))
        assert time.monotonic() - began_s >= 2


def test_what_is_to_wait_too_long_is_told_at_once(tmp_path: Path) -> None:
    with answering(lambda asked: Answer(503, {"Retry-After": "3600"})) as server:
        with pytest.raises(Unavailable, match="503") as told:
            repository(server.host, tmp_path).has_blob(digest_of(BLOB))
        assert (len(server.asked), told.value.after_s) == (2, 3600)


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_a_manifest_is_taken_by_any_good_status(status: int, tmp_path: Path) -> None:
    with answering(lambda asked: Answer(status)) as server:
        assert repository(server.host, tmp_path).put_manifest("v1", DOCKER_MANIFEST, b"{}") == digest_of(b"{}")


class _Uploads:
    """A registry that takes one blob in chunks, and says *failures* first, by method."""

    def __init__(self, **failures: int) -> None:
        self.failures = failures
        self.taken = b""
        self.whole = False

    def answer(self, asked: Asked) -> Answer:
        location = {"Location": f"/upload/{len(self.taken)}"}
        if asked.method == "HEAD":
            return Answer(200 if self.whole else 404)
        if asked.method == "PUT" and self.whole:
            return Answer(404)
        if asked.method == "PATCH":
            self.taken += asked.body
        self.whole = self.whole or asked.method == "PUT"
        if self.failures.get(asked.method, 0):
            self.failures[asked.method] -= 1
            return Answer(503)
        if asked.method == "GET" and asked.path.startswith("/upload"):
            return Answer(204, {**location, "Range": f"0-{len(self.taken) - 1}"})
        return Answer({"GET": 200, "PUT": 201}.get(asked.method, 202), location)


@pytest.mark.parametrize("failures", [{"PATCH": 3}, {"PUT": 1}, {"GET": 2, "PATCH": 1}], ids=str)
@pytest.mark.slow
def test_an_upload_whose_answers_are_lost_is_ended(
    failures: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "UPLOAD_CHUNK_BYTES", 300_000)
    uploads = _Uploads(**failures)
    with answering(uploads.answer) as server:
        put(repository(server.host, tmp_path), BLOB)
    assert uploads.taken == BLOB
    assert uploads.whole


@pytest.mark.parametrize("refusal", [400, 404, 405, 416])
def test_a_registry_that_takes_no_chunks_is_given_the_whole(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "UPLOAD_CHUNK_BYTES", 300_000)

    def answer(asked: Asked) -> Answer:
        if asked.method == "PUT" and "Authorization" not in asked.headers:
            return Answer(401, {"WWW-Authenticate": "Basic"})
        known = {"HEAD": 404, "POST": 202, "PUT": 201, "GET": 200}
        return Answer(known.get(asked.method, refusal), {"Location": "/upload"})

    with answering(answer) as server:
        put(repository(server.host, logged_in(tmp_path, server.host)), BLOB)
    refused, whole = (asked.body for asked in server.asked if asked.method == "PUT")
    assert refused == whole == BLOB


def test_a_challenge_of_where_a_registry_redirects_is_not_answered(tmp_path: Path) -> None:
    def challenge(asked: Asked) -> Answer:
        return Answer(401, {"WWW-Authenticate": f'Bearer realm="{elsewhere.url}/token",service="s"'})

    def redirect(asked: Asked) -> Answer:
        return Answer(200) if asked.path == "/v2/" else Answer(307, {"Location": f"{elsewhere.url}{asked.path}"})

    with answering(challenge) as elsewhere, answering(redirect) as registry:
        target = repository(registry.host, logged_in(tmp_path, registry.host))
        with pytest.raises(FailedPrecondition, match="401"):
            target.has_blob(digest_of(BLOB))
    assert elsewhere.asked
    assert not [asked for asked in elsewhere.asked if asked.headers["Authorization"] or "token" in asked.path]


def test_an_upload_may_name_the_port_that_goes_without_saying() -> None:
    base = registry._server("https://registry.example.org")
    assert registry._server("https://Registry.example.org:443/v2/a/blobs/uploads/1?state=x") == base
    for other in ("http://registry.example.org/", "https://registry.example.org:444/", "https://example.org/"):
        assert registry._server(other) != base


def told_token(body: bytes) -> Callable[[Asked], Answer]:
    """A registry whose tokens are given as *body* says, and that takes any."""

    def answer(asked: Asked) -> Answer:
        if asked.path.startswith("/token"):
            return Answer(200, body=body)
        if "Authorization" in asked.headers:
            return Answer(200, {"Content-Type": DOCKER_MANIFEST}, b"{}")
        return Answer(401, {"WWW-Authenticate": f'Bearer realm="http://{asked.headers["Host"]}/token"'})

    return answer


@pytest.mark.parametrize(
    "body",
    [b'{"token":null,"access_token":"t"}', b'{"token":"t","expires_in":null}', b'{"token":"t","expires_in":299.5}'],
)
def test_a_token_is_found_whatever_stands_beside_it(body: bytes, tmp_path: Path) -> None:
    with answering(told_token(body)) as server:
        assert repository(server.host, tmp_path).manifest("v1") == (b"{}", DOCKER_MANIFEST)
        assert server.asked[-1].headers["Authorization"] == "Bearer t"


@pytest.mark.parametrize("token", ["secret\\nsecret", "\u20acsecret"])
def test_a_token_that_cannot_be_sent_is_not_shown(token: str, tmp_path: Path) -> None:
    with answering(told_token(f'{{"token":"{token}"}}'.encode())) as server:
        with pytest.raises(InvalidInput, match="malformed") as told:
            repository(server.host, tmp_path).manifest("v1")
        assert "secret" not in str(told.value)


@pytest.mark.parametrize("status", [202, 307, 401])
def test_a_registry_that_names_no_url_is_told_so(status: int, tmp_path: Path) -> None:
    headers = {"Location": "http://[::1/x", "WWW-Authenticate": 'Bearer realm="http://[::1"'}
    known = {"HEAD": Answer(404), "GET": Answer(200), "POST": Answer(status, headers)}
    with answering(lambda asked: known[asked.method]) as server, pytest.raises(InvalidInput, match="malformed"):
        put(repository(server.host, tmp_path), BLOB)


class TestProxy:
    def test_it_is_told_who_asks(self, tmp_path: Path) -> None:
        with answering(lambda asked: Answer(407)) as server:
            settings = Settings(
                registry=RegistrySettings(docker_config=tmp_path, https_proxy=f"http://gear:of%3Aworkers@{server.host}")
            )
            target = Repository.of(settings.registry, Reference.parse("registry.example.org/some/image"))
            with pytest.raises(Unavailable):
                target.registry.transport.send("GET", "https://registry.example.org/v2/")
        (asked,) = server.asked
        assert (asked.method, asked.path) == ("CONNECT", "registry.example.org:443")
        expected = base64.b64encode(b"gear:of:workers").decode()
        assert asked.headers.get("Proxy-Authorization") == f"Basic {expected}"

    def test_it_may_stand_without_a_scheme(self) -> None:
        made = transport.open_transport(RegistrySettings(https_proxy="proxy.example.org:3128"), "registry.example.org")
        assert str(made.pool.proxy) == "http://proxy.example.org:3128"

    @pytest.mark.parametrize("proxy", ["socks5://u:secret@example.org", "http://u:secret@[", "http://u:secret@h:x"])
    def test_one_that_is_not_known_is_told_without_its_password(self, proxy: str) -> None:
        with pytest.raises(InvalidInput, match="HTTPS_PROXY") as told:
            transport.open_transport(RegistrySettings(https_proxy=proxy), "registry.example.org")
        assert "secret" not in str(told.value)


class TestBasic:
    @pytest.fixture
    def peer(self, tmp_path: Path) -> Iterator[Registry]:
        auth = registries.basic_auth(tmp_path / "auth")
        with registries.registry(tmp_path / "registry", auth=auth) as running:
            yield running

    def test_who_is_logged_in_may(self, peer: Registry, tmp_path: Path) -> None:
        target = repository(peer.host, logged_in(tmp_path / "docker", peer.host))
        assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB

    def test_the_user_may_stand_in_plain(self, peer: Registry, tmp_path: Path) -> None:
        config = logged_in(tmp_path / "docker", f"https://{peer.host}/v1/", username=USER, password=PASSWORD)
        assert not repository(peer.host, config).has_blob(digest_of(BLOB))

    def test_who_is_not_logged_in_is_told_so(self, peer: Registry, tmp_path: Path) -> None:
        with pytest.raises(FailedPrecondition, match=f"docker login {peer.host}"):
            put(repository(peer.host, tmp_path), BLOB)

    def test_a_wrong_password_is_told(self, peer: Registry, tmp_path: Path) -> None:
        config = logged_in(tmp_path / "docker", peer.host, username=USER, password="other")
        with pytest.raises(FailedPrecondition, match="docker login"):
            put(repository(peer.host, config), BLOB)

    def test_a_credential_helper_is_asked(
        self, peer: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        helper = tmp_path / "docker-credential-tests"
        answer = json.dumps({"ServerURL": peer.host, "Username": USER, "Secret": PASSWORD})
        helper.write_text(f"#!/bin/sh\n[ \"$1 $(cat)\" = 'get {peer.host}' ] && echo '{answer}'\n")
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {peer.host: "tests"}}))
        assert not repository(peer.host, tmp_path).has_blob(digest_of(BLOB))

    def test_the_helper_for_docker_hub_is_named_as_docker_names_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        helper = tmp_path / "docker-credential-tests"
        helper.write_text(f'#!/bin/sh\necho \'{{"Username": "{USER}", "Secret": "x"}}\'\n')
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        (tmp_path / "config.json").write_text('{"credHelpers": {"https://index.docker.io/v1/": "tests"}}')
        assert find_credentials(tmp_path, "docker.io") == Credentials(USER, "x")

    def test_a_helper_that_knows_nothing_is_no_error(
        self, peer: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        helper = tmp_path / "docker-credential-tests"
        helper.write_text("#!/bin/sh\necho 'credentials not found in native keychain'; exit 1\n")
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        config = json.loads((logged_in(tmp_path, peer.host) / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"credsStore": "tests"}))
        assert not repository(peer.host, tmp_path).has_blob(digest_of(BLOB))

    def test_a_store_is_not_asked_for_a_host_that_nobody_has_logged_in_to(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        helper = tmp_path / "docker-credential-tests"
        helper.write_text(f'#!/bin/sh\necho \'{{"Username": "{USER}", "Secret": "x"}}\'\n')
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        config = {"auths": {"registry.example.org": {}}, "credsStore": "tests"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert find_credentials(tmp_path, "registry.example.org") == Credentials(USER, "x")
        assert find_credentials(tmp_path, "registry.example.com") is None

    def test_a_helper_that_is_not_there_is_named(self, peer: Registry, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"auths": {peer.host: {}}, "credsStore": "not-there"}))
        with pytest.raises(FailedPrecondition, match="docker-credential-not-there"):
            put(repository(peer.host, tmp_path), BLOB)


class TestTokens:
    @pytest.fixture
    def tokens(self, tmp_path: Path) -> Iterator[TokenServer]:
        server = TokenServer(tmp_path / "tokens")
        with server.running():
            yield server

    @pytest.fixture
    def peer(self, tmp_path: Path, tokens: TokenServer) -> Iterator[Registry]:
        with registries.registry(tmp_path / "registry", auth=tokens.auth) as running:
            yield running

    def test_a_token_allows_what_was_asked(self, peer: Registry, tokens: TokenServer, tmp_path: Path) -> None:
        target = repository(peer.host, logged_in(tmp_path / "docker", peer.host))
        assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB
        assert tokens.asked == ["GET repository:some/image:pull,push", "GET repository:some/image:pull"]

    def test_nobody_may_pull_but_not_push(self, peer: Registry, tmp_path: Path) -> None:
        digest = put(repository(peer.host, logged_in(tmp_path / "docker", peer.host)), BLOB)
        nobody = repository(peer.host, tmp_path / "nobody")
        assert read_all(nobody.blob(digest, len(BLOB))) == BLOB
        with pytest.raises(FailedPrecondition, match="docker login"):
            put(nobody, b"something new")

    def test_a_mount_asks_for_both_repositories(self, peer: Registry, tokens: TokenServer, tmp_path: Path) -> None:
        config = logged_in(tmp_path / "docker", peer.host)
        digest = put(repository(peer.host, config, "one"), BLOB)
        assert repository(peer.host, config, "other").mount(digest, "one")
        assert tokens.asked[-1] == "GET repository:other:pull,push repository:one:pull"

    def test_an_identity_token_is_exchanged(self, peer: Registry, tokens: TokenServer, tmp_path: Path) -> None:
        target = repository(peer.host, logged_in(tmp_path / "docker", peer.host, identitytoken="identity"))
        put(target, BLOB)
        assert tokens.asked[-1] == "POST repository:some/image:pull,push"

    def test_a_token_that_the_registry_refuses_is_asked_for_anew(
        self, peer: Registry, tokens: TokenServer, tmp_path: Path
    ) -> None:
        target = repository(peer.host, tmp_path)
        target.has_blob(digest_of(BLOB))
        known = target.registry.authenticator.cached(("repository:some/image:pull,push",))
        target.registry.authenticator._tokens[("repository:some/image:pull,push",)] = (f"{known}x", float("inf"))
        assert not target.has_blob(digest_of(BLOB))
        assert len(tokens.asked) == 2

    @pytest.mark.parametrize("server", ["example.org", "localhost:80@example.org"])
    def test_a_password_is_not_told_to_an_open_realm(self, server: str, tmp_path: Path) -> None:
        target = repository("registry.example.org", logged_in(tmp_path, "registry.example.org"))
        with pytest.raises(FailedPrecondition, match="over https only"):
            target.registry.authenticator.authorize(f'Bearer realm="http://{server}/token",service="s"', ("scope",))

    @pytest.mark.parametrize("others", ['{}, Basic realm="other"', 'Basic realm="other", {}', "Negotiate, {}"])
    def test_of_several_challenges_the_token_is_taken(self, others: str) -> None:
        asked = others.format('Bearer realm="https://example.org/token",service="s, t"')
        assert Challenge.parse("_" * 60_000) is None, "and at once"
        assert Challenge.parse(asked) == Challenge("bearer", {"realm": "https://example.org/token", "service": "s, t"})


class TestTls:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> tuple[Path, Path]:
        return registries.make_certificate(tmp_path / "tls")

    @pytest.fixture
    def peer(self, tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[Registry]:
        tls = f"  tls:\n    certificate: {certificate[0]}\n    key: {certificate[1]}\n"
        with registries.registry(tmp_path / "registry", http=tls) as running:
            yield running

    def test_a_certificate_beside_dockers_own_is_trusted(
        self, peer: Registry, certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "certs.d" / peer.host).mkdir(parents=True)
        (tmp_path / "certs.d" / peer.host / "ca.crt").write_bytes(certificate[0].read_bytes())
        monkeypatch.setattr(transport, "CERTIFICATES", tmp_path / "certs.d")
        target = repository(peer.host, tmp_path)
        assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB

    def test_an_unknown_certificate_is_refused(self, peer: Registry, tmp_path: Path) -> None:
        with pytest.raises(FailedPrecondition, match=r"ca\.crt"):
            put(repository(peer.host, tmp_path), BLOB)

    def test_a_certificate_that_cannot_be_read_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "localhost").mkdir()
        (tmp_path / "localhost" / "ca.crt").write_text("nonsense")
        monkeypatch.setattr(transport, "CERTIFICATES", tmp_path)
        with pytest.raises((FailedPrecondition, ssl.SSLError), match="localhost"):
            repository("localhost", tmp_path)
