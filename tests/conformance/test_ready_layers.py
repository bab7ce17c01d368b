"""Layers whose contents are on the host are committed at Prepare, so that containerd does not download them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from grpc import StatusCode

from gearworkers.containerd.api.snapshots_pb2 import Info, Kind
from gearworkers.images.manifest import chain_id
from plugin_gateway.containerd.snapshot_table import REF
from tests.conformance.layers import directory, file, tar
from tests.conformance.snapshots import containerd_of, gateway, new_key, shown
from tests.support.containerd import SnapshotClient, connected, refused
from tests.support.fake_containerd import FakeContainerd
from tests.support.stack import Stack

TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER = "containerd.io/snapshot/cri.layer-digest"
BASE = tar(directory("d"), file("d/base", b"base " * 1000))
TOP = tar(file("d/top", b"top " * 1000), file("small", b"small"))
PRIVATE = tar(file(".gear-private", b""), file("secret", b"secret " * 1000))


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with gateway("ready") as stack:
        yield stack


@pytest.fixture
def containerd(stack: Stack) -> Iterator[FakeContainerd]:
    with containerd_of(stack) as fake:
        yield fake


@pytest.fixture
def client(stack: Stack, containerd: FakeContainerd) -> Iterator[SnapshotClient]:
    with connected(stack.containerd_socket) as client:
        yield client
        while snapshots := list(client.list()):
            parents = {info.parent for info in snapshots}
            for info in snapshots:
                if info.name not in parents:
                    client.remove(info.name)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def labels_of(tars: list[bytes]) -> dict[str, str]:
    """The labels of the topmost of some layers, whose blobs are their tars."""
    return {REF: chain_id([digest(one) for one in tars]), LAYER: digest(tars[-1])}


def pull(
    client: SnapshotClient, containerd: FakeContainerd, *tars: bytes, namespace: str = "one", labelled: bool = True
) -> str:
    """Unpack an image as containerd does, and discard the blobs; return the name of the topmost snapshot."""
    parent = ""
    for number in range(1, len(tars) + 1):
        key, labels = unpack_key(namespace), labels_of([*tars[:number]])
        mounts = client.prepare(key, parent)  # without labels, so that it is downloaded
        client.apply(containerd.store(tars[number - 1], TAR), mounts)
        parent = f"{key.rpartition('/')[0]}/{labels[REF]}"
        client.commit(key, parent, labels if labelled else None)
        containerd.blob_path(tars[number - 1]).unlink()
    return parent


def unpack_key(namespace: str = "one") -> str:
    """Return a key as containerd's unpacker chooses it."""
    return new_key("extract-123-abcd sha256:0").replace("tests", namespace, 1)


def is_ready(client: SnapshotClient, parent: str, labels: dict[str, str], namespace: str = "one") -> bool:
    """Call Prepare as containerd does; return whether the layer need not be downloaded."""
    key = unpack_key(namespace)
    try:
        with refused(StatusCode.ALREADY_EXISTS):
            client.prepare(key, parent, labels)
    except pytest.fail.Exception:
        client.remove(key)
        return False
    return True


def found(client: SnapshotClient, parent: str, labels: dict[str, str]) -> Info:
    """Look the committed snapshot up as containerd does after ALREADY_EXISTS."""
    infos = list(client.list(f'labels."{REF}"=={labels[REF]},parent=="{parent}"'))
    return next(info for info in infos if info.kind == Kind.COMMITTED)


def test_a_layer_is_copied_to_another_chain(client: SnapshotClient, containerd: FakeContainerd) -> None:
    other = tar(file("other", b"other"))
    pull(client, containerd, BASE, TOP)
    base = pull(client, containerd, other)
    labels = labels_of([other, TOP])
    assert is_ready(client, base, labels)
    info = found(client, base, labels)
    assert info.parent == base and info.labels[LAYER] == digest(TOP)
    assert set(shown(client, info.name)) >= {b"other", b"d/top", b"small"}


def test_the_snapshot_of_another_namespace_is_shared(client: SnapshotClient, containerd: FakeContainerd) -> None:
    top = pull(client, containerd, BASE, TOP)
    base = client.stat(top).parent
    count = len(list(client.list()))
    assert is_ready(client, "", labels_of([BASE]), "two") and is_ready(client, base, labels_of([BASE, TOP]), "two")
    assert found(client, "", labels_of([BASE])).name == base
    assert found(client, base, labels_of([BASE, TOP])).name == top
    assert len(list(client.list())) == count


def test_a_layer_whose_blob_is_here_is_unpacked_as_usual(client: SnapshotClient, containerd: FakeContainerd) -> None:
    pull(client, containerd, BASE)
    containerd.store(BASE, TAR)
    assert not is_ready(client, "", labels_of([BASE]), "two")
    containerd.blob_path(BASE).unlink()
    assert is_ready(client, "", labels_of([BASE]), "two")


def test_a_snapshot_without_labels_is_copied(client: SnapshotClient, containerd: FakeContainerd) -> None:
    pull(client, containerd, BASE, labelled=False)
    count = len(list(client.list()))
    assert is_ready(client, "", labels_of([BASE]), "two")
    assert found(client, "", labels_of([BASE])).name.startswith("two/")
    assert len(list(client.list())) == count + 1


def test_a_chain_id_that_does_not_result_from_the_layers_is_not_committed(
    client: SnapshotClient, containerd: FakeContainerd
) -> None:
    base = pull(client, containerd, BASE)
    pull(client, containerd, TOP)
    for labels in (labels_of([BASE, BASE]), labels_of([TOP]), labels_of([BASE, TOP, TOP])):
        assert not is_ready(client, base, labels | {LAYER: digest(TOP)})
    assert not is_ready(client, "", labels_of([TOP]) | {LAYER: digest(BASE)} | {REF: digest(b"another")})
    assert is_ready(client, base, labels_of([BASE, TOP]))


@pytest.mark.parametrize("missing", [REF, LAYER])
def test_without_a_label_the_layer_is_downloaded(
    client: SnapshotClient, containerd: FakeContainerd, missing: str
) -> None:
    pull(client, containerd, BASE)
    labels = labels_of([BASE])
    del labels[missing]
    assert not is_ready(client, "", labels)


def test_private_layers_are_not_copied(client: SnapshotClient, containerd: FakeContainerd) -> None:
    pull(client, containerd, TOP)
    pull(client, containerd, BASE, PRIVATE)
    private = pull(client, containerd, PRIVATE)
    assert not is_ready(client, private, labels_of([PRIVATE, TOP]))
    base = pull(client, containerd, TOP, BASE)
    assert not is_ready(client, base, labels_of([TOP, BASE, PRIVATE]))


def test_an_unknown_layer_is_downloaded(client: SnapshotClient, containerd: FakeContainerd) -> None:
    labels = labels_of([BASE])
    containers = unpack_key()
    client.prepare(containers, "", labels)
    assert not is_ready(client, "", labels), "the layer is not applied yet"
    client.remove(containers)


def test_a_snapshot_that_is_not_to_be_unpacked_is_not_committed(
    client: SnapshotClient, containerd: FakeContainerd
) -> None:
    pull(client, containerd, BASE)
    key = new_key("container")
    assert client.prepare(key, "", labels_of([BASE]))
    assert client.stat(key).kind == Kind.ACTIVE
