"""Credentials for registries: from the config.json that `docker login` writes, and from credential helpers.

Source: docker/cli, "config.json"; docker/docker-credential-helpers, "Development" (the protocol on stdin and stdout).
"""

from __future__ import annotations

import base64
import binascii
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from gearworkers.errors import FailedPrecondition, InvalidInput, NotFound
from gearworkers.images.reference import DOCKER_HUB
from gearworkers.util.fs import read_small

_HUB_KEY = "https://index.docker.io/v1/"
_HELPER_TIMEOUT_S = 60
_IDENTITY_TOKEN_USER = "<token>"
_NOT_FOUND_MESSAGE = "credentials not found"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a password, or an identity token to exchange for access tokens."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)


class _Auth(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identity_token: str = msgspec.field(name="identitytoken", default="")


class _Config(msgspec.Struct, frozen=True):
    auths: dict[str, _Auth] = {}
    helpers: dict[str, str] = msgspec.field(name="credHelpers", default_factory=dict)
    store: str = msgspec.field(name="credsStore", default="")


class _HelperAnswer(msgspec.Struct, frozen=True):
    user: str = msgspec.field(name="Username")
    secret: str = msgspec.field(name="Secret")


def find_credentials(directory: Path, host: str) -> Credentials | None:
    """Return the credentials that Docker's client would use for the registry *host*; None for anonymous access.

    Only a host named in config.json, where `docker login` records it, has credentials: a `credsStore` may return
    credentials for any host, and *host* may come from a task. Each call reads config.json, so a new `docker login`
    takes effect at once.

    Args:
        directory: Directory of config.json, which may be missing.
        host: As in an image's name.

    Raises:
        InvalidInput: config.json is malformed.
        FailedPrecondition: A credential helper is missing or fails.
    """
    config = _read(directory / "config.json")
    key = next((key for key in config.auths if _names(key, host)), None)
    helper = next((helper for key, helper in config.helpers.items() if _names(key, host)), "")
    if key is not None:
        helper = helper or config.store
    if helper:
        found = _ask_helper(helper, _HUB_KEY if host == DOCKER_HUB else host)
        if found is not None:
            return found
    return _credentials(config.auths[key], key) if key is not None else None


def _read(path: Path) -> _Config:
    try:
        return msgspec.json.decode(read_small(path), type=_Config)
    except NotFound:
        return _Config()
    except ValueError as exc:
        raise InvalidInput(f"{path}: {exc}") from exc


def _names(key: str, host: str) -> bool:
    """Return whether a key of `auths` or `credHelpers`, which may be a URL, names *host*."""
    if host == DOCKER_HUB:
        return key in (_HUB_KEY, DOCKER_HUB, "index.docker.io")
    return key == host or urlsplit(key).netloc == host


def _credentials(auth: _Auth, key: str) -> Credentials | None:
    user, password = auth.username, auth.password
    if auth.auth:
        try:
            user, _, password = base64.b64decode(auth.auth).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise InvalidInput(
                f"config.json: the auth of {key} is not base64 of user:password; run `docker login` again"
            ) from exc
    if auth.identity_token:
        return Credentials(identity_token=auth.identity_token)
    return Credentials(user, password.rstrip("\0")) if user else None


def _ask_helper(name: str, server: str) -> Credentials | None:
    command = [f"docker-credential-{name}", "get"]
    try:
        done = subprocess.run(command, input=server.encode(), capture_output=True, timeout=_HELPER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise FailedPrecondition(f"cannot run {command[0]}, which config.json names for {server}: {exc}") from exc
    if done.returncode != 0:
        output = (done.stdout + done.stderr).decode(errors="replace").strip()
        if _NOT_FOUND_MESSAGE in output:
            return None
        raise FailedPrecondition(f"{command[0]} returned no credentials for {server}: {output[:200]}")
    try:
        answer = msgspec.json.decode(done.stdout, type=_HelperAnswer)
    except ValueError as exc:
        raise FailedPrecondition(f"{command[0]} returned malformed credentials for {server}: {exc}") from exc
    if answer.user == _IDENTITY_TOKEN_USER:
        return Credentials(identity_token=answer.secret)
    return Credentials(answer.user, answer.secret)
