"""The table of containerd's snapshots over the gateway's socket: life cycle, names, labels, filters, usage."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from grpc import StatusCode

from gearworkers.containerd.api.snapshots_pb2 import ACTIVE, COMMITTED, VIEW, Info
from gearworkers.mounts.overlay import is_mounted
from tests.conformance.snapshots import active, committed, new_key, shown, tree
from tests.support.containerd import SnapshotClient, mounted, refused


def names(client: SnapshotClient, *filters: str) -> set[str]:
    return {info.name for info in client.list(*filters)}


def six(client: SnapshotClient) -> dict[str, tuple[str, int]]:
    """Make a snapshot of each kind with and without a parent; return parent and kind of each by its name."""
    base = committed(client)
    top = committed(client, base)
    view, empty_view = new_key("view"), new_key("view")
    client.view(view, top)
    client.view(empty_view)
    return {
        base: ("", COMMITTED),
        top: (base, COMMITTED),
        active(client, top): (top, ACTIVE),
        active(client): ("", ACTIVE),
        view: (top, VIEW),
        empty_view: ("", VIEW),
    }


# -- life cycle


def make_foo(top: Path) -> None:
    (top / "foo").write_text("foo")
    (top / "a/b/c").mkdir(parents=True)


def change_foo(top: Path) -> None:
    (top / "bar").write_text("bar")
    (top / "foo").write_text("bar")
    (top / "a/b/c").rmdir()
    (top / "a/b").rmdir()


def test_a_snapshot_is_prepared_changed_committed_viewed_and_removed(client: SnapshotClient) -> None:
    base, top = committed(client, "", make_foo), new_key("top")
    key = active(client, base)
    with mounted(client.mounts(key)) as directory:
        assert set(tree(directory)) == {b"foo", b"a", b"a/b", b"a/b/c"}
        change_foo(directory)
    client.commit(key, top)
    assert set(shown(client, base)) == {b"foo", b"a", b"a/b", b"a/b/c"}
    assert set(shown(client, top)) == {b"foo", b"bar", b"a"}
    with refused(StatusCode.FAILED_PRECONDITION, "remove"):
        client.remove(base)
    client.remove(top)
    client.remove(base)
    assert not {base, top, key} & names(client)


def test_stat_describes_snapshots_of_each_kind(client: SnapshotClient) -> None:
    began_ns = time.time_ns()
    expected = six(client)
    for name, (parent, kind) in expected.items():
        info = client.stat(name)
        assert (info.name, info.parent, info.kind) == (name, parent, kind)
        assert info.created_at == info.updated_at
        assert began_ns <= info.created_at.ToNanoseconds() <= time.time_ns()


def test_a_key_names_nothing_after_the_commit(client: SnapshotClient) -> None:
    key, name = active(client), new_key("committed")
    client.commit(key, name)
    with refused(StatusCode.NOT_FOUND, key):
        client.stat(key)
    client.prepare(key, name)
    assert client.stat(key).parent == name


def test_parents_are_transitive(client: SnapshotClient) -> None:
    base = committed(client)
    middle = committed(client, base)
    top = committed(client, middle)
    assert client.stat(client.stat(top).parent).parent == base
    assert client.stat(base).parent == ""


@pytest.mark.parametrize("taken_by", ["prepare", "view"])
@pytest.mark.parametrize("call", ["prepare", "view"])
def test_a_taken_key_is_refused(client: SnapshotClient, call: str, taken_by: str) -> None:
    base, key = committed(client), new_key("key")
    getattr(client, taken_by)(key, base)
    with refused(StatusCode.ALREADY_EXISTS, key):
        getattr(client, call)(key, base)
    with refused(StatusCode.ALREADY_EXISTS, base):
        getattr(client, call)(base, base)
    assert client.mounts(key)


@pytest.mark.parametrize("call", ["prepare", "view"])
def test_only_committed_snapshots_are_parents(client: SnapshotClient, call: str) -> None:
    view = new_key("view")
    client.view(view, committed(client))
    for parent in (active(client), view):
        with refused(StatusCode.INVALID_ARGUMENT, parent):
            getattr(client, call)(new_key("child"), parent)
    with refused(StatusCode.NOT_FOUND, "does not exist"):
        getattr(client, call)(new_key("child"), new_key("missing"))


# -- commit


def test_a_commit_replaces_the_labels(client: SnapshotClient) -> None:
    key, name = new_key("active"), new_key("committed")
    client.prepare(key, labels={"old": "1", "kept": "1"})
    client.commit(key, name, {"kept": "2"})
    assert client.stat(name).labels == {"kept": "2"}


def test_a_taken_name_is_refused_at_commit(client: SnapshotClient) -> None:
    name, key = committed(client), active(client)
    with refused(StatusCode.ALREADY_EXISTS, name):
        client.commit(key, name)
    assert client.stat(key).kind == ACTIVE
    assert client.mounts(key)


def test_only_active_snapshots_are_committed(client: SnapshotClient) -> None:
    base, view = committed(client), new_key("view")
    client.view(view, base)
    for key in (base, view):
        with refused(StatusCode.FAILED_PRECONDITION, "not active"):
            client.commit(key, new_key("committed"))
    with refused(StatusCode.NOT_FOUND, "does not exist"):
        client.commit(new_key("missing"), new_key("committed"))


def test_a_parent_named_at_commit_becomes_the_parent(client: SnapshotClient) -> None:
    base, name = committed(client, "", make_foo), new_key("committed")
    key = active(client, "", lambda top: (top / "own").touch())
    client.commit(key, name, parent=base)
    assert client.stat(name).parent == base
    assert {b"foo", b"own"} < set(shown(client, name))
    with refused(StatusCode.FAILED_PRECONDITION, "remove"):
        client.remove(base)


def test_a_commit_keeps_the_parent_of_a_snapshot_that_has_one(client: SnapshotClient) -> None:
    base, other = committed(client), committed(client)
    key, name = active(client, base), new_key("committed")
    with refused(StatusCode.INVALID_ARGUMENT, "parent"):
        client.commit(key, name, parent=other)
    client.commit(key, name, parent=base)
    assert client.stat(name).parent == base


def test_a_parent_named_at_commit_is_a_committed_snapshot(client: SnapshotClient) -> None:
    key = active(client)
    with refused(StatusCode.FAILED_PRECONDITION, "not a committed snapshot"):
        client.commit(key, new_key("committed"), parent=active(client))
    with refused(StatusCode.NOT_FOUND, "does not exist"):
        client.commit(key, new_key("committed"), parent=new_key("missing"))
    client.commit(key, new_key("committed"))


# -- labels


def updated(client: SnapshotClient, name: str, labels: dict[str, str], *paths: str) -> dict[str, str]:
    """Update a snapshot with a wrong parent and kind, which must not change; return its labels."""
    before = client.stat(name)
    began_ns = time.time_ns()
    after = client.update(Info(name=name, parent="missing", kind=VIEW, labels=labels), *paths)
    assert (after.name, after.parent, after.kind) == (name, before.parent, before.kind)
    assert after.created_at == before.created_at
    assert began_ns <= after.updated_at.ToNanoseconds() <= time.time_ns()
    assert client.stat(name) == after
    return dict(after.labels)


def test_an_update_changes_labels_and_nothing_else(client: SnapshotClient) -> None:
    for name in six(client):
        assert updated(client, name, {"a": "1", "b": "2", "c.d/e": "3"}) == {"a": "1", "b": "2", "c.d/e": "3"}
        changed = updated(client, name, {"a": "new", "f": "4"}, "labels.a", "labels.c.d/e")
        assert changed == {"a": "new", "b": "2"}
        assert updated(client, name, {"f": "4"}, "labels") == {"f": "4"}
        assert updated(client, name, {}) == {}


def test_an_update_of_an_immutable_field_is_refused(client: SnapshotClient) -> None:
    name = committed(client, labels={"a": "1"})
    for path in ("parent", "kind", "name", "created_at"):
        with refused(StatusCode.INVALID_ARGUMENT, path):
            client.update(Info(name=name, parent="missing", labels={"a": "2"}), "labels.a", path)
    assert client.stat(name).labels == {"a": "1"}
    with refused(StatusCode.NOT_FOUND, "does not exist"):
        client.update(Info(name=new_key("missing")))


# -- removal


def test_a_snapshot_with_children_is_not_removed(client: SnapshotClient) -> None:
    base = committed(client)
    middle = committed(client, base)
    key, view = active(client, middle), new_key("view")
    client.view(view, middle)
    for child in (key, view):
        with refused(StatusCode.FAILED_PRECONDITION, "remove"):
            client.remove(middle)
        client.remove(child)
    client.remove(middle)
    client.remove(base)


def test_a_removed_snapshot_is_not_found(client: SnapshotClient) -> None:
    key = active(client)
    client.remove(key)
    for call in (client.remove, client.stat, client.mounts, client.usage):
        with refused(StatusCode.NOT_FOUND, key):
            call(key)


def test_a_key_is_free_again_after_a_removal(client: SnapshotClient) -> None:
    base, key = committed(client), new_key("key")
    client.prepare(key, base)
    client.remove(key)
    client.view(key, base)
    client.remove(key)
    client.prepare(key)
    client.remove(base)
    client.commit(key, base)
    assert client.stat(base).parent == ""


@pytest.mark.parametrize("call", ["prepare", "view"])
def test_a_mounted_snapshot_can_be_removed(client: SnapshotClient, call: str) -> None:
    base, key = committed(client, "", make_foo), new_key("key")
    mounts = getattr(client, call)(key, base)
    with mounted(mounts) as top, (top / "foo").open() as held:
        client.remove(key)
        assert held.read() == "foo"
        assert not Path(mounts[0].source).exists()
    client.remove(base)


def test_a_committed_snapshot_has_no_mounts(client: SnapshotClient) -> None:
    name = committed(client)
    with refused(StatusCode.FAILED_PRECONDITION, "committed"):
        client.mounts(name)


# -- list


def test_a_list_has_each_kind_parent_name_and_label(client: SnapshotClient) -> None:
    mark = {"mark": new_key("mark")}
    base = committed(client, labels=mark)
    labelled = committed(client, labels=mark | {"size": "1"})
    key, view, other = new_key("active"), new_key("view"), new_key("active")
    client.prepare(key, base, mark)
    client.view(view, labelled, mark | {"size": "2"})
    client.prepare(other, labels=mark | {"size": "2"})
    marked = f'labels.mark=="{mark["mark"]}"'
    assert names(client, marked) == {base, labelled, key, view, other}
    assert names(client, f"kind==active,{marked}") == {key, other}
    assert names(client, f"kind!=active,{marked}") == {base, labelled, view}
    assert names(client, f"kind==view,{marked}") == {view}
    assert names(client, f"kind==committed,{marked}") == {base, labelled}
    assert names(client, f"name=={base}", f'name=="{view}"') == {base, view}
    assert names(client, f"parent=={base}") == {key}
    assert names(client, f'parent!="",{marked}') == {key, view}
    assert names(client, f"labels.size,{marked}") == {labelled, view, other}
    assert names(client, f"labels.size==2,{marked}") == {view, other}
    assert names(client, f"labels.size!=2,{marked}") == {base, labelled, key}
    assert names(client, f"labels.size~=[1-2],{marked}") == {labelled, view, other}
    assert names(client, f"name~=|^{base}$|") == {base}
    assert {base, labelled, key, view, other} <= names(client)
    with refused(StatusCode.INVALID_ARGUMENT, "kind="):
        names(client, "kind=active")


def test_stat_answers_the_same_during_a_list(client: SnapshotClient) -> None:
    expected = six(client)
    found = 0
    for info in client.list():
        if info.name in expected:
            assert client.stat(info.name) == info
            found += 1
    assert found == len(expected)


def test_a_list_of_hundreds_has_each_snapshot_once(client: SnapshotClient) -> None:
    base = committed(client)
    children = [new_key("view") for _ in range(250)]
    for key in children:
        client.view(key, base)
    assert sorted(info.name for info in client.list(f"parent=={base}")) == sorted(children)
    for key in children:
        client.remove(key)


# -- usage and cleanup


def test_the_usage_has_the_own_files_of_a_snapshot(client: SnapshotClient) -> None:
    base = committed(client, "", lambda top: (top / "base").write_bytes(bytes(1 << 20)))
    key, name = active(client, base), new_key("committed")
    before = client.usage(key)
    assert before.size < 1 << 16
    with mounted(client.mounts(key)) as top:
        (top / "own").write_bytes(bytes(1 << 16))
        (top / "link").hardlink_to(top / "own")
    written = client.usage(key)
    assert 1 << 16 <= written.size - before.size < 1 << 17
    assert written.inodes - before.inodes == 1, "a hard link is no inode of its own"
    client.commit(key, name)
    assert client.usage(name) == written
    assert client.usage(base).size >= 1 << 20


def test_a_view_uses_no_disk(client: SnapshotClient) -> None:
    view = new_key("view")
    client.view(view, committed(client, "", make_foo))
    assert (client.usage(view).size, client.usage(view).inodes) == (0, 0)


def test_a_cleanup_keeps_all_snapshots(client: SnapshotClient) -> None:
    base = committed(client, "", make_foo)
    key = active(client, base)
    with mounted(client.mounts(key)) as top:
        client.cleanup()
        assert (top / "foo").read_text() == "foo"
    assert is_mounted(Path(client.mounts(key)[0].source))
    assert b"foo" in shown(client, base)
