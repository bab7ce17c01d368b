"""Docker and containerd on one gateway and one GEAR_ROOT: each leaves the layers and mounts of the other alone."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode

from gearworkers.containerd.api.types_pb2 import Mount
from gearworkers.mounts.overlay import is_mounted
from tests.conformance.drivers import OverSocket
from tests.conformance.layers import apply_layer, file
from tests.conformance.snapshots import active, committed, gateway, new_key, shown, tree
from tests.support.containerd import SnapshotClient, connected, mounted, refused
from tests.support.fake_containerd import descriptor
from tests.support.stack import Stack


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with gateway("doors") as stack:
        yield stack


@pytest.fixture
def docker(stack: Stack) -> OverSocket:
    """Return Docker's driver after Init."""
    driver = OverSocket(stack)
    driver.init()
    return driver


@pytest.fixture
def client(stack: Stack) -> Iterator[SnapshotClient]:
    with connected(stack.containerd_socket) as client:
        yield client


def write_file(top: Path) -> None:
    (top / "file").write_text("of containerd")


@pytest.mark.parametrize("call", ["init", "cleanup", "restart"])
def test_a_new_or_ending_dockerd_keeps_the_mounts_of_snapshots(
    docker: OverSocket, client: SnapshotClient, call: str
) -> None:
    base, view = committed(client, "", write_file), new_key("view")
    key = active(client, base)
    sources = [Path(mounts[0].source) for mounts in (client.mounts(key), client.view(view, base))]
    getattr(docker, call)()
    assert all(is_mounted(source) for source in sources)
    with mounted(client.mounts(key)) as top, mounted(client.mounts(view)) as shown_by_view:
        assert (top / "file").read_text() == (shown_by_view / "file").read_text() == "of containerd"
    assert set(shown(client, base)) == {b"file"}


def test_containerd_does_not_find_the_layers_of_docker(docker: OverSocket, client: SnapshotClient) -> None:
    id = apply_layer(docker, file("docker"))
    with refused(StatusCode.NOT_FOUND, id):
        client.prepare(new_key("active"), id)
    assert id not in {info.name for info in client.list()}


def test_containerd_does_not_apply_to_the_layers_of_docker(docker: OverSocket, client: SnapshotClient) -> None:
    id = secrets.token_hex(32)
    docker.create_read_write(id)
    merged = docker.get(id)
    layer = descriptor(b"", "application/vnd.oci.image.layer.v1.tar")
    for source in (merged, merged.parent):
        with refused(StatusCode.UNIMPLEMENTED, "mounts"):
            client.apply(layer, [Mount(type="bind", source=str(source), options=["rbind", "rw"])])
    docker.put(id)
    docker.remove(id)


def test_a_removal_by_docker_keeps_the_files_of_snapshots(docker: OverSocket, client: SnapshotClient) -> None:
    base = committed(client, "", write_file)
    docker.remove(apply_layer(docker, file("file", b"of containerd")))
    with mounted(client.mounts(active(client, base))) as top:
        assert set(tree(top)) == {b"file"}
        assert (top / "file").read_text() == "of containerd"
