"""The tar of a read-write layer: applied to a copy of the parent, it gives the container's view."""

from __future__ import annotations

import io
import os
import shutil
import socket
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gearworkers.errors import InvalidInput, NotFound
from gearworkers.layers.diff.changes import Change, ChangeKind, tree_changes, upper_changes
from gearworkers.layers.diff.export import write_diff, write_tree_diff
from gearworkers.layers.idmap import IdMaps, IdRange
from gearworkers.mounts.overlay import detached
from tests.support.overlays import Node, Overlay, apply_tar, mounted, snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BIG = bytes(range(256)) * 10_000
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
ACL = bytes.fromhex("0200000001000600ffffffff02000400d204000004000400ffffffff10000600ffffffff20000400ffffffff")
"""A POSIX ACL: the owner rw, user 1234 r, group r, mask rw, others r."""
NO_MAPS = IdMaps()


def lower(tree: Path) -> None:
    for directory in ("etc", "usr/bin", "usr/lib/a/deep/deeper", "usr/lib/b", "opt/app", "srv", "var/tmp"):
        (tree / directory).mkdir(parents=True)
    for path in (
        "etc/hosts",
        "etc/passwd",
        "usr/lib/a/one",
        "usr/lib/a/two",
        "usr/lib/a/deep/three",
        "usr/lib/a/deep/deeper/four",
        "usr/lib/b/five",
        "opt/app/old",
        "srv/hidden",
        "same",
    ):
        (tree / path).write_text(f"content of {path}\n")
    (tree / "etc/empty").touch()
    (tree / "usr/bin/big").write_bytes(BIG)
    (tree / "usr/bin/tool").write_text("#!/bin/sh\n")
    (tree / "usr/bin/tool").chmod(0o4755)
    os.setxattr(tree / "usr/bin/big", "security.capability", CAPABILITY)
    (tree / "var/tmp").chmod(0o1777)
    (tree / "etc/link").symlink_to("hosts")
    os.mkfifo(tree / "var/fifo")
    os.mknod(tree / "var/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.utime(tree / "etc/hosts", ns=(1, 1_234_567_890_123_456_789))


def middle(tree: Path) -> None:
    (tree / "opt/app").mkdir(parents=True)
    os.mknod(tree / "opt/app/old", stat.S_IFCHR, 0)
    (tree / "opt/app/new").write_text("from the middle layer\n")
    (tree / "srv").mkdir()
    os.setxattr(tree / "srv", "trusted.overlay.opaque", b"y")
    (tree / "srv/shown").write_text("from the middle layer too\n")


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    root = tmp_path / "overlay"
    root.mkdir()
    with mounted(root, [lower, middle]) as made:
        yield made


def diff_of(overlay: Overlay, ids: IdMaps = NO_MAPS) -> bytes:
    out = io.BytesIO()
    write_diff(overlay.upper, overlay.merged_fd, overlay.parent_fd, out, ids)
    return out.getvalue()


def names(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        return archive.getnames()


def added_and_deleted(changes: list[Change]) -> list[Change]:
    return [change for change in changes if change.kind is not ChangeKind.MODIFY]


# The scenarios: changes that a container makes in its merged view.


def no_change(_: Path) -> None:
    pass


def new_files(root: Path) -> None:
    (root / "a file").write_text("new")
    (root / "etc/conf.d/deep").mkdir(parents=True)
    (root / "etc/conf.d/deep/x").write_bytes(BIG)
    (root / "etc/conf.d/empty").touch()


def altered_content(root: Path) -> None:
    with (root / "etc/hosts").open("a") as file:
        file.write("more")
    (root / "etc/passwd").write_text("other")


def changed_mode(root: Path) -> None:
    (root / "etc/hosts").chmod(0o600)
    (root / "usr/bin/tool").chmod(0o2711)
    (root / "usr/lib").chmod(0o700)


def changed_owners(root: Path) -> None:
    for directory, subdirectories, files in os.walk(root / "usr"):
        for name in [".", *subdirectories, *files]:
            os.chown(os.path.join(directory, name), 1000, 3_000_000, follow_symlinks=False)


def changed_times(root: Path) -> None:
    os.utime(root / "etc/hosts", ns=(5, 5))
    os.utime(root / "etc/passwd", ns=(7, 2_000_000_000_000_000_007))
    os.utime(root / "etc/link", ns=(9, 9), follow_symlinks=False)
    os.utime(root / "usr/lib/b", ns=(11, 11))


def changed_xattrs(root: Path) -> None:
    os.setxattr(root / "etc/hosts", "user.note", b"\x00\xff binary")
    os.setxattr(root / "etc/passwd", "trusted.test", b"kept")
    os.setxattr(root / "usr/bin/tool", "security.capability", CAPABILITY)
    os.removexattr(root / "usr/bin/big", "security.capability")
    os.setxattr(root / "usr/lib", "user.directory", b"too")
    os.setxattr(root / "etc/empty", "system.posix_acl_access", ACL)
    os.setxattr(root / "usr/lib/b", "system.posix_acl_default", ACL)


def renamed_after_chmod(root: Path) -> None:
    (root / "etc/hosts").chmod(0o640)
    (root / "etc/hosts").rename(root / "usr/lib/b/renamed")


def linked_after_chmod(root: Path) -> None:
    (root / "etc/hosts").chmod(0o640)
    os.link(root / "etc/hosts", root / "usr/lib/b/second")
    os.link(root / "etc/hosts", root / "a-third")


def linked_then_written(root: Path) -> None:
    os.link(root / "etc/passwd", root / "etc/again")
    (root / "etc/again").write_text("through the second name")


def new_hard_links(root: Path) -> None:
    (root / "z").write_text("linked")
    os.link(root / "z", root / "etc/a-link")
    (root / "s").symlink_to("z")
    os.link(root / "s", root / "s2", follow_symlinks=False)


def renamed_directory(root: Path) -> None:
    (root / "usr/lib/a").rename(root / "moved")


def renamed_out_of_renamed(root: Path) -> None:
    (root / "usr/lib/a").rename(root / "moved")
    (root / "moved/deep").rename(root / "etc/deep")
    (root / "etc/deep/deeper").rename(root / "moved/deep")


def renamed_then_modified(root: Path) -> None:
    (root / "usr/lib/a").rename(root / "moved")
    (root / "moved/one").write_text("changed")
    (root / "moved/two").unlink()
    (root / "moved/deep/three").chmod(0o600)
    (root / "moved/deep/new").write_text("new")
    shutil.rmtree(root / "moved/deep/deeper")


def renamed_over_whiteout(root: Path) -> None:
    shutil.rmtree(root / "usr/lib/b")
    (root / "usr/lib/a").rename(root / "usr/lib/b")


def renamed_and_made_again(root: Path) -> None:
    (root / "usr/lib/a").rename(root / "moved")
    (root / "usr/lib/a").mkdir()
    (root / "usr/lib/a/fresh").write_text("fresh")
    (root / "usr/lib/a/one").write_text("another one")


def swapped_directories(root: Path) -> None:
    (root / "usr/lib/a").rename(root / "t")
    (root / "usr/lib/b").rename(root / "usr/lib/a")
    (root / "t").rename(root / "usr/lib/b")


def renamed_there_and_back(root: Path) -> None:
    (root / "usr/lib/a").rename(root / "t")
    (root / "t").rename(root / "usr/lib/a")


def link_across_renamed(root: Path) -> None:
    os.link(root / "usr/lib/a/one", root / "etc/one")
    (root / "usr/lib/a").rename(root / "moved")


def renamed_merged_directory(root: Path) -> None:
    (root / "opt/app").rename(root / "opt/moved")
    (root / "srv").rename(root / "opt/srv")


def deleted(root: Path) -> None:
    (root / "etc/hosts").unlink()
    (root / "etc/link").unlink()
    shutil.rmtree(root / "usr/lib")


def deleted_and_made_again(root: Path) -> None:
    shutil.rmtree(root / "usr/lib")
    (root / "usr/lib/a").mkdir(parents=True)
    (root / "usr/lib/a/one").write_text("again")
    (root / "etc/hosts").unlink()
    (root / "etc/hosts").write_text("again")


def file_to_directory_and_back(root: Path) -> None:
    (root / "etc/hosts").unlink()
    (root / "etc/hosts").mkdir()
    (root / "etc/hosts/inside").write_text("x")
    shutil.rmtree(root / "usr/lib/a")
    (root / "usr/lib/a").write_text("now a file")
    shutil.rmtree(root / "usr/lib/b")
    (root / "usr/lib/b").symlink_to("../../etc")


def special_files(root: Path) -> None:
    os.mkfifo(root / "fifo", 0o620)
    os.mknod(root / "block", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    (root / "var/null").chmod(0o600)
    (root / "var/fifo").rename(root / "etc/fifo")


def strange_names(root: Path) -> None:
    top = os.fsencode(root)
    for name in (b"caf\xc3\xa9", b"\xff\xfe not utf-8", b"line\nbreak", b"n" * 255, b".wh", b" "):
        with open(os.path.join(top, b"etc", name), "wb") as file:
            file.write(name)
    deep = os.path.join(top, *[b"d" * 200] * 12)
    os.makedirs(deep)
    os.symlink(b"t" * 3000, os.path.join(deep, b"link"))


def sparse_file(root: Path) -> None:
    with (root / "sparse").open("wb") as file:
        file.seek(3_000_001)
        file.write(b"end")
        file.truncate(5_000_000)


def touched_the_opaque(root: Path) -> None:
    (root / "srv/shown").chmod(0o600)
    (root / "opt/app/new").unlink()
    (root / "opt/app/old").write_text("a new old")


SCENARIOS = [
    no_change, new_files, altered_content, changed_mode, changed_owners, changed_times, changed_xattrs,
    renamed_after_chmod, linked_after_chmod, linked_then_written, new_hard_links, renamed_directory,
    renamed_out_of_renamed, renamed_then_modified, renamed_over_whiteout, renamed_and_made_again,
    swapped_directories, renamed_there_and_back, link_across_renamed, renamed_merged_directory, deleted,
    deleted_and_made_again, file_to_directory_and_back, special_files, strange_names, sparse_file,
    touched_the_opaque,
]  # fmt: skip
Scenario = Callable[[Path], None]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_tar_of_the_upper_turns_the_parent_into_the_merged_view(
    scenario: Scenario, overlay: Overlay, tmp_path: Path
) -> None:
    scenario(overlay.merged)
    tar = diff_of(overlay)
    assert apply_tar(overlay.parent_fd, tar, tmp_path / "copy") == snapshot(overlay.merged_fd)
    assert diff_of(overlay) == tar, "the same tree gives the same bytes"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_tar_of_two_trees_turns_one_tree_into_the_other(
    scenario: Scenario, overlay: Overlay, tmp_path: Path
) -> None:
    scenario(overlay.merged)
    forth, back = io.BytesIO(), io.BytesIO()
    write_tree_diff(overlay.merged_fd, overlay.parent_fd, forth, NO_MAPS)
    write_tree_diff(overlay.parent_fd, overlay.merged_fd, back, NO_MAPS)
    assert without_directory_times(apply_tar(overlay.parent_fd, forth.getvalue(), tmp_path / "forth")) == (
        without_directory_times(snapshot(overlay.merged_fd))
    )
    assert without_directory_times(apply_tar(overlay.merged_fd, back.getvalue(), tmp_path / "back")) == (
        without_directory_times(snapshot(overlay.parent_fd))
    )


def without_directory_times(nodes: dict[bytes, Node]) -> dict[bytes, Node]:
    """Return the nodes with the times of directories set to 0; as in Docker, they are not compared."""
    return {path: node._replace(mtime_ns=0) if stat.S_ISDIR(node.mode) else node for path, node in nodes.items()}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_upper_walk_and_the_tree_comparison_find_the_same_additions_and_deletions(
    scenario: Scenario, overlay: Overlay
) -> None:
    scenario(overlay.merged)
    of_upper = upper_changes(overlay.upper, overlay.merged_fd, overlay.parent_fd)
    of_trees = tree_changes(overlay.merged_fd, overlay.parent_fd)
    assert added_and_deleted(of_upper) == added_and_deleted(of_trees)
    assert {change.path for change in of_trees} <= {change.path for change in of_upper}
    assert of_upper == sorted(of_upper)


def test_the_tar_has_the_data_of_files_that_a_chown_copied_up_without_data(overlay: Overlay) -> None:
    changed_owners(overlay.merged)
    big = overlay.upper / "usr/bin/big"
    assert big.stat().st_blocks * 512 < len(BIG) // 10, "the kernel made a metadata-only copy"
    with tarfile.open(fileobj=io.BytesIO(diff_of(overlay))) as archive:
        extracted = archive.extractfile("usr/bin/big")
        assert extracted is not None
        assert extracted.read() == BIG


def test_a_layer_without_a_parent_is_written_whole(overlay: Overlay, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    empty_fd = os.open(empty, os.O_RDONLY)
    out = io.BytesIO()
    write_tree_diff(overlay.merged_fd, None, out, NO_MAPS)
    try:
        assert apply_tar(empty_fd, out.getvalue(), tmp_path / "copy") == snapshot(overlay.merged_fd)
    finally:
        os.close(empty_fd)


def test_an_opaque_marker_is_written_only_if_the_parent_has_entries_to_hide(overlay: Overlay) -> None:
    deleted_and_made_again(overlay.merged)
    (overlay.merged / "brand-new").mkdir()
    assert [name for name in names(diff_of(overlay)) if ".opq" in name] == ["usr/lib/.wh..wh..opq"]


def test_sockets_and_names_that_a_layer_cannot_contain_are_omitted(overlay: Overlay) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        fd = os.open(overlay.merged, os.O_RDONLY)
        unix.bind(f"/proc/self/fd/{fd}/socket")
        os.close(fd)
    (overlay.merged / ".wh.etc").write_text("not a whiteout")
    (overlay.merged / ".wh.dir").mkdir()
    (overlay.merged / ".wh.dir/file").touch()
    assert names(diff_of(overlay)) == []


def test_xattrs_of_overlay_and_store_are_not_in_the_tar(overlay: Overlay) -> None:
    renamed_then_modified(overlay.merged)
    changed_owners(overlay.merged)
    assert b"trusted.overlay" not in diff_of(overlay)
    assert b"trusted.gear" not in diff_of(overlay)


def test_a_capability_of_a_user_namespace_becomes_an_ordinary_capability(overlay: Overlay) -> None:
    revision_3 = CAPABILITY[:3] + b"\x03" + CAPABILITY[4:] + (100_000).to_bytes(4, "little")
    os.setxattr(overlay.merged / "usr/bin/tool", "security.capability", revision_3)
    assert b"SCHILY.xattr.security.capability=" + CAPABILITY in diff_of(overlay)


def test_owners_in_the_tar_are_ids_of_the_container(overlay: Overlay) -> None:
    (overlay.merged / "mine").touch()
    os.chown(overlay.merged / "mine", 100_007, 200_009)
    ids = IdMaps((IdRange(0, 100_000, 65536),), (IdRange(0, 200_000, 65536),))
    with tarfile.open(fileobj=io.BytesIO(diff_of(overlay, ids))) as archive:
        member = archive.getmember("mine")
    assert (member.uid, member.gid) == (7, 9)


def test_an_owner_outside_the_ranges_is_an_error_that_names_the_file(overlay: Overlay) -> None:
    (overlay.merged / "mine").touch()
    with pytest.raises(InvalidInput, match="mine"):
        diff_of(overlay, IdMaps((IdRange(0, 100_000, 65536),), (IdRange(0, 100_000, 65536),)))


def test_a_changed_file_without_its_object_is_an_error(overlay: Overlay) -> None:
    (overlay.merged / "etc/hosts").chmod(0o600)
    for directory in overlay.objects.iterdir():
        shutil.rmtree(directory)
    with detached(overlay.spec) as fresh_fd, pytest.raises(NotFound, match="etc/hosts"):
        write_diff(overlay.upper, fresh_fd, overlay.parent_fd, io.BytesIO(), NO_MAPS)


def test_a_detached_mount_gives_the_same_tar_as_the_containers_mount(overlay: Overlay) -> None:
    renamed_then_modified(overlay.merged)
    changed_owners(overlay.merged)
    while_mounted = diff_of(overlay)
    with detached(overlay.spec) as fresh_fd:
        out = io.BytesIO()
        write_diff(overlay.upper, fresh_fd, overlay.parent_fd, out, NO_MAPS)
    assert out.getvalue() == while_mounted


class InterferingSink(io.BytesIO):
    """Receives a tar, and calls *interfere* before the first bytes."""

    def __init__(self, interfere: Callable[[], object]) -> None:
        super().__init__()
        self._interfere: Callable[[], object] | None = interfere

    def write(self, data: ReadableBuffer, /) -> int:
        if self._interfere is not None:
            self._interfere()
            self._interfere = None
        return super().write(data)


@pytest.mark.parametrize("new_size", [10, 5_000_000])
def test_a_file_that_changes_its_length_during_the_diff_keeps_the_length_of_its_header(
    overlay: Overlay, tmp_path: Path, new_size: int
) -> None:
    big = overlay.merged / "grows"
    big.write_bytes(BIG)
    (overlay.merged / "later").write_text("unchanged")
    out = InterferingSink(lambda: os.truncate(big, new_size))
    write_diff(overlay.upper, overlay.merged_fd, overlay.parent_fd, out, NO_MAPS)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert archive.getmember("grows").size == len(BIG)
        later = archive.extractfile("later")
        assert later is not None
        assert later.read() == b"unchanged"


def test_a_file_that_vanishes_during_the_diff_is_omitted(overlay: Overlay) -> None:
    (overlay.merged / "a").write_bytes(BIG)
    (overlay.merged / "b").write_text("removed soon")
    (overlay.merged / "dir").mkdir()
    (overlay.merged / "dir/inside").touch()

    def vanish() -> None:
        (overlay.merged / "b").unlink()
        shutil.rmtree(overlay.merged / "dir")

    out = InterferingSink(vanish)
    write_diff(overlay.upper, overlay.merged_fd, overlay.parent_fd, out, NO_MAPS)
    assert names(out.getvalue()) == ["a"]


def test_a_symlink_that_replaces_a_directory_is_not_followed(overlay: Overlay, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "inside").write_text("of the host")
    (overlay.merged / "a").write_bytes(BIG)
    (overlay.merged / "dir").mkdir()
    (overlay.merged / "dir/inside").write_text("of the container")

    def swap() -> None:
        shutil.rmtree(overlay.merged / "dir")
        (overlay.merged / "dir").symlink_to(secret)

    out = InterferingSink(swap)
    write_diff(overlay.upper, overlay.merged_fd, overlay.parent_fd, out, NO_MAPS)
    assert b"of the host" not in out.getvalue()
