"""Which remote the settings ask for; the one place where stores and their decorators are stacked."""

from __future__ import annotations

import os
from pathlib import Path

from gearworkers.errors import FailedPrecondition, InvalidInput
from gearworkers.mounts.mountinfo import is_mount_point
from gearworkers.remote.blobstore import BlobStore
from gearworkers.remote.decorators import Bounded, Cached, Retried
from gearworkers.remote.directory import Directory
from gearworkers.remote.manager import ManagerStore
from gearworkers.remote.remote import Remote
from gearworkers.remote.s3 import in_s3
from gearworkers.settings import Settings

_DIRECTORY_THREADS = 8
_DIRECTORY_TOGETHER = 64
_DIRECTORY_PUT_TOGETHER = 8192
"""They are synced together, which costs more than to write them."""
_NEAR_TIMEOUT_S = 5.0
"""What the near store may take: the remote behind it is there too."""


def open_remote(settings: Settings) -> Remote:
    """The remote of GEAR_REMOTE, behind the node's nfs/ if there is one; nothing is asked of it yet.

    Raises:
        FailedPrecondition: GEAR_REMOTE is not set.
        InvalidInput: It is nothing that is known.
    """
    if not settings.remote.url:
        raise FailedPrecondition(
            "no remote is set; set GEAR_REMOTE to a directory, s3://BUCKET/PREFIX or a manager's http(s)://HOST:PORT"
        )
    blobs = blobs_at(settings.remote.url, settings)
    if has_near(settings):
        near = _directory(settings.gear_nfs_path, settings, min(_NEAR_TIMEOUT_S, settings.remote.timeout_s))
        blobs = Cached(near, blobs)
    return Remote(blobs)


def remote_name(url: str) -> str:
    """What a GEAR_REMOTE is called in messages: without a user and password in it."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url.rstrip("/") or url
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def open_near(settings: Settings) -> Remote:
    """The node's nfs/ alone: for a node that has no remote."""
    return Remote(_directory(settings.gear_nfs_path, settings, settings.remote.timeout_s))


def has_near(settings: Settings) -> bool:
    """Whether nfs/ is more than an empty directory: mounted, a link, or filled by somebody."""
    near = settings.gear_nfs_path
    return is_mount_point(near) or near.is_symlink() or (near / "objects").is_dir()


def blobs_at(url: str, settings: Settings) -> BlobStore:
    """The store at a directory's path or a URL, with retry and limits.

    Raises:
        InvalidInput: It is nothing that is known.
    """
    if os.path.isabs(url):
        return _directory(Path(url), settings, settings.remote.timeout_s)
    if url.startswith("s3://"):
        threads = settings.remote.fetch_threads
        return Bounded(
            Retried(in_s3(url, settings.remote)), threads=threads, timeout_s=settings.remote.timeout_s, together=1
        )
    if url.startswith(("http://", "https://")):
        return Retried(ManagerStore(url, settings.remote, settings.node))
    raise InvalidInput(f"GEAR_REMOTE={url}: an absolute path, s3://BUCKET/PREFIX or http(s)://HOST:PORT is needed")


def _directory(path: Path, settings: Settings, timeout_s: float) -> BlobStore:
    return Bounded(
        Retried(Directory(path, settings.gear_remotes_path)),
        threads=_DIRECTORY_THREADS,
        timeout_s=timeout_s,
        together=_DIRECTORY_TOGETHER,
        put_together=_DIRECTORY_PUT_TOGETHER,
    )
