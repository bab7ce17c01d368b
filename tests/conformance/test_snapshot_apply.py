"""Apply: blobs of containerd's content store become layers, in the gateway's own pool and without Redis."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard
from grpc import StatusCode

from gearworkers.containerd.api.types_pb2 import Descriptor, Mount
from tests.conformance.layers import directory, file, opaque, symlink, tar, whiteout
from tests.conformance.snapshots import committed, containerd_of, gateway, new_key, shown, tree
from tests.support.containerd import Refused, SnapshotClient, connected, mounted, refused
from tests.support.fake_containerd import FakeContainerd, descriptor
from tests.support.stack import Stack

TAR = "application/vnd.oci.image.layer.v1.tar"
GZIP = f"{TAR}+gzip"
ZSTD = f"{TAR}+zstd"
_numbers = itertools.count(1)


def new_tar() -> bytes:
    """Return a tar that no other test applies."""
    return tar(
        directory("d", 0o750, 5, 6),
        file("d/file", b"content", 0o4755, 5, 6),
        file("large", b"large %d " % next(_numbers) * 400_000),
        symlink("link", "d/file"),
    )


FILES = new_tar()
NAMES = {b"d", b"d/file", b"large", b"link"}


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Yield a stack whose gateway runs."""
    with gateway("apply") as stack:
        yield stack


@pytest.fixture(scope="module")
def containerd(stack: Stack) -> Iterator[FakeContainerd]:
    with containerd_of(stack) as fake:
        yield fake


@pytest.fixture
def client(stack: Stack, containerd: FakeContainerd) -> Iterator[SnapshotClient]:
    with connected(stack.containerd_socket) as client:
        yield client


def unpack_key() -> str:
    """Return a key as containerd's unpacker chooses it."""
    return new_key("extract-123-abcd sha256:0")


def prepared(client: SnapshotClient, parent: str = "") -> tuple[str, list[Mount]]:
    """Prepare a snapshot for Apply; return its key and mounts."""
    key = unpack_key()
    return key, client.prepare(key, parent)


def applied(
    client: SnapshotClient, containerd: FakeContainerd, data: bytes, parent: str = "", *, at_commit: str = ""
) -> str:
    """Apply a plain tar to a new snapshot, commit it and return its name."""
    (key, mounts), name = prepared(client, parent), new_key("committed")
    client.apply(containerd.store(data, TAR), mounts)
    client.commit(key, name, parent=at_commit)
    return name


def diff_id(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_filled(client: SnapshotClient, blob: Descriptor, key: str, data: bytes) -> None:
    """Apply a blob with the tar *data* of `new_tar` to the snapshot *key* and check the result."""
    result = client.apply(blob, client.mounts(key))
    assert (result.media_type, result.digest, result.size) == (TAR, diff_id(data), len(data))
    name = new_key("committed")
    client.commit(key, name)
    assert set(shown(client, name)) == NAMES


# -- blobs


@pytest.mark.parametrize(
    ("media_type", "pack"),
    [
        (TAR, bytes),
        (GZIP, gzip.compress),
        (ZSTD, zstandard.compress),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip.compress),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", gzip.compress),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", gzip.compress),
    ],
    ids=["tar", "gzip", "zstd", "docker", "docker-foreign", "nondistributable"],
)
def test_a_blob_becomes_a_layer(
    client: SnapshotClient, containerd: FakeContainerd, media_type: str, pack: Callable[[bytes], bytes]
) -> None:
    key, _ = prepared(client)
    data = new_tar()
    check_filled(client, containerd.store(pack(data), media_type), key, data)


def test_contents_owners_and_modes_are_those_of_the_tar(client: SnapshotClient, containerd: FakeContainerd) -> None:
    nodes = shown(client, applied(client, containerd, new_tar()))
    assert nodes[b"d/file"].content == hashlib.sha256(b"content").digest()
    assert (nodes[b"d/file"].mode & 0o7777, nodes[b"d/file"].uid, nodes[b"d/file"].gid) == (0o4755, 5, 6)
    assert (nodes[b"d"].mode & 0o7777, nodes[b"link"].content) == (0o750, b"d/file")


def test_the_diff_id_covers_all_bytes_of_the_tar(client: SnapshotClient, containerd: FakeContainerd) -> None:
    padded = new_tar() + bytes(1 << 20)
    middle = len(padded) // 2
    members = gzip.compress(padded[:middle]) + gzip.compress(padded[middle:])
    check_filled(client, containerd.store(members, GZIP), prepared(client)[0], padded)


def test_an_empty_tar_becomes_an_empty_layer(client: SnapshotClient, containerd: FakeContainerd) -> None:
    base = applied(client, containerd, FILES)
    assert set(shown(client, applied(client, containerd, tar(), base))) == NAMES


def test_the_usage_of_an_applied_layer_is_not_that_of_its_parent(
    client: SnapshotClient, containerd: FakeContainerd
) -> None:
    base = applied(client, containerd, new_tar())
    top = applied(client, containerd, tar(file("top", bytes(100))), base)
    assert client.usage(base).size >= 2_800_000
    assert client.usage(base).inodes > 0
    assert 0 < client.usage(top).size < 10_000


# -- parents


@pytest.mark.parametrize("named", ["at prepare", "at commit"])
def test_whiteouts_hide_files_of_the_parent(client: SnapshotClient, containerd: FakeContainerd, named: str) -> None:
    base = applied(client, containerd, tar(file("a"), directory("d"), file("d/b"), file("kept")))
    changes = tar(whiteout("a"), directory("d"), opaque("d"), file("d/c"))
    if named == "at prepare":
        top = applied(client, containerd, changes, base)
    else:
        top = applied(client, containerd, changes, at_commit=base)
    assert set(shown(client, top)) == {b"d", b"d/c", b"kept"}
    with mounted(client.prepare(new_key("active"), top)) as merged:
        assert set(tree(merged)) == {b"d", b"d/c", b"kept"}


def test_layers_are_applied_in_parallel_and_stacked_at_commit(
    client: SnapshotClient, containerd: FakeContainerd
) -> None:
    """containerd unpacks the layers of an image in any order and names the parents at commit."""
    layers = [tar(file(f"file-{number}"), file("top", b"%d" % number)) for number in range(6)]
    snapshots = [prepared(client) for _ in layers]
    blobs = [containerd.store(gzip.compress(layer), GZIP) for layer in layers]
    with ThreadPoolExecutor(len(layers)) as pool:
        results = list(pool.map(client.apply, blobs, [mounts for _, mounts in snapshots]))
    assert [result.digest for result in results] == [diff_id(layer) for layer in layers]
    name = ""
    for key, _ in snapshots:
        parent, name = name, new_key("committed")
        client.commit(key, name, parent=parent)
        assert client.stat(name).parent == parent
    nodes = shown(client, name)
    assert set(nodes) == {b"top", *(b"file-%d" % number for number in range(6))}
    assert nodes[b"top"].content == hashlib.sha256(b"5").digest()


def test_a_layer_is_applied_to_a_mounted_snapshot(client: SnapshotClient, containerd: FakeContainerd) -> None:
    base = applied(client, containerd, tar(file("base")))
    key = new_key("active")
    mounts = client.prepare(key, base)
    assert mounts[0].type == "bind"
    client.apply(containerd.store(FILES, TAR), mounts)
    with mounted(client.mounts(key)) as top:
        assert set(tree(top)) == NAMES | {b"base"}


# -- refused calls


def test_a_missing_blob_is_not_found(client: SnapshotClient, containerd: FakeContainerd) -> None:
    data = tar(file("unique", b"of the test of missing blobs"))
    key, mounts = prepared(client)
    with refused(StatusCode.NOT_FOUND, containerd.blob_path(data).name):
        client.apply(descriptor(data, TAR), mounts)
    client.apply(containerd.store(data, TAR), mounts)
    client.commit(key, new_key("committed"))


@pytest.mark.parametrize(
    ("data", "media_type", "code"),
    [
        (half(gzip.compress(FILES)), GZIP, StatusCode.DATA_LOSS),
        (gzip.compress(FILES)[:-4], GZIP, StatusCode.DATA_LOSS),
        (gzip.compress(FILES)[:-8] + bytes(8), GZIP, StatusCode.DATA_LOSS),
        (half(zstandard.compress(FILES)), ZSTD, StatusCode.DATA_LOSS),
        (half(FILES), TAR, StatusCode.DATA_LOSS),
        (b"not a tar" * 1000, TAR, StatusCode.INVALID_ARGUMENT),
        (gzip.compress(b"not a tar" * 1000), GZIP, StatusCode.INVALID_ARGUMENT),
        (tar(whiteout("d/..")), TAR, StatusCode.INVALID_ARGUMENT),
    ],
    ids=["gzip-half", "gzip-end", "gzip-damaged", "zstd-half", "tar-half", "tar", "tar-in-gzip", "whiteout"],
)
def test_a_damaged_blob_is_refused_and_a_repetition_succeeds(
    client: SnapshotClient, containerd: FakeContainerd, data: bytes, media_type: str, code: StatusCode
) -> None:
    key, mounts = prepared(client)
    with refused(code):
        client.apply(containerd.store(data, media_type), mounts)
    with refused(StatusCode.FAILED_PRECONDITION, "not finished"):
        client.commit(key, new_key("committed"))
    assert client.mounts(key) == mounts
    whole = new_tar()
    check_filled(client, containerd.store(gzip.compress(whole), GZIP), key, whole)


@pytest.mark.parametrize(
    "media_type", ["", "text/plain", f"{TAR}+gzip+encrypted", f"{TAR}+xz", "application/vnd.oci.image.config.v1+json"]
)
def test_an_unknown_media_type_is_left_to_another_differ(
    client: SnapshotClient, containerd: FakeContainerd, media_type: str
) -> None:
    (key, mounts), data = prepared(client), new_tar()
    with refused(StatusCode.UNIMPLEMENTED, "media type"):
        client.apply(containerd.store(data, media_type), mounts)
    check_filled(client, containerd.store(data, TAR), key, data)


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "md5:" + "0" * 64, "sha256:../../../etc/passwd", "sha256:" + "A" * 64]
)
def test_a_malformed_digest_is_refused(client: SnapshotClient, digest: str) -> None:
    _, mounts = prepared(client)
    with refused(StatusCode.INVALID_ARGUMENT, "digest"):
        client.apply(Descriptor(media_type=TAR, digest=digest), mounts)


def test_foreign_mounts_are_left_to_another_differ(
    client: SnapshotClient, containerd: FakeContainerd, stack: Stack
) -> None:
    blob = containerd.store(FILES, TAR)
    _, mounts = prepared(client)
    options = ["rbind", "rw"]
    images, views = stack.root / "images", stack.root / "views"
    for foreign in (
        [],
        [*mounts, *mounts],
        [Mount(type="overlay", source=mounts[0].source, options=options)],
        [Mount(type="bind", source=str(stack.directory), options=options)],
        [Mount(type="bind", source=str(images), options=options)],
        [Mount(type="bind", source=str(images / ("0" * 64)), options=options)],
        [Mount(type="bind", source=str(views / "name"), options=options)],
        [Mount(type="gear-layer", source="/", options=options)],
    ):
        with refused(StatusCode.UNIMPLEMENTED, "mounts"):
            client.apply(blob, foreign)


def test_a_second_apply_is_refused(client: SnapshotClient, containerd: FakeContainerd) -> None:
    key, mounts = prepared(client)
    blob = containerd.store(FILES, TAR)
    client.apply(blob, mounts)
    with refused(StatusCode.ALREADY_EXISTS, "content"):
        client.apply(blob, mounts)
    client.commit(key, new_key("committed"))


def test_an_apply_to_a_removed_snapshot_is_refused(client: SnapshotClient, containerd: FakeContainerd) -> None:
    key, mounts = prepared(client)
    client.remove(key)
    with refused(StatusCode.NOT_FOUND, "does not exist"):
        client.apply(containerd.store(FILES, TAR), mounts)


@pytest.mark.parametrize("through", ["its old mounts", "a view"])
def test_an_apply_to_a_committed_snapshot_is_refused(
    client: SnapshotClient, containerd: FakeContainerd, through: str
) -> None:
    key, name = new_key("active"), new_key("committed")
    mounts = client.prepare(key)
    client.commit(key, name)
    if through == "a view":
        mounts = client.view(new_key("view"), name)
    with refused(StatusCode.FAILED_PRECONDITION, "not active"):
        client.apply(containerd.store(FILES, TAR), mounts)
    assert not shown(client, name)


# -- restarts


def restart(stack: Stack) -> None:
    stack.stop("gateway")
    stack.start("gateway")


def test_an_apply_after_a_restart_of_the_gateway_succeeds(
    client: SnapshotClient, containerd: FakeContainerd, stack: Stack
) -> None:
    base, (key, mounts) = committed(client, "", lambda top: (top / "base").touch()), prepared(client)
    restart(stack)
    assert client.mounts(key) == mounts
    data = new_tar()
    check_filled(client, containerd.store(data, TAR), key, data)
    assert set(shown(client, applied(client, containerd, new_tar(), base))) == NAMES | {b"base"}


def test_an_apply_after_a_crash_during_an_apply_succeeds(
    client: SnapshotClient, containerd: FakeContainerd, stack: Stack
) -> None:
    data = tar(*(file(f"file-{number}", b"%d" % number * 100_000) for number in range(20)))
    path, (key, mounts) = containerd.blob_path(data), prepared(client)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.apply, descriptor(data, TAR), mounts)
        with path.open("wb", buffering=0) as fifo:  # waits until the job reads it
            fifo.write(half(data))
            stack.kill("gateway")
            error = call.exception(60)
    assert isinstance(error, Refused) and error.code is StatusCode.UNAVAILABLE
    path.unlink()
    stack.start("gateway")
    client.apply(containerd.store(data, TAR), client.mounts(key))
    name = new_key("committed")
    client.commit(key, name)
    assert len(shown(client, name)) == 20


def test_an_apply_succeeds_once_containerd_answers(
    client: SnapshotClient, containerd: FakeContainerd, stack: Stack
) -> None:
    containerd.stop()
    restart(stack)
    (key, mounts), data = prepared(client), new_tar()
    blob = containerd.store(data, TAR)
    with refused(StatusCode.UNAVAILABLE, "fake.sock"):
        client.apply(blob, mounts)
    exports, containerd.exports = containerd.exports, {}
    containerd.start()
    with refused(StatusCode.NOT_FOUND, "content directory"):
        client.apply(blob, mounts)
    containerd.exports = exports
    check_filled(client, blob, key, data)
