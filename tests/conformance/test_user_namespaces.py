"""Snapshots for containers in user namespaces: the labels of containerd make mounts that map ids."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode

from gearworkers.containerd.api.snapshots_pb2 import Info
from gearworkers.digest import METACOPY_XATTR
from gearworkers.layers.idmap import IdMaps, parse_ranges
from gearworkers.mounts.overlay import is_mounted, unmount
from plugin_gateway.containerd.user_namespaces import GID_LABEL, UID_LABEL
from tests.conformance.layers import NET_RAW, directory, file, tar, with_xattrs
from tests.conformance.snapshots import active, committed, containerd_of, gateway, new_key, shown
from tests.support.containerd import SnapshotClient, connected, mounted, refused
from tests.support.fake_containerd import FakeContainerd
from tests.support.stack import Stack
from tests.support.userns import FIRST_ID, RANGES, run_as_root

LABELS = {UID_LABEL: RANGES, GID_LABEL: RANGES}
OVERFLOW_ID = 65534
TAR = "application/vnd.oci.image.layer.v1.tar"
FILES = tar(
    file("file", b"content" * 1000),
    directory("of-user", 0o700, 1000, 1001),
    file("of-user/secret", b"secret", 0o600, 1000, 1001),
    file("setuid", b"#!/bin/sh\n", 0o4755, 33, 34),
    file("outside", b"outside", 0o640, 70_000, 70_001),
    with_xattrs(file("capable", b"binary", 0o755), security__capability=NET_RAW),
)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with gateway("userns") as stack:
        yield stack


@pytest.fixture(scope="module")
def running_containerd(stack: Stack) -> Iterator[FakeContainerd]:
    with containerd_of(stack) as fake:
        yield fake


@pytest.fixture
def containerd(running_containerd: FakeContainerd) -> Iterator[FakeContainerd]:
    expected = running_containerd.capabilities
    yield running_containerd
    running_containerd.capabilities = expected


@pytest.fixture
def client(stack: Stack, containerd: FakeContainerd) -> Iterator[SnapshotClient]:
    with connected(stack.containerd_socket) as client:
        yield client


@pytest.fixture
def image(client: SnapshotClient, containerd: FakeContainerd) -> str:
    """An image layer with files of several owners, and above it a layer that was written through a mount."""
    key, name = new_key("extract-1 sha256:0"), new_key("committed")
    client.apply(containerd.store(FILES, TAR), client.prepare(key))
    client.commit(key, name)
    return committed(client, name, lambda top: (top / "written").write_text("w"))


def owners(top: Path) -> dict[str, tuple[int, int]]:
    paths = [top, *sorted(top.iterdir())]
    return {path.name if path != top else ".": (path.lstat().st_uid, path.lstat().st_gid) for path in paths}


def mapped(id: int) -> int:
    return FIRST_ID + id


EXPECTED = {
    "file": (mapped(0), mapped(0)),
    "of-user": (mapped(1000), mapped(1001)),
    "setuid": (mapped(33), mapped(34)),
    "outside": (OVERFLOW_ID, OVERFLOW_ID),
    "capable": (mapped(0), mapped(0)),
    "written": (mapped(0), mapped(0)),
    ".": (mapped(0), mapped(0)),
}


def upper_of(source: str) -> Path:
    return Path(source).parent / "upper"


# -- owners


@pytest.mark.parametrize("call", ["prepare", "view"])
def test_a_mount_shows_the_parents_files_with_mapped_owners(client: SnapshotClient, image: str, call: str) -> None:
    key = new_key("mapped")
    with mounted(getattr(client, call)(key, image, LABELS)) as top:
        assert owners(top) == EXPECTED
        assert (top / "setuid").stat().st_mode & 0o7777 == 0o4755
    client.remove(key)
    assert shown(client, image)[b"setuid"].uid == 33, "the parents are unchanged"


def test_root_in_the_container_may_do_what_root_may(client: SnapshotClient, image: str) -> None:
    (mount,) = mounts = client.prepare(new_key("mapped"), image, LABELS)
    with mounted(mounts) as top:
        script = (
            "echo new > new; chmod 600 file; chown 5:6 setuid; cat of-user/secret; stat -c ' %u:%g' new file written"
        )
        assert run_as_root(script, top).split() == ["secret", "0:0", "0:0", "0:0"]
        assert owners(top)["new"] == (mapped(0), mapped(0))
        assert owners(top)["setuid"] == (mapped(5), mapped(6))
        assert (top / "file").read_bytes() == b"content" * 1000
    copied = upper_of(mount.source) / "file"
    assert copied.stat().st_uid == mapped(0)
    assert METACOPY_XATTR in os.listxattr(copied), "the content stays in the object"


def test_a_files_capability_belongs_to_the_containers_root(client: SnapshotClient, image: str) -> None:
    with mounted(client.prepare(new_key("mapped"), image, LABELS)) as top:
        value = os.getxattr(top / "capable", "security.capability")
        assert int.from_bytes(value[-4:], "little") == mapped(0), value
        run_as_root("chmod 700 capable", top)
        assert os.getxattr(top / "capable", "security.capability") == value


def test_a_file_outside_all_ranges_cannot_be_changed(client: SnapshotClient, image: str) -> None:
    with mounted(client.prepare(new_key("mapped"), image, LABELS)) as top:
        assert run_as_root("cat outside 2>&1 || true", top).endswith("Permission denied")
        with pytest.raises(OSError) as caught:
            (top / "outside").chmod(0o600)
        assert caught.value.errno == errno.EOVERFLOW


def test_users_and_groups_have_several_ranges_of_their_own(client: SnapshotClient, image: str) -> None:
    uids, gids = "0:200000:1000,1000:300000:1,70000:400000:10", "0:500000:2000,70001:600000:1"
    with mounted(client.prepare(new_key("mapped"), image, {UID_LABEL: uids, GID_LABEL: gids})) as top:
        found = owners(top)
        assert found["of-user"] == (300_000, 501_001)
        assert found["outside"] == (400_000, 600_000)
        maps = IdMaps(parse_ranges(uids), parse_ranges(gids))
        assert run_as_root("cat outside; stat -c ' %u:%g' outside", top, maps) == "outside 70000:70001"


def test_ids_of_a_kind_without_a_label_are_unchanged(client: SnapshotClient, image: str) -> None:
    with mounted(client.prepare(new_key("mapped"), image, {UID_LABEL: RANGES})) as top:
        assert owners(top)["of-user"] == (mapped(1000), 1001)


def test_a_snapshot_without_a_parent_belongs_to_the_containers_root(client: SnapshotClient) -> None:
    with mounted(client.prepare(new_key("mapped"), labels=LABELS)) as top:
        assert run_as_root("touch file; stat -c %u . file", top).split() == ["0", "0"]
        assert owners(top) == {".": (mapped(0), mapped(0)), "file": (mapped(0), mapped(0))}


# -- refused


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ("0", "CONTAINER:HOST:SIZE"),
        ("0:1", "CONTAINER:HOST:SIZE"),
        ("0:100000:65536,", "CONTAINER:HOST:SIZE"),
        ("0:-5:1", "CONTAINER:HOST:SIZE"),
        ("0:100000:0", "at least 1"),
        ("0:4294967290:10", "below 4294967295"),
        ("0:100000:10,5:200000:10", "overlap"),
        ("0:100000:10,10:100009:10", "overlap"),
        ("1:100000:65536", "container's id 0"),
        (",".join(f"{number}:{number}:1" for number in range(341)), "341 id ranges"),
    ],
)
@pytest.mark.parametrize("call", ["prepare", "view"])
def test_malformed_labels_are_refused(client: SnapshotClient, call: str, ranges: str, words: str) -> None:
    key, base = new_key("refused"), committed(client)
    with refused(StatusCode.INVALID_ARGUMENT, words):
        getattr(client, call)(key, base, {UID_LABEL: RANGES, GID_LABEL: ranges})
    with refused(StatusCode.NOT_FOUND):
        client.stat(key)


@pytest.mark.parametrize("capabilities", [[], None], ids=["no capability", "no plugin"])
@pytest.mark.parametrize("call", ["prepare", "view"])
def test_ids_are_not_mapped_twice_if_containerd_has_changed_the_owners_itself(
    client: SnapshotClient, containerd: FakeContainerd, stack: Stack, capabilities: list[str] | None, call: str
) -> None:
    def change_owners(top: Path) -> None:
        (top / "file").touch()
        for path in (top, top / "file"):
            os.chown(path, mapped(0), mapped(0))

    containerd.capabilities = capabilities
    base, key = committed(client, "", change_owners), new_key("remapped")
    (mount,) = getattr(client, call)(key, base, LABELS)
    containerd.capabilities = ["remap-ids"]
    client.update(Info(name=key, labels=LABELS | {"other": "1"}))
    unmount(Path(mount.source))
    with mounted(client.mounts(key)) as top:
        assert owners(top) == {".": (mapped(0), mapped(0)), "file": (mapped(0), mapped(0))}


def test_labels_need_a_containerd_that_answers(
    client: SnapshotClient, containerd: FakeContainerd, stack: Stack
) -> None:
    base, key = committed(client), new_key("mapped")
    containerd.stop()
    try:
        with refused(StatusCode.UNAVAILABLE, "containerd"):
            client.prepare(key, base, LABELS)
        client.prepare(key, base)
    finally:
        containerd.start()


# -- the life of a mapped snapshot


@pytest.mark.parametrize("call", ["prepare", "view"])
def test_ids_are_mapped_again_after_a_restart_and_a_reboot(
    client: SnapshotClient, stack: Stack, image: str, call: str
) -> None:
    key = new_key("mapped")
    (mount,) = getattr(client, call)(key, image, LABELS)
    if call == "prepare":
        run_as_root("chmod 600 file", Path(mount.source))
    stack.stop("gateway")
    unmount(Path(mount.source))
    stack.start("gateway")
    with mounted(client.mounts(key)) as top:
        assert owners(top) == EXPECTED


def test_a_commit_keeps_the_containers_ids(client: SnapshotClient, image: str) -> None:
    key, name = new_key("mapped"), new_key("committed")
    with mounted(client.prepare(key, image, LABELS)) as top:
        run_as_root("echo new > new; chown 7:8 new; chmod 600 file; chmod 700 capable", top)
    client.commit(key, name)
    plain = shown(client, name)
    assert [(plain[path].uid, plain[path].gid) for path in (b"new", b"file", b"setuid")] == [(7, 8), (0, 0), (33, 34)]
    assert dict(plain[b"capable"].xattrs)["security.capability"] == NET_RAW
    for first in (FIRST_ID, 300_000):
        labels = dict.fromkeys((UID_LABEL, GID_LABEL), f"0:{first}:65536")
        with mounted(client.prepare(new_key("child"), name, labels)) as top:
            found = owners(top)
            assert (found["new"], found["."]) == ((first + 7, first + 8), (first, first))
    with mounted(client.mounts(active(client, name))) as top:
        assert owners(top)["."] == (0, 0)


def test_usage_and_removal_are_as_without_labels(client: SnapshotClient, stack: Stack, image: str) -> None:
    keys = new_key("mapped"), new_key("view")
    mounts = [*client.prepare(keys[0], image, LABELS), *client.view(keys[1], image, LABELS)]
    run_as_root("dd if=/dev/zero of=zeros bs=4096 count=5 2> /dev/null", Path(mounts[0].source))
    assert client.usage(keys[0]).size >= 5 * 4096
    for key, mount in zip(keys, mounts, strict=True):
        client.remove(key)
        assert not is_mounted(Path(mount.source)) and not Path(mount.source).exists()
    client.remove(image)


def test_mapped_mounts_leave_no_process_and_no_descriptor(client: SnapshotClient, stack: Stack, image: str) -> None:
    def left() -> tuple[list[str], int]:
        pid = stack.daemons["gateway"].pid
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [child for task in tasks for child in (task / "children").read_text().split()]
        names = [Path(f"/proc/{child}/comm").read_text().strip() for child in children]
        return [name for name in names if name in ("cat", "unshare")], len(os.listdir(f"/proc/{pid}/fd"))

    client.view(new_key("warm"), image, LABELS)
    before = left()
    for _ in range(20):
        key = new_key("mapped")
        client.prepare(key, image, LABELS)
        client.remove(key)
        with refused(StatusCode.INVALID_ARGUMENT):
            client.prepare(new_key("mapped"), image, {UID_LABEL: "0:0"})
    assert before[0] == [] == left()[0]
    assert left()[1] <= before[1] + 5
