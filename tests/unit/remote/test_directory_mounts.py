"""Use a remote whose file system is not mounted, hangs, or fails like a broken NFS."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.cli.doctor import remote_check
from gearworkers.errors import NotFound, Unavailable
from gearworkers.lazyfs import fuse_connection as fuse
from gearworkers.lazyfs import fuse_protocol
from gearworkers.lazyfs.fuse_connection import FuseConnection, FuseReply
from gearworkers.lazyfs.fuse_protocol import ROOT_NODE, FuseRequest, Op
from gearworkers.mounts import overlay
from gearworkers.remote.directory import DirectoryStore
from gearworkers.remote.factory import open_remote
from gearworkers.remote.remote import Remote
from gearworkers.settings import RemoteSettings, Settings

pytestmark = pytest.mark.slow

CONTENT = b"content"
DIGEST = hashlib.sha256(CONTENT).digest()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return replace(
        Settings(), gear_root=tmp_path / "gear", remote=RemoteSettings(url=str(tmp_path / "remote"), timeout_s=30.0)
    )


# -- not mounted


@contextmanager
def opened(settings: Settings) -> Iterator[Remote]:
    """Open the remote, as another process would."""
    remote = open_remote(settings)
    yield remote
    remote.close()


def test_a_missing_directory_is_not_created(settings: Settings) -> None:
    direct = Remote(DirectoryStore(Path(settings.remote.url)))
    for ask in (
        lambda: direct.put_many([(DIGEST, CONTENT)]),
        lambda: direct.has([DIGEST]),
        lambda: list(direct.fetch(DIGEST)),
        lambda: direct.put_document("name", b""),
        lambda: direct.document("name"),
    ):
        with pytest.raises(Unavailable, match="does not exist: mount"):
            ask()
    found = remote_check(settings)
    assert not found.ok
    assert "does not exist: mount" in found.found
    with opened(settings) as remote:
        assert not Path(settings.remote.url).exists()
        Path(settings.remote.url).mkdir()
        remote.put_many([(DIGEST, CONTENT)])
        assert list(remote.fetch(DIGEST)) == [CONTENT]
    assert remote_check(settings).ok


def test_a_removed_subdirectory_is_created_again(settings: Settings) -> None:
    directory = Path(settings.remote.url)
    directory.mkdir()
    with opened(settings) as remote:
        for name in ("objects", "documents", "staging"):
            remote.put_many([(DIGEST, CONTENT)])
            remote.put_document("a/name", b"1")
            shutil.rmtree(directory / name)
            remote.put_many([(hashlib.sha256(b"another").digest(), b"another")])
            remote.put_document("a/name", b"2")
            assert remote.document("a/name") == b"2"


def test_an_empty_mount_point_is_unavailable(settings: Settings) -> None:
    path, moved = Path(settings.remote.url), Path(settings.remote.url + "-moved")
    path.mkdir()
    with opened(settings) as before:
        before.put_many([(DIGEST, CONTENT)])
        path.rename(moved)
        path.mkdir()
        with pytest.raises(Unavailable, match="held objects and is empty"):
            list(before.fetch(DIGEST))
        another = Remote(DirectoryStore(path, settings.gear_remotes_path))
        with pytest.raises(Unavailable, match="held objects and is empty"):
            another.put_many([(hashlib.sha256(b"new").digest(), b"new")])
        assert list(path.iterdir()) == []
        path.rmdir()
        moved.rename(path)
        assert list(before.fetch(DIGEST)) == [CONTENT]
        shutil.rmtree(path)
        (path / "objects").mkdir(parents=True)  # the advice of the error
        with pytest.raises(NotFound):
            list(before.fetch(DIGEST))


# -- mounted, but broken


class Broken:
    """A mounted file system whose first lookups fail; after them it is empty."""

    def __init__(self, error: int, times: int) -> None:
        self.error = error
        self.failures_left = times
        self.lookups = 0

    def __call__(self, request: FuseRequest, reply: FuseReply) -> None:
        if request.op in (Op.FORGET, Op.BATCH_FORGET):
            return
        if request.op == Op.GETATTR and request.node == ROOT_NODE:
            reply.send(fuse_protocol.attributes_body(fuse_protocol.directory(ROOT_NODE)))
        elif request.op == Op.LOOKUP:
            self.lookups += 1
            self.failures_left -= 1
            reply.fail(self.error if self.failures_left >= 0 else errno.ENOENT)
        else:
            reply.fail(errno.ENOSYS)


@contextmanager
def mounted(target: Path, handle: Callable[[FuseRequest, FuseReply], None] | None) -> Iterator[None]:
    """Mount a FUSE file system that *handle* serves; without *handle* it never answers."""
    target.mkdir(parents=True)
    fd = fuse.mount(target)
    thread = threading.Thread(target=FuseConnection(fd, handle).serve) if handle is not None else None
    if thread is not None:
        thread.start()
    try:
        yield
    finally:
        overlay.unmount(target)
        if thread is not None:
            thread.join()
        os.close(fd)  # the kernel fails all pending calls


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_errors_of_a_broken_mount_are_retried(settings: Settings, error: int) -> None:
    broken = Broken(error, times=2)
    with mounted(Path(settings.remote.url), broken), opened(settings) as remote:
        assert remote.has([DIGEST]) == []
    assert broken.lookups > 2


def test_a_mount_that_stays_broken_is_unavailable(settings: Settings) -> None:
    broken = Broken(errno.EIO, times=1 << 30)
    with mounted(Path(settings.remote.url), broken), opened(settings) as remote, pytest.raises(Unavailable):
        remote.has([DIGEST])
    assert broken.lookups > 2


def test_a_hung_mount_is_unavailable_within_the_timeout(settings: Settings) -> None:
    settings = replace(settings, remote=replace(settings.remote, timeout_s=0.5))
    with mounted(Path(settings.remote.url), None), opened(settings) as remote:
        began_s = time.monotonic()
        with pytest.raises(Unavailable, match=r"did not answer within 0\.5 s"):
            list(remote.fetch(DIGEST))
        assert time.monotonic() - began_s < 60


def test_a_hung_cache_delays_only_the_first_reader(settings: Settings) -> None:
    Path(settings.remote.url).mkdir()
    with opened(settings) as remote:
        remote.put_many([(DIGEST, CONTENT)])
    settings = replace(settings, remote=replace(settings.remote, timeout_s=2.0))
    with mounted(settings.gear_nfs_path, None), opened(settings) as remote:
        assert list(remote.fetch(DIGEST)) == [CONTENT]

        def took_s() -> float:
            began_s = time.monotonic()
            assert [list(remote.fetch(DIGEST)) for _ in range(20)] == [[CONTENT]] * 20
            return time.monotonic() - began_s

        assert any(took_s() < settings.remote.timeout_s for _ in range(5)), "at least once, on a busy machine"
