"""Reach a registry through a proxy or over TLS."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, InvalidInput, Unavailable
from gearworkers.images import transport
from gearworkers.images.layer_reader import read_all
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import RegistrySettings, Settings
from tests.support import registries
from tests.support.answers import Answer, answering
from tests.support.registry import Registry
from tests.support.registry_client import BLOB, put, repository


class TestProxy:
    def test_the_proxy_receives_user_and_password(self, tmp_path: Path) -> None:
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

    def test_the_proxys_url_may_lack_a_scheme(self) -> None:
        opened = transport.open_transport(
            RegistrySettings(https_proxy="proxy.example.org:3128"), "registry.example.org"
        )
        assert str(opened.pool.proxy) == "http://proxy.example.org:3128"

    @pytest.mark.parametrize("proxy", ["socks5://u:secret@example.org", "http://u:secret@[", "http://u:secret@h:x"])
    def test_the_error_for_an_unsupported_proxy_hides_its_password(self, proxy: str) -> None:
        with pytest.raises(InvalidInput, match="HTTPS_PROXY") as caught:
            transport.open_transport(RegistrySettings(https_proxy=proxy), "registry.example.org")
        assert "secret" not in str(caught.value)


class TestTls:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> tuple[Path, Path]:
        return registries.make_certificate(tmp_path / "tls")

    @pytest.fixture
    def peer(self, tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[Registry]:
        tls = f"  tls:\n    certificate: {certificate[0]}\n    key: {certificate[1]}\n"
        with registries.registry(tmp_path / "registry", http=tls) as running:
            yield running

    def test_a_ca_in_dockers_certificate_directory_is_trusted(
        self, peer: Registry, certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "certs.d" / peer.host).mkdir(parents=True)
        (tmp_path / "certs.d" / peer.host / "ca.crt").write_bytes(certificate[0].read_bytes())
        monkeypatch.setattr(transport, "CERTIFICATES", tmp_path / "certs.d")
        target = repository(peer.host, tmp_path)
        assert read_all(target.blob(put(target, BLOB), len(BLOB))) == BLOB

    def test_an_untrusted_certificate_is_rejected(self, peer: Registry, tmp_path: Path) -> None:
        with pytest.raises(FailedPrecondition, match=r"ca\.crt"):
            put(repository(peer.host, tmp_path), BLOB)

    def test_the_error_for_an_unreadable_certificate_names_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "localhost").mkdir()
        (tmp_path / "localhost" / "ca.crt").write_text("nonsense")
        monkeypatch.setattr(transport, "CERTIFICATES", tmp_path)
        with pytest.raises((FailedPrecondition, ssl.SSLError), match="localhost"):
            repository("localhost", tmp_path)
