"""The registry client with credentials that `docker login` would have stored."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from gearworkers.images.manifest import digest_of
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import RegistrySettings
from tests.support.registries import PASSWORD, USER

BLOB = bytes(range(256)) * 4000


def repository(host: str, docker_config: Path, name: str = "some/image") -> Repository:
    """Return a repository, with the credentials in *docker_config*."""
    return Repository.of(RegistrySettings(docker_config=docker_config), Reference.parse(f"{host}/{name}"))


def put(target: Repository, data: bytes) -> str:
    """Upload a blob; return its digest."""
    target.put_blob(digest_of(data), io.BytesIO(data), len(data))
    return digest_of(data)


def logged_in(directory: Path, host: str, **auth: str) -> Path:
    """Write config.json to *directory* as `docker login` does; return the directory."""
    directory.mkdir(exist_ok=True)
    pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {host: auth or {"auth": pair}}}))
    return directory
