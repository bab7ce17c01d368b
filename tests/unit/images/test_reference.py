"""Parse image names as Docker does."""

from __future__ import annotations

import pytest

from gearworkers.errors import InvalidInput
from gearworkers.images.reference import Reference

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest"),
    [
        ("debian", "docker.io", "library/debian", "latest", None),
        ("debian:12-slim", "docker.io", "library/debian", "12-slim", None),
        ("grafana/loki", "docker.io", "grafana/loki", "latest", None),
        ("docker.io/debian", "docker.io", "library/debian", "latest", None),
        ("index.docker.io/library/debian", "docker.io", "library/debian", "latest", None),
        ("docker://ghcr.io/a/b:c", "ghcr.io", "a/b", "c", None),
        ("localhost/a", "localhost", "a", "latest", None),
        ("localhost:5000/a", "localhost:5000", "a", "latest", None),
        ("[::1]:5000/a/b_c/d--e.f:T_1", "[::1]:5000", "a/b_c/d--e.f", "T_1", None),
        (f"registry.example.org/a@{DIGEST}", "registry.example.org", "a", None, DIGEST),
        (f"a/b:t@{DIGEST}", "docker.io", "a/b", "t", DIGEST),
    ],
)
def test_a_name_is_parsed_as_docker_does(
    text: str, host: str, repository: str, tag: str | None, digest: str | None
) -> None:
    assert Reference.parse(text) == Reference(host, repository, tag, digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":tag",
        "Debian",
        "a//b",
        "a/",
        "a:",
        "a:-t",
        "a:" + "t" * 129,
        "a@",
        "a@sha256:00",
        f"a@{DIGEST}0",
        "a@md5:" + "0" * 32,
        "a.b/../c",
        "a b",
        "user@host/a",
        "http://host/a",
        "a/b\n",
        "-host.org/a",
        "x" * 256,
    ],
)
def test_malformed_names_are_rejected(text: str) -> None:
    with pytest.raises(InvalidInput):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost:5000", True),
        ("127.0.0.1", True),
        ("127.9.8.7:80", True),
        ("[::1]:5000", True),
        ("128.0.0.1:5000", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_only_loopback_hosts_count_as_loopback(host: str, loopback: bool) -> None:
    assert Reference.parse(f"{host}/a").is_loopback is loopback


@pytest.mark.parametrize("text", ["localhost:5000/a/b:c", f"docker.io/library/debian@{DIGEST}"])
def test_a_reference_is_printed_as_it_was_parsed(text: str) -> None:
    assert str(Reference.parse(text)) == text


def test_docker_hub_has_a_separate_api_host() -> None:
    assert Reference.parse("debian").api_host == "registry-1.docker.io"
    assert Reference.parse("ghcr.io/a").api_host == "ghcr.io"


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("debian", "docker.io/library/debian:12", True),
        ("debian", "index.docker.io/debian", True),
        ("debian", "debian/debian", False),
        ("Host.org/a", "host.org:443/a", True),
        ("host.org/a", "host.org:5000/a", False),
        ("localhost:5000/a", "127.0.0.1:5000/a", True),
        ("localhost:5000/a", "[::1]:5000/a", True),
        ("localhost:5000/a", "127.0.0.2:5000/a", False),
        ("localhost:5000/a", "localhost:5001/a", False),
        (f"host.org/a@{DIGEST}", "host.org/a:t", True),
    ],
)
def test_aliases_of_a_repository_count_as_the_same(one: str, other: str, are_same: bool) -> None:
    assert Reference.parse(one).is_in_repository_of(Reference.parse(other)) is are_same
