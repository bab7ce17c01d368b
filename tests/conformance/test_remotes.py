"""Behaviour that all remotes share: a directory, memory, S3, and a manager over a directory or S3."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.errors import AlreadyExists, IntegrityError, InvalidInput, NotFound, Unavailable
from gearworkers.fetch.source import checked_layout
from gearworkers.remote import encoding
from gearworkers.remote.bounded import BoundedStore, Limits
from gearworkers.remote.bucket import BucketStore, memory_store
from gearworkers.remote.cached import CachedStore
from gearworkers.remote.directory import DirectoryStore
from gearworkers.remote.factory import open_remote
from gearworkers.remote.remote import Remote
from gearworkers.remote.retry import RetryingStore
from gearworkers.settings import RemoteSettings, Settings
from gearworkers.util import retry
from tests.support.answers import Answer, Request, answering
from tests.support.remotes import Service, credentials_file, manager_thread, new_bucket, s3_server

KINDS = ["directory", "memory", "memory behind memory", "S3", "manager over directory", "manager over S3"]
LARGE = 3 << 20
MAX_READS = retry.ATTEMPTS**2 * 3
"""Attempts of the client times attempts of the manager, with three reads each."""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return credentials_file(tmp_path_factory.mktemp("aws"))


@pytest.fixture(params=KINDS)
def remote(request: pytest.FixtureRequest, tmp_path: Path, credentials: Path) -> Iterator[Remote]:
    """Yield an empty remote."""
    settings = replace(
        Settings(), gear_root=tmp_path / "gear", node="test", remote=RemoteSettings(aws_credentials_file=credentials)
    )
    with opened(request.param, request, settings) as remote:
        yield remote
        remote.close()


@contextmanager
def opened(kind: str, request: pytest.FixtureRequest, settings: Settings) -> Iterator[Remote]:
    directory = str(settings.gear_root / "remote")
    where = new_bucket(request.getfixturevalue("s3")) if "S3" in kind else directory
    Path(directory).mkdir(parents=True)
    if kind == "memory":
        yield Remote(RetryingStore(memory_store()))
    elif kind == "memory behind memory":
        cache, origin = (
            BoundedStore(
                RetryingStore(memory_store()), Limits(threads=4, timeout_s=60, get_batch=batch, put_batch=batch)
            )
            for batch in (3, 1)
        )
        yield Remote(CachedStore(cache, origin))
    elif kind.startswith("manager"):
        with manager_thread(replace(settings, manager=replace(settings.manager, store=where))) as url:
            yield open_remote(replace(settings, remote=replace(settings.remote, url=url)))
    else:
        yield open_remote(replace(settings, remote=replace(settings.remote, url=where)))


@pytest.fixture
def put(remote: Remote, tmp_path: Path) -> Callable[[bytes], bytes]:
    """Return a function that puts a content and returns its digest."""

    def put(content: bytes) -> bytes:
        return put_as(remote, tmp_path, content, sha256(content))

    return put


def put_as(remote: Remote, tmp_path: Path, content: bytes, digest: bytes) -> bytes:
    path = tmp_path / "content"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        remote.put(digest, fd)
    finally:
        os.close(fd)
    return digest


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def noise(size_bytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


CONTENTS = [
    b"",
    b"x",
    b"text " * 1000,
    noise(5000),
    noise(encoding.LARGE_BYTES - 1),
    noise(encoding.LARGE_BYTES),
    noise(LARGE),
    bytes(LARGE),
    b"\x28\xb5\x2f\xfd looks like zstd",
]


def test_put_contents_are_fetched(remote: Remote, put: Callable[[bytes], bytes]) -> None:
    for content in CONTENTS:
        assert b"".join(remote.fetch(put(content))) == content


def test_puts_are_idempotent(remote: Remote, put: Callable[[bytes], bytes]) -> None:
    for content in (b"twice", noise(LARGE)):
        assert put(content) == put(content)
        assert b"".join(remote.fetch(sha256(content))) == content


def test_wrong_bytes_are_rejected_and_leave_nothing(remote: Remote, tmp_path: Path) -> None:
    for content in (b"wrong", noise(LARGE)):
        digest = sha256(content + b"!")
        with pytest.raises(IntegrityError):
            put_as(remote, tmp_path, content, digest)
        with pytest.raises(IntegrityError):
            remote.put_many([(digest, content[:100])])
        assert remote.has([digest]) == []
        with pytest.raises(NotFound):
            list(remote.fetch(digest))


def test_a_wrong_blob_is_rejected_by_the_store_or_the_reader(remote: Remote) -> None:
    digest = sha256(b"the truth")
    try:
        remote.blobs.put_many([(digest, encoding.encode(b"a lie"))])
    except IntegrityError:
        assert remote.has([digest]) == []
        return
    with pytest.raises((IntegrityError, NotFound)):
        list(remote.fetch(digest))
    with pytest.raises((IntegrityError, NotFound)):
        remote.chunk(digest)
    assert list(remote.fetch_many([digest])) == []


def test_present_digests_are_returned_in_the_order_of_the_request(
    remote: Remote, put: Callable[[bytes], bytes]
) -> None:
    here = [put(b"%d" % number) for number in range(70)]
    absent = [sha256(b"absent %d" % number) for number in range(70)]
    mixed = [digest for pair in zip(absent, reversed(here), strict=True) for digest in pair]
    assert remote.has(mixed) == here[::-1]
    assert remote.has([]) == []


def test_many_objects_are_put_and_fetched_together(remote: Remote) -> None:
    contents = {sha256(content): content for content in (noise(100 + number, number) for number in range(400))}
    assert remote.put_many(contents.items()) == 400
    assert remote.put_many(contents.items()) == 0
    requested = [*contents, sha256(b"absent")]
    assert dict(remote.fetch_many(requested)) == contents
    assert list(remote.fetch_many([])) == []


def test_fetch_many_returns_the_layout_of_a_large_object(remote: Remote, put: Callable[[bytes], bytes]) -> None:
    small, large = put(b"small"), put(noise(LARGE))
    layout = remote.layout(large)
    assert dict(remote.fetch_many([large, small])) == {small: b"small", large: layout}
    assert layout is not None
    assert len(dict(remote.fetch_many([chunk.digest for chunk in layout]))) == len(layout)


def test_a_large_object_has_a_layout_whose_chunks_make_it_up(remote: Remote, put: Callable[[bytes], bytes]) -> None:
    content = noise(LARGE)
    layout = remote.layout(put(content))
    assert layout is not None
    checked_layout(layout, len(content))
    assert b"".join(remote.chunk(chunk.digest) for chunk in layout) == content
    assert 20 < len(layout) < 100


def test_a_small_or_absent_object_has_no_layout(remote: Remote, put: Callable[[bytes], bytes]) -> None:
    assert remote.layout(put(b"small")) is None
    assert remote.layout(sha256(b"absent")) is None


def test_the_size_of_an_object_is_returned(remote: Remote, put: Callable[[bytes], bytes]) -> None:
    for content in (b"", b"12345", noise(LARGE)):
        assert remote.size_bytes(put(content)) == len(content)


def test_versions_of_a_file_share_their_chunks(remote: Remote, put: Callable[[bytes], bytes]) -> None:
    old = noise(LARGE)
    new = old[: LARGE // 2] + b"a few more bytes" + old[LARGE // 2 :]
    layouts = [remote.layout(put(content)) for content in (old, new)]
    first, second = ({chunk.digest for chunk in layout or ()} for layout in layouts)
    assert len(second - first) <= 3


def test_absent_objects_are_not_found(remote: Remote) -> None:
    with pytest.raises(NotFound):
        list(remote.fetch(sha256(b"absent")))
    with pytest.raises(NotFound):
        remote.chunk(sha256(b"absent"))
    with pytest.raises(NotFound):
        remote.size_bytes(sha256(b"absent"))


def test_many_threads_put_the_same_contents(remote: Remote) -> None:
    contents = [(sha256(content), content) for content in (noise(2000, number) for number in range(20))]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: remote.put_many(contents), range(8)))
        fetched = list(threads.map(lambda _: dict(remote.fetch_many([digest for digest, _ in contents])), range(8)))
    assert fetched == [dict(contents)] * 8


NAME = "profiles/registry.example:5000/library/nginx:1.27@amd64+v2"


def test_a_document_is_replaced(remote: Remote) -> None:
    assert remote.document(NAME) is None
    for data in (b"one", b"", b"three " * 1000, b"four"):
        remote.put_document(NAME, data)
        assert remote.document(NAME) == data
    assert remote.document("profiles") is None
    assert remote.document(NAME + "0") is None


def test_only_one_of_two_writers_replaces_a_version(remote: Remote) -> None:
    remote.replace_document("layer", b"first", 0)
    found = remote.get_document("layer")
    assert found is not None
    remote.replace_document("layer", b"second", found.version)
    with pytest.raises(AlreadyExists):
        remote.replace_document("layer", b"late", found.version)
    assert remote.document("layer") == b"second"


def test_concurrent_replacements_of_a_document_leave_the_content_of_one_writer(remote: Remote) -> None:
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda number: remote.put_document("raced", b"%d" % number), range(6)))
    assert remote.document("raced") in {b"%d" % number for number in range(6)}


def test_a_version_that_is_listed_but_missing_is_reported_soon(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.put_document(NAME, b"one")
    reads = 0

    def fail_read(self: object, name: str, version: int) -> bytes:
        nonlocal reads
        reads += 1
        assert reads <= MAX_READS, "too many reads"
        raise NotFound(f"document {name}: version {version} is not there")

    with monkeypatch.context() as patched:
        patched.setattr(retry, "backoff_s", lambda state: 0.0)
        for store in (DirectoryStore, BucketStore):
            patched.setattr(store, "read_version", fail_read)
        with pytest.raises(Unavailable, match=rf"{re.escape(NAME)}.*version 1 is listed and cannot be read"):
            remote.document(NAME)
    assert remote.document(NAME) == b"one", "the version is readable again"


def test_a_wrong_listing_of_a_document_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases are a dangling link in a directory and a bucket that lists a missing key."""
    monkeypatch.setattr(retry, "backoff_s", lambda state: 0.0)
    (tmp_path / "remote" / "documents" / "layer").mkdir(parents=True)
    (tmp_path / "remote" / "documents" / "layer" / "@0000000003").symlink_to("nowhere")
    listing = b"""<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>
<Contents><Key>documents/layer/@0000000003</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"e"</ETag>
<Size>1</Size></Contents></ListBucketResult>"""

    def answer(request: Request) -> Answer:
        assert len(server.requests) < MAX_READS, "too many reads"
        return Answer(200, body=listing) if "list-type" in request.path else Answer(404)

    credentials = credentials_file(tmp_path)
    with answering(answer) as server:
        for where in (str(tmp_path / "remote"), f"s3://b?endpoint={server.url}"):
            settings = Settings(
                gear_root=tmp_path / "gear", remote=RemoteSettings(url=where, aws_credentials_file=credentials)
            )
            remote = open_remote(settings)
            with pytest.raises(Unavailable, match=r"remove documents/layer/@0000000003"):
                remote.document("layer")
            remote.close()


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a/@1", "a b", "ä", "a" * 201, "a/" * 257 + "a"]
)
def test_invalid_names_of_documents_are_rejected(name: str) -> None:
    remote = Remote(memory_store())
    with pytest.raises(InvalidInput):
        remote.document(name)
    with pytest.raises(InvalidInput):
        remote.put_document(name, b"")
