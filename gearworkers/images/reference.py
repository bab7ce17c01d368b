"""Names of images in registries: host, repository, tag and digest.

Source: distribution/reference, "Grammar". Docker adds `docker.io` and `library/` to short names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from gearworkers.errors import InvalidInput
from gearworkers.util.net import host_name, is_loopback

DOCKER_HUB = "docker.io"
_HUB_API_HOST = "registry-1.docker.io"
_DEFAULT_TAG = "latest"
_HTTPS_PORT = "443"
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_MAX_REPOSITORY_CHARACTERS = 255

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|"
                   r"\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?\Z")  # fmt: skip
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Reference:
    """The name of an image in a registry."""

    host: str
    """As in the image's name, with the port if it has one."""
    repository: str
    tag: str | None
    digest: str | None
    """Takes precedence over the tag."""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse ``[HOST/]REPOSITORY[:TAG][@DIGEST]`` as Docker does; without tag and digest, the tag is latest.

        Raises:
            InvalidInput: The text has another form.
        """
        name, _, digest = text.removeprefix("docker://").partition("@")
        host, repository = _split_host(name)
        repository, tag = _split_tag(repository)
        if host == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        if not _HOST.match(host) or not _REPOSITORY.match(repository):
            raise InvalidInput(
                f"{text!r} is not an image name; give [HOST/]repository[:TAG][@DIGEST], the repository in lower case"
            )
        if len(repository) > _MAX_REPOSITORY_CHARACTERS:
            raise InvalidInput(
                f"{text[:40]!r}…: a repository's name must not exceed {_MAX_REPOSITORY_CHARACTERS} characters"
            )
        if tag is not None and not _TAG.match(tag):
            raise InvalidInput(f"{text!r}: {tag!r} is not a tag; tags are letters, digits, _ . and -, at most 128")
        if "@" in text:
            check_digest(digest)
        elif tag is None:
            tag = _DEFAULT_TAG
        return cls(host, repository, tag, digest or None)

    @property
    def api_host(self) -> str:
        """The host of the registry's API."""
        return _HUB_API_HOST if self.host == DOCKER_HUB else self.host

    @property
    def tag_or_digest(self) -> str:
        """The last part of ``/manifests/…`` in the registry's API; the specification calls it the reference."""
        return self.digest or self.tag or _DEFAULT_TAG

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is on this machine, where plain HTTP is as safe as TLS."""
        return is_loopback(host_name(self.host))

    def is_in_repository_of(self, other: Reference) -> bool:
        """Return whether both name the same repository, judged by their names alone."""
        return (self._server, self.repository) == (other._server, other.repository)

    @property
    def _server(self) -> tuple[str, str]:
        """Host and port; all names of this machine give the same result."""
        name, port = host_name(self.host).lower(), self.host.rpartition("]")[2].partition(":")[2]
        return "localhost" if name in _THIS_MACHINE else name, port or _HTTPS_PORT

    def at(self, digest: str) -> Reference:
        """Return the reference to this digest in the same repository."""
        return replace(self, tag=None, digest=digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


def check_digest(digest: str) -> str:
    """Return *digest* if it is ``sha256:`` and 64 hex digits.

    Raises:
        InvalidInput: The digest has another form or algorithm.
    """
    if not _DIGEST.match(digest):
        raise InvalidInput(f"{digest[:100]!r} is not a SHA-256 digest")
    return digest


def _split_host(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return (DOCKER_HUB if first == "index.docker.io" else first), rest
    return DOCKER_HUB, name


def _split_tag(repository: str) -> tuple[str, str | None]:
    base, colon, tag = repository.rpartition(":")
    return (base, tag) if colon else (repository, None)
