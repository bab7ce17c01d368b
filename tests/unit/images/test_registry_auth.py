"""Authenticate to a registry: tokens, passwords, credential helpers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, InvalidInput
from gearworkers.images.auth import Challenge
from gearworkers.images.credentials import Credentials, find_credentials
from gearworkers.images.layer_reader import read_all
from gearworkers.images.manifest import DOCKER_MANIFEST, digest_of
from tests.support import registries
from tests.support.answers import Answer, Request, answering
from tests.support.registries import PASSWORD, USER, TokenServer
from tests.support.registry import Registry
from tests.support.registry_client import BLOB, logged_in, put, repository


def issuing_token(body: bytes) -> Callable[[Request], Answer]:
    """Return a registry that issues tokens with *body*, and accepts any token."""

    def answer(request: Request) -> Answer:
        if request.path.startswith("/token"):
            return Answer(200, body=body)
        if "Authorization" in request.headers:
            return Answer(200, {"Content-Type": DOCKER_MANIFEST}, b"{}")
        return Answer(401, {"WWW-Authenticate": f'Bearer realm="http://{request.headers["Host"]}/token"'})

    return answer


@pytest.mark.parametrize(
    "body",
    [b'{"token":null,"access_token":"t"}', b'{"token":"t","expires_in":null}', b'{"token":"t","expires_in":299.5}'],
)
def test_a_token_is_read_from_responses_with_nulls_and_fractional_lifetimes(body: bytes, tmp_path: Path) -> None:
    with answering(issuing_token(body)) as server:
        assert repository(server.host, tmp_path).manifest("v1") == (b"{}", DOCKER_MANIFEST)
        assert server.requests[-1].headers["Authorization"] == "Bearer t"


@pytest.mark.parametrize("token", ["secret\\nsecret", "\u20acsecret"])
def test_a_token_that_cannot_be_sent_is_not_shown(token: str, tmp_path: Path) -> None:
    with answering(issuing_token(f'{{"token":"{token}"}}'.encode())) as server:
        with pytest.raises(InvalidInput, match="malformed") as caught:
            repository(server.host, tmp_path).manifest("v1")
        assert "secret" not in str(caught.value)


class TestBasic:
    @pytest.fixture
    def peer(self, tmp_path: Path) -> Iterator[Registry]:
        auth = registries.basic_auth(tmp_path / "auth")
        with registries.registry(tmp_path / "registry", auth=auth) as running:
            yield running

    def test_a_logged_in_user_can_push_and_pull(self, peer: Registry, tmp_path: Path) -> None:
        target = repository(peer.host, logged_in(tmp_path / "docker", peer.host))
        assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB

    def test_user_and_password_may_be_separate_fields(self, peer: Registry, tmp_path: Path) -> None:
        config = logged_in(tmp_path / "docker", f"https://{peer.host}/v1/", username=USER, password=PASSWORD)
        assert not repository(peer.host, config).has_blob(digest_of(BLOB))

    def test_the_error_without_credentials_suggests_docker_login(self, peer: Registry, tmp_path: Path) -> None:
        with pytest.raises(FailedPrecondition, match=f"docker login {peer.host}"):
            put(repository(peer.host, tmp_path), BLOB)

    def test_the_error_for_a_wrong_password_suggests_docker_login(self, peer: Registry, tmp_path: Path) -> None:
        config = logged_in(tmp_path / "docker", peer.host, username=USER, password="other")
        with pytest.raises(FailedPrecondition, match="docker login"):
            put(repository(peer.host, config), BLOB)

    def test_credentials_come_from_a_helper(
        self, peer: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        helper = tmp_path / "docker-credential-tests"
        answer = json.dumps({"ServerURL": peer.host, "Username": USER, "Secret": PASSWORD})
        helper.write_text(f"#!/bin/sh\n[ \"$1 $(cat)\" = 'get {peer.host}' ] && echo '{answer}'\n")
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {peer.host: "tests"}}))
        assert not repository(peer.host, tmp_path).has_blob(digest_of(BLOB))

    def test_the_helper_for_docker_hub_is_configured_by_dockers_key(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        helper = tmp_path / "docker-credential-tests"
        helper.write_text(f'#!/bin/sh\necho \'{{"Username": "{USER}", "Secret": "x"}}\'\n')
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        (tmp_path / "config.json").write_text('{"credHelpers": {"https://index.docker.io/v1/": "tests"}}')
        assert find_credentials(tmp_path, "docker.io") == Credentials(USER, "x")

    def test_a_store_without_credentials_falls_back_to_config_json(
        self, peer: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        helper = tmp_path / "docker-credential-tests"
        helper.write_text("#!/bin/sh\necho 'credentials not found in native keychain'; exit 1\n")
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        config = json.loads((logged_in(tmp_path, peer.host) / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"credsStore": "tests"}))
        assert not repository(peer.host, tmp_path).has_blob(digest_of(BLOB))

    def test_a_store_is_not_asked_for_hosts_without_a_login(
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

    def test_the_error_for_a_missing_helper_names_it(self, peer: Registry, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"auths": {peer.host: {}}, "credsStore": "missing"}))
        with pytest.raises(FailedPrecondition, match="docker-credential-missing"):
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

    def test_tokens_are_requested_for_the_needed_scope(
        self, peer: Registry, tokens: TokenServer, tmp_path: Path
    ) -> None:
        target = repository(peer.host, logged_in(tmp_path / "docker", peer.host))
        assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB
        assert tokens.requests == ["GET repository:some/image:pull,push", "GET repository:some/image:pull"]

    def test_an_anonymous_user_can_pull_but_not_push(self, peer: Registry, tmp_path: Path) -> None:
        digest = put(repository(peer.host, logged_in(tmp_path / "docker", peer.host)), BLOB)
        anonymous = repository(peer.host, tmp_path / "anonymous")
        assert read_all(anonymous.blob(digest, len(BLOB))) == BLOB
        with pytest.raises(FailedPrecondition, match="docker login"):
            put(anonymous, b"something new")

    def test_an_identity_token_is_exchanged(self, peer: Registry, tokens: TokenServer, tmp_path: Path) -> None:
        target = repository(peer.host, logged_in(tmp_path / "docker", peer.host, identitytoken="identity"))
        put(target, BLOB)
        assert tokens.requests[-1] == "POST repository:some/image:pull,push"

    def test_a_rejected_token_is_requested_again(self, peer: Registry, tokens: TokenServer, tmp_path: Path) -> None:
        target = repository(peer.host, tmp_path)
        target.has_blob(digest_of(BLOB))
        known = target.registry.authenticator.cached(("repository:some/image:pull,push",))
        target.registry.authenticator.tokens[("repository:some/image:pull,push",)] = (f"{known}x", float("inf"))
        assert not target.has_blob(digest_of(BLOB))
        assert len(tokens.requests) == 2

    @pytest.mark.parametrize("server", ["example.org", "localhost:80@example.org"])
    def test_a_password_is_not_sent_to_an_unencrypted_realm(self, server: str, tmp_path: Path) -> None:
        target = repository("registry.example.org", logged_in(tmp_path, "registry.example.org"))
        with pytest.raises(FailedPrecondition, match="over https only"):
            target.registry.authenticator.authorize(f'Bearer realm="http://{server}/token",service="s"', ("scope",))

    @pytest.mark.parametrize("others", ['{}, Basic realm="other"', 'Basic realm="other", {}', "Negotiate, {}"])
    def test_bearer_is_preferred_among_several_challenges(self, others: str) -> None:
        header = others.format('Bearer realm="https://example.org/token",service="s, t"')
        assert Challenge.parse("_" * 60_000) is None, "parsing takes linear time"
        assert Challenge.parse(header) == Challenge("bearer", {"realm": "https://example.org/token", "service": "s, t"})
