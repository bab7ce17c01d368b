"""The files of containerd's snapshots, compared with a plain directory that receives the same changes."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from grpc import StatusCode

from tests.conformance.snapshots import Change, active, check_chain, committed, new_key, shown, tree
from tests.support.containerd import SnapshotClient, mounted, refused

LAYERS = 400


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return tmp_path / "plain"


def write(path: Path, text: str = "", mode: int = 0o644) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def chown(top: Path, id: int, *names: str) -> None:
    for name in names:
        os.chown(top / name, id, id)


def test_a_file_is_updated_in_an_upper_layer(client: SnapshotClient, plain: Path) -> None:
    def lower(top: Path) -> None:
        write(top / "etc/hosts", "mydomain 10.0.0.1")
        write(top / "etc/profile", "PATH=/usr/bin")

    def upper(top: Path) -> None:
        write(top / "etc/hosts", "mydomain 10.0.0.2")
        write(top / "etc/profile", "PATH=/usr/bin", 0o666)
        write(top / "root/.bashrc", "PATH=/usr/sbin:/usr/bin")

    check_chain(client, plain, lower, upper)


def test_a_replaced_directory_hides_the_files_below_it(client: SnapshotClient, plain: Path) -> None:
    def replace(top: Path) -> None:
        shutil.rmtree(top / "lib")
        write(top / "lib/visible")

    check_chain(client, plain, lambda top: write(top / "lib/hidden"), replace, lambda top: write(top / "lib/new"))
    assert {path.name for path in (plain / "lib").iterdir()} == {"visible", "new"}


def test_owners_change_in_an_upper_layer(client: SnapshotClient, plain: Path) -> None:
    names = ("opt", "opt/a", "opt/a/b", "opt/a/b/file.txt")
    check_chain(client, plain, lambda top: write(top / names[-1], "hello"), lambda top: chown(top, 1, *names))


def test_owners_and_modes_of_directories_survive_commits(client: SnapshotClient, plain: Path) -> None:
    def first(top: Path) -> None:
        for number in range(1, 6):
            (top / f"dir{number}").mkdir(mode=0o700)
        write(top / "dir4/f1", "...")
        write(top / "dir5/f1", "...")
        chown(top, 1, "dir1", "dir2", "dir3", "dir5", "dir5/f1")

    def second(top: Path) -> None:
        chown(top, 0, "dir2")
        (top / "dir3").rmdir()
        chown(top, 1, "dir4", "dir4/f1")

    def third(top: Path) -> None:
        (top / "dir3").mkdir(mode=0o700)
        shutil.rmtree(top / "dir5")
        (top / "dir5").mkdir(mode=0o700)
        chown(top, 1, "dir3", "dir5")

    check_chain(client, plain, first, second, third)


def test_files_that_a_child_deletes_stay_deleted(client: SnapshotClient, plain: Path) -> None:
    def create(top: Path) -> None:
        write(top / "kept", "kept")
        write(top / "deleted", "deleted")

    name = check_chain(client, plain, create, lambda top: (top / "deleted").unlink(), lambda top: None)
    assert set(shown(client, name)) == {b"kept"}


def test_files_move_out_of_a_lower_layer(client: SnapshotClient, plain: Path) -> None:
    def lower(top: Path) -> None:
        write(top / "dir1/f1", "Hello")
        write(top / "dir2/f2", "...")

    def move(top: Path) -> None:
        write(top / "dir3/f1", "Hello")
        shutil.rmtree(top / "dir1")
        (top / "dir3/f2").hardlink_to(top / "dir2/f2")
        (top / "dir2/f2").unlink()

    check_chain(client, plain, lower, move)


def test_directories_and_files_of_a_lower_layer_are_renamed(client: SnapshotClient, plain: Path) -> None:
    def lower(top: Path) -> None:
        write(top / "dir1/below/file", "far down")
        write(top / "files/f1", "was here first!")
        write(top / "files/f2", "nothing interesting")

    def rename(top: Path) -> None:
        (top / "dir1").rename(top / "dir2")
        write(top / "files/overwriting", "new content")
        (top / "files/overwriting").rename(top / "files/f1")
        (top / "files/f2").rename(top / "files/f3")

    def rename_again(top: Path) -> None:
        (top / "dir2/below").rename(top / "moved")
        write(top / "moved/file", "changed")

    check_chain(client, plain, lower, rename, rename_again)


def test_files_of_each_type_survive_a_commit(client: SnapshotClient, plain: Path) -> None:
    def create(top: Path) -> None:
        (top / "symlink").symlink_to("nowhere")
        os.mkfifo(top / "fifo")
        os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        write(top / "file", "content", 0o4755)
        (top / "link").hardlink_to(top / "file")
        os.setxattr(top / "file", "user.test", b"value")

    check_chain(client, plain, create, lambda top: write(top / "other"))


# -- views and the top directory


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_view_is_read_only(client: SnapshotClient, layers: int) -> None:
    parent, key = "", new_key("view")
    for number in range(layers):
        parent = committed(client, parent, partial(add_file, number))
    with mounted(client.view(key, parent)) as top:
        assert len(tree(top)) == layers
        check_read_only(lambda: (top / "new").touch())
        for path in top.iterdir():
            check_read_only(partial(write, path, "changed"))
            check_read_only(path.unlink)
    client.remove(key)


def add_file(number: int, top: Path) -> None:
    write(top / f"file{number}")


def check_read_only(write: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        write()
    assert caught.value.errno == errno.EROFS


def test_the_views_of_one_parent_are_separate_mounts(client: SnapshotClient) -> None:
    base, first, second = committed(client, "", lambda top: write(top / "file", "1")), new_key("view"), new_key("view")
    sources = {client.view(key, base)[0].source for key in (first, second)}
    assert len(sources) == 2
    client.remove(first)
    with mounted(client.mounts(second)) as top:
        assert (top / "file").read_text() == "1"


def test_the_snapshots_of_one_parent_share_no_changes(client: SnapshotClient) -> None:
    base = committed(client, "", lambda top: write(top / "file", "1"))
    with mounted(client.mounts(active(client, base))) as one, mounted(client.mounts(active(client, base))) as other:
        write(one / "file", "2")
        assert (other / "file").read_text() == "1"
    assert len(shown(client, base)) == 1


@pytest.mark.parametrize("on_a_parent", [False, True], ids=["without a parent", "on a parent"])
def test_everybody_may_enter_the_top_directory(client: SnapshotClient, on_a_parent: bool) -> None:
    key = active(client, committed(client) if on_a_parent else "")
    with mounted(client.mounts(key)) as top:
        status = top.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o755, 0, 0)


def test_the_top_directory_keeps_its_owner_in_children(client: SnapshotClient) -> None:
    base = committed(client, "", lambda top: os.chown(top, 1000, 2000))
    view = new_key("view")
    for mounts in (client.view(view, base), client.mounts(active(client, base))):
        with mounted(mounts) as top:
            assert (top.stat().st_uid, top.stat().st_gid) == (1000, 2000)


# -- chains


def test_the_changes_of_a_writer_are_present_at_the_next_mount(client: SnapshotClient) -> None:
    key = active(client, "", lambda top: write(top / "first"))
    with mounted(client.mounts(key)) as top:
        write(top / "second")
    with mounted(client.mounts(key)) as top:
        assert set(tree(top)) == {b"first", b"second"}


def test_an_intermediate_snapshot_is_not_removed(client: SnapshotClient) -> None:
    base = committed(client, "", lambda top: write(top / "base"))
    middle = committed(client, base, lambda top: write(top / "middle"))
    key = active(client, middle)
    with refused(StatusCode.FAILED_PRECONDITION, "remove"):
        client.remove(middle)
    with mounted(client.mounts(key)) as top:
        assert set(tree(top)) == {b"base", b"middle"}
    for name in (key, middle, base):
        client.remove(name)


def numbered(number: int) -> Change:
    """Return a change that adds a file, overwrites a second one and replaces a directory."""

    def change(top: Path) -> None:
        write(top / "overwritten", f"by {number}")
        write(top / f"added/file-{number}", "same")
        shutil.rmtree(top / "replaced", ignore_errors=True)
        write(top / f"replaced/file-{number}", f"only {number}")

    return change


def test_a_chain_of_400_layers_is_mounted_and_shows_all_files(client: SnapshotClient, plain: Path) -> None:
    plain.mkdir()
    name = ""
    for number in range(LAYERS):
        name = committed(client, name, numbered(number))
        numbered(number)(plain)
    assert shown(client, name) == tree(plain)
    assert len(list((plain / "added").iterdir())) == LAYERS
    with mounted(client.mounts(active(client, name))) as top:
        assert tree(top) == tree(plain)


# -- parents named at commit


def test_a_parent_named_at_commit_is_below_the_files(client: SnapshotClient) -> None:
    def fill(top: Path, place: str) -> None:
        write(top / "both", place)
        write(top / place)

    base, name = committed(client, "", lambda top: fill(top, "lower")), new_key("committed")
    key = active(client, "", lambda top: fill(top, "upper"))
    client.commit(key, name, parent=base)
    child = active(client, name)
    for mounts in (client.view(new_key("view"), name), client.mounts(child)):
        with mounted(mounts) as top:
            assert set(tree(top)) == {b"both", b"lower", b"upper"}
            assert (top / "both").read_text() == "upper"
