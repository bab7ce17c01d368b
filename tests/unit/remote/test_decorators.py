"""What stores of blobs are wrapped in: retry, limits in number and time, a nearer store; and how errors are told."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from obstore import exceptions as foreign

from gearworkers.cli.doctor import remote_check
from gearworkers.errors import (
    FailedPrecondition,
    GearError,
    IntegrityError,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from gearworkers.remote import bucket, encoding
from gearworkers.remote.blobstore import Document
from gearworkers.remote.bucket import in_memory
from gearworkers.remote.decorators import Bounded, Cached, Retried
from gearworkers.remote.directory import Directory
from gearworkers.remote.factory import has_near, open_remote
from gearworkers.remote.remote import Remote
from gearworkers.remote.s3 import SharedCredentials, in_s3
from gearworkers.settings import RemoteSettings, Settings
from gearworkers.util.retry import ATTEMPTS
from tests.support.answers import Answer, answering
from tests.support.processes import wait_until
from tests.support.remotes import s3_server


class Store:
    """In memory; fails when told to, and counts what it is asked."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.documents: dict[str, Document] = {}
        self.errors: list[GearError] = []
        self.break_after: int | None = None
        self.asked: list[list[bytes]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.hang: threading.Event | None = None

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        self._asked(digests)
        return {digest for digest in digests if digest in self.held}

    def get(self, digest: bytes) -> bytes:
        self._asked([digest])
        if digest not in self.held:
            raise NotFound(digest.hex())
        return self.held[digest]

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        self._asked(digests)
        for number, digest in enumerate(digests):
            if number == self.break_after:
                raise Unavailable("broken off")
            if digest in self.held:
                yield digest, self.held[digest]

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        self._asked([digest for digest, _ in blobs])
        self.held.update(blobs)

    def get_document(self, name: str) -> Document | None:
        self._asked([])
        return self.documents.get(name)

    def put_document(self, name: str, document: Document) -> None:
        self._asked([])
        self.documents[name] = document

    def close(self) -> None:
        pass

    def _asked(self, digests: Sequence[bytes]) -> None:
        with self.lock:
            self.asked.append(list(digests))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            error = self.errors.pop(0) if self.errors else None
        if self.hang is not None:
            self.hang.wait(60)
        with self.lock:
            self.at_once -= 1
        if error is not None:
            raise error


@pytest.fixture
def store() -> Store:
    return Store()


def blobs(count: int) -> dict[bytes, bytes]:
    contents = [b"content %d" % number for number in range(count)]
    return {hashlib.sha256(content).digest(): encoding.encode(content) for content in contents}


# -- retry


def test_what_is_retryable_is_tried_again(store: Store) -> None:
    store.held = blobs(1)
    (digest,) = store.held
    store.errors = [Unavailable("once"), Unavailable("twice")]
    assert Retried(store).get(digest) == store.held[digest]
    assert len(store.asked) == 3


@pytest.mark.slow
def test_what_stays_unavailable_is_given_up(store: Store) -> None:
    store.errors = [Unavailable("again") for _ in range(ATTEMPTS + 1)]
    with pytest.raises(Unavailable):
        Retried(store).present([bytes(32)])
    assert len(store.asked) == ATTEMPTS


@pytest.mark.parametrize("error", [NotFound("x"), IntegrityError("x"), FailedPrecondition("x"), InvalidInput("x")])
def test_nothing_else_is_tried_again(store: Store, error: GearError) -> None:
    store.errors = [error]
    with pytest.raises(type(error)):
        Retried(store).put_many([])
    assert len(store.asked) == 1


def test_a_stream_that_breaks_off_goes_on_where_it_was(store: Store) -> None:
    store.held = blobs(7)
    store.break_after = 3
    assert dict(Retried(store).get_many(list(store.held))) == store.held
    assert [len(asked) for asked in store.asked] == [7, 4, 1]


# -- limits


def test_no_more_calls_run_at_once_than_allowed(store: Store) -> None:
    def let_go(hang: threading.Event) -> None:
        wait_until(lambda: store.at_once == 4, "as many as allowed")
        hang.set()

    store.held = blobs(40)
    store.hang = threading.Event()
    bounded = Bounded(store, threads=4, timeout_s=60, together=1)
    opener = threading.Timer(0.3, let_go, (store.hang,))
    opener.start()
    assert dict(bounded.get_many(list(store.held))) == store.held
    opener.join()
    assert store.most_at_once == 4
    bounded.close()


def test_a_store_that_hangs_is_unavailable_in_bounded_time_and_works_again_when_it_is_back(store: Store) -> None:
    store.held = blobs(3)
    first, *_ = store.held
    store.hang = threading.Event()
    bounded = Bounded(store, threads=2, timeout_s=0.2, together=1)
    for ask in (
        lambda: bounded.get(first),
        lambda: bounded.present([first]),
        lambda: list(bounded.get_many([first])),
        lambda: bounded.get_document("x"),
    ):
        with pytest.raises(Unavailable, match="did not answer"):
            ask()
    store.hang.set()
    assert Bounded(store, threads=2, timeout_s=60, together=1).get(first) == store.held[first]

    def is_back() -> bool:
        try:
            return bounded.get(first) == store.held[first]
        except Unavailable:  # within so short a time; the machine may have other work
            return False

    wait_until(is_back, "it works again")


def test_many_that_are_put_together_may_take_longer_than_one(store: Store) -> None:
    store.hang = threading.Event()
    bounded = Bounded(store, threads=2, timeout_s=0.5, together=1, put_together=100)
    with pytest.raises(Unavailable, match=r"0\.55 s"):
        bounded.put_many([(bytes(32), b"R")])
    later = threading.Timer(1.0, store.hang.set)
    later.start()
    many = blobs(100)
    bounded.put_many(list(many.items()))
    assert store.present(list(many)) == set(many)
    later.join()


# -- a nearer store


def test_what_came_by_is_near(store: Store) -> None:
    near = Store()
    store.held = blobs(5)
    cached = Cached(near, store)
    assert dict(cached.get_many(list(store.held))) == store.held == near.held
    store.asked.clear()
    assert dict(cached.get_many(list(store.held))) == store.held
    assert all(cached.get(digest) == blob for digest, blob in store.held.items())
    assert store.asked == []


def test_what_is_put_is_in_both(store: Store) -> None:
    near = Store()
    Cached(near, store).put_many(list(blobs(3).items()))
    assert near.held == store.held == blobs(3)


def test_a_near_store_that_lies_is_put_right(store: Store) -> None:
    near = Store()
    store.held = blobs(3)
    near.held = {digest: encoding.encode(b"a lie") for digest in store.held}
    cached = Cached(near, store)
    first, *others = store.held
    assert cached.get(first) == store.held[first]
    assert dict(cached.get_many(others)) == {digest: store.held[digest] for digest in others}
    assert near.held == store.held


@pytest.mark.parametrize("at", [1, 40, -1])
def test_a_layout_that_is_damaged_near_comes_from_afar(store: Store, at: int) -> None:
    near = Store()
    digest = hashlib.sha256(b"large").digest()
    right = encoding.encode_layout(digest, [(100, hashlib.sha256(b"a").digest()), (50, hashlib.sha256(b"b").digest())])
    damaged = bytearray(right)
    damaged[at] ^= 1
    store.held, near.held = {digest: right}, {digest: bytes(damaged)}
    assert Remote(Cached(near, store)).layout(digest) == encoding.decode_layout(digest, right)
    assert near.held == store.held


def test_a_far_store_that_lies_does_not_spoil_the_near_one(store: Store) -> None:
    near = Store()
    store.held = {digest: encoding.encode(b"a lie") for digest in blobs(2)}
    list(Cached(near, store).get_many(list(store.held)))
    assert near.held == {}


def test_a_near_store_that_is_away_is_passed_by(store: Store) -> None:
    near = Store()
    store.held = blobs(2)
    cached = Cached(near, store)
    near.errors = [Unavailable("away")]
    assert all(cached.get(digest) == blob for digest, blob in store.held.items())
    cached.put_many([])
    assert len(near.asked) == 1, "it is left alone for a while"


def test_a_near_store_that_is_back_is_asked_again(store: Store) -> None:
    near = Store()
    store.held = blobs(1)
    cached = Cached(near, store, rest_s=0.0)
    near.errors = [Unavailable("away"), Unavailable("away")]
    (digest,) = store.held
    assert cached.get(digest) == store.held[digest]
    assert cached.get(digest) == store.held[digest]
    assert near.held == store.held


def test_only_the_far_store_says_what_is_there(store: Store) -> None:
    near = Store()
    near.held = blobs(2)
    assert Cached(near, store).present(list(near.held)) == set()


# -- a remote over them


def test_large_objects_share_chunks_in_the_store(store: Store, tmp_path: Path) -> None:
    content = os.urandom(2 << 20)
    remote = Remote(store)
    for data in (content, content + b"more"):
        path = tmp_path / "content"
        path.write_bytes(data)
        with path.open("rb") as file:
            remote.put(hashlib.sha256(data).digest(), file.fileno())
    assert sum(map(len, store.held.values())) < len(content) * 1.2


def test_a_layout_that_makes_up_another_object_is_found_out(store: Store) -> None:
    piece = b"piece" * 100
    digest = hashlib.sha256(piece).digest()
    lie = hashlib.sha256(b"what was promised").digest()
    store.held = {digest: encoding.encode(piece), lie: encoding.encode_layout(lie, [(len(piece), digest)] * 3)}
    with pytest.raises(IntegrityError):
        list(Remote(store).fetch(lie))


def test_chunks_that_are_gone_are_not_found(store: Store) -> None:
    whole = hashlib.sha256(b"whole").digest()
    store.held = {whole: encoding.encode_layout(whole, [(100, hashlib.sha256(b"gone").digest())])}
    with pytest.raises(NotFound):
        list(Remote(store).fetch(whole))


def test_a_file_is_put_from_its_beginning_and_keeps_its_offset(store: Store, tmp_path: Path) -> None:
    content = os.urandom(2 << 20)
    path = tmp_path / "content"
    path.write_bytes(content)
    with path.open("rb", buffering=0) as file:
        file.seek(12345)
        Remote(store).put(hashlib.sha256(content).digest(), file.fileno())
        assert file.tell() == 12345
    assert b"".join(Remote(store).fetch(hashlib.sha256(content).digest())) == content


# -- directories


def test_a_blob_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    """What a crash leaves lies in staging, and the store looks for nothing there."""
    remote = Remote(Directory(tmp_path))
    remote.put_many([(hashlib.sha256(b"%d" % number).digest(), b"%d" % number) for number in range(20)])
    assert {path.parts[len(tmp_path.parts)] for path in tmp_path.rglob("*") if path.is_file()} == {"objects"}


def test_what_crashed_writers_left_is_removed_after_a_day(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    for name in ("old", "new"):
        (staging / name).write_bytes(b"half")
    os.utime(staging / "old", (1, 1))
    Remote(Directory(tmp_path)).put_many([(hashlib.sha256(b"x").digest(), b"x")])
    assert [path.name for path in staging.iterdir()] == ["new"]


def test_a_damaged_file_is_never_given(tmp_path: Path) -> None:
    remote = Remote(Directory(tmp_path))
    digest = hashlib.sha256(b"content").digest()
    remote.put_many([(digest, b"content")])
    path = tmp_path / "objects" / digest.hex()[:2] / digest.hex()
    for damage in (b"", b"R", b"Rcontenu", b"Z\x28\xb5\x2f\xfd", b"L123", b"?", path.read_bytes()[:-1]):
        path.write_bytes(damage)
        with pytest.raises(IntegrityError):
            list(remote.fetch(digest))


def test_a_directory_that_cannot_be_used_is_no_missing_object(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(GearError) as raised:
        Directory(tmp_path / "file").get(bytes(32))
    assert not isinstance(raised.value, NotFound)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ESTALE, Unavailable),
        (errno.EIO, Unavailable),
        (errno.ETIMEDOUT, Unavailable),
        (errno.ENOSPC, ResourceExhausted),
        (errno.EDQUOT, ResourceExhausted),
        (errno.EROFS, FailedPrecondition),
    ],
)
def test_the_kernels_errors_are_told_apart(
    number: int, kind: type[GearError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("gearworkers.remote.directory._write", fail)
    with pytest.raises(kind, match=os.strerror(number)):
        Directory(tmp_path).put_many([(bytes(32), b"R")])


def test_no_error_of_obstore_is_left_untold() -> None:
    kinds = [kind for kind in vars(foreign).values() if isinstance(kind, type) and issubclass(kind, foreign.BaseError)]
    assert len(kinds) > 8
    for kind in kinds:
        with pytest.raises(GearError), bucket.translated("get"):
            raise kind("said")


# -- settings


@contextmanager
def _recording(keys: list[str]) -> Iterator[str]:
    """An S3 that has nothing, and notes whose signature each request has."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            keys.append(self.headers["Authorization"].partition("Credential=")[2].partition("/")[0])
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_nodes_nfs_directory_is_a_level_before_the_remote(tmp_path: Path) -> None:
    settings = replace(Settings(), gear_root=tmp_path / "gear", remote=RemoteSettings(url=str(tmp_path / "remote")))
    (settings.gear_nfs_path / "objects").mkdir(parents=True)
    (tmp_path / "remote").mkdir()
    assert has_near(settings)
    remote = open_remote(settings)
    digest = hashlib.sha256(b"shared").digest()
    remote.put_many([(digest, b"shared")])
    (tmp_path / "remote" / "objects" / digest.hex()[:2] / digest.hex()).unlink()
    assert b"".join(remote.fetch(digest)) == b"shared"
    remote.close()


def test_an_empty_nfs_directory_is_none(tmp_path: Path) -> None:
    settings = replace(Settings(), gear_root=tmp_path)
    settings.gear_nfs_path.mkdir()
    assert not has_near(settings)


@pytest.mark.parametrize("url", ["relative/path", "ftp://host", "s3://", "s3://bucket?colour=red"])
def test_a_remote_that_is_nothing_known_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        open_remote(replace(Settings(), gear_root=tmp_path, remote=RemoteSettings(url=url)))


def test_no_remote_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="GEAR_REMOTE"):
        open_remote(replace(Settings(), gear_root=tmp_path))


def test_s3_credentials_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    credentials = SharedCredentials(path, "gear")
    assert not credentials.is_there()
    for key in ("one", "two"):
        path.write_text(f"[gear]\naws_access_key_id = {key}\naws_secret_access_key = s%cret\naws_session_token = t\n")
        given = credentials()
        assert (given["access_key_id"], given["secret_access_key"], given["token"]) == (key, "s%cret", "t")
    path.write_text("[gear]\naws_access_key_id = x\n")
    with pytest.raises(FailedPrecondition):
        credentials()


def test_s3_requests_are_signed_with_replaced_credentials(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    template = "[default]\naws_access_key_id = {}\naws_secret_access_key = x\n"
    path.write_text(template.format("AKIAFIRST"))
    keys: list[str] = []
    with _recording(keys) as endpoint:
        store = in_s3(f"s3://b?endpoint={endpoint}", RemoteSettings(aws_credentials_file=path))

        def signs_with(key: str) -> bool:
            store.present([bytes(32)])
            return keys[-1] == key

        assert signs_with("AKIAFIRST")
        path.write_text(template.format("AKIASECOND"))
        wait_until(lambda: signs_with("AKIASECOND"), "the second key is used")


@pytest.mark.parametrize(
    ("said", "environ", "signed"),
    [("", "", "us-east-1"), ("", "eu-west-1", "eu-west-1"), ("eu-x", "eu-west-1", "eu-x")],
)
def test_the_region_is_the_urls_or_the_environments(
    said: str, environ: str, signed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = x\naws_secret_access_key = x\n")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_REGION", environ) if environ else monkeypatch.delenv("AWS_REGION", raising=False)
    with answering(lambda asked: Answer(404)) as server:
        url = f"s3://b?endpoint={server.url}" + (f"&region={said}" if said else "")
        in_s3(url, RemoteSettings(aws_credentials_file=tmp_path / "credentials")).present([bytes(32)])
        assert f"/{signed}/s3/aws4_request" in server.asked[0].headers["Authorization"]


def test_an_s3_server_that_is_away_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = x\naws_secret_access_key = x\n")
    settings = replace(Settings(), remote=RemoteSettings(aws_credentials_file=tmp_path / "credentials"))
    with pytest.raises(Unavailable):
        in_s3("s3://b?endpoint=http://127.0.0.1:1", settings.remote).get(bytes(32))


def test_a_bucket_that_is_not_there_is_told_to_who_writes_and_by_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = x\naws_secret_access_key = x\n")
    settings = replace(
        Settings(), gear_root=tmp_path, remote=RemoteSettings(aws_credentials_file=tmp_path / "credentials")
    )
    with s3_server(tmp_path) as server:
        url = f"s3://nobucket?endpoint={server.url}"
        with pytest.raises(NotFound, match="s3://nobucket: there is no such bucket"):
            in_s3(url, settings.remote).put_many([(bytes(32), b"R")])
        found = remote_check(replace(settings, remote=replace(settings.remote, url=url)))
        assert not found.ok and "404 Not Found" in found.found


def test_memory_forgets_nothing() -> None:
    remote = Remote(in_memory())
    digest = hashlib.sha256(b"x").digest()
    assert remote.put_many([(digest, b"x"), (digest, b"x")]) == 1
    assert remote.has([digest]) == [digest]
