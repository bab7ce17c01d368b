"""Opens the remote that the settings name; the only place that stacks stores and their decorators.

Every store is stacked the same way: the store of its kind, retries, limits where the store has none of its own, and a
cache if the node has one::

    CachedStore(BoundedStore(RetryingStore(DirectoryStore(nfs/))), BoundedStore(RetryingStore(…)))
"""

from __future__ import annotations

import os
from pathlib import Path

from gearworkers.errors import FailedPrecondition, InvalidInput
from gearworkers.mounts.mountinfo import is_mount_point
from gearworkers.remote.blobstore import BlobStore
from gearworkers.remote.bounded import BoundedStore, Limits
from gearworkers.remote.cached import CachedStore
from gearworkers.remote.directory import DirectoryStore
from gearworkers.remote.manager import ManagerStore
from gearworkers.remote.remote import Remote
from gearworkers.remote.retry import RetryingStore
from gearworkers.settings import Settings

_DIRECTORY_THREADS = 8
_DIRECTORY_GET_BATCH = 64
_DIRECTORY_PUT_BATCH = 8192
"""One sync serves all blobs of a put, and a sync costs more than their writes."""
_CACHE_TIMEOUT_S = 5.0
"""Short, because the remote behind the cache has the blob as well."""


def open_remote(settings: Settings) -> Remote:
    """Return the remote of GEAR_REMOTE, behind the node's nfs/ if it is in use; no request is sent yet.

    Raises:
        FailedPrecondition: GEAR_REMOTE is not set.
        InvalidInput: GEAR_REMOTE has an unknown form.
    """
    if not settings.remote.url:
        raise FailedPrecondition(
            "no remote is set; set GEAR_REMOTE to a directory, s3://BUCKET/PREFIX or a manager's http(s)://HOST:PORT"
        )
    blobs = open_blobs(settings.remote.url, settings)
    if uses_nfs(settings):
        timeout_s = min(_CACHE_TIMEOUT_S, settings.remote.timeout_s)
        blobs = CachedStore(_open_directory(settings.gear_nfs_path, settings, timeout_s), blobs)
    return Remote(blobs)


def open_nfs(settings: Settings) -> Remote:
    """Return the node's nfs/ as a remote, for a node without GEAR_REMOTE."""
    return Remote(_open_directory(settings.gear_nfs_path, settings, settings.remote.timeout_s))


def uses_nfs(settings: Settings) -> bool:
    """Return whether nfs/ is in use: a mount point, a symbolic link, or a directory with objects."""
    nfs = settings.gear_nfs_path
    return is_mount_point(nfs) or nfs.is_symlink() or (nfs / "objects").is_dir()


def open_blobs(url: str, settings: Settings) -> BlobStore:
    """Return the store at a directory's path or a URL, with retries and limits.

    Raises:
        InvalidInput: *url* has an unknown form.
    """
    timeout_s = settings.remote.timeout_s
    if os.path.isabs(url):
        return _open_directory(Path(url), settings, timeout_s)
    if url.startswith("s3://"):
        from gearworkers.remote.s3 import open_s3  # obstore takes memory, and few nodes need it

        return _stack(
            open_s3(url, settings.remote), Limits(settings.remote.fetch_threads, timeout_s, get_batch=1, put_batch=1)
        )
    if url.startswith(("http://", "https://")):
        manager = ManagerStore(url, settings.remote, settings.node)
        return _stack(manager, None)  # its HTTP client limits connections and time
    raise InvalidInput(f"GEAR_REMOTE={url}: set an absolute path, s3://BUCKET/PREFIX or http(s)://HOST:PORT")


def _open_directory(path: Path, settings: Settings, timeout_s: float) -> BlobStore:
    limits = Limits(_DIRECTORY_THREADS, timeout_s, _DIRECTORY_GET_BATCH, _DIRECTORY_PUT_BATCH)
    return _stack(DirectoryStore(path, settings.gear_remotes_path), limits)


def _stack(store: BlobStore, limits: Limits | None) -> BlobStore:
    retrying = RetryingStore(store)
    return retrying if limits is None else BoundedStore(retrying, limits)
