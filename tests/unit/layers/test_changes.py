"""The list of changes, as `docker diff` shows it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gearworkers.layers.diff.changes import Change, ChangeKind, tree_changes, upper_changes
from tests.support.overlays import Overlay, mounted

LETTERS = {ChangeKind.MODIFY: "C", ChangeKind.ADD: "A", ChangeKind.DELETE: "D"}


def lower(tree: Path) -> None:
    (tree / "etc/deep").mkdir(parents=True)
    (tree / "etc/hosts").write_text("hosts")
    (tree / "etc/deep/file").write_text("file")
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "usr/lib/libc").write_text("libc")


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    root = tmp_path / "overlay"
    root.mkdir()
    with mounted(root, [lower]) as made:
        yield made


def shown(changes: list[Change]) -> list[str]:
    return [f"{LETTERS[change.kind]} {os.fsdecode(change.path)}" for change in changes]


def changes_of_upper(overlay: Overlay) -> list[str]:
    return shown(upper_changes(overlay.upper, overlay.merged_fd, overlay.parent_fd))


def added(root: Path) -> None:
    (root / "etc/deep/new").mkdir()
    (root / "etc/deep/new/file").touch()


def deleted(root: Path) -> None:
    (root / "etc/hosts").unlink()
    shutil.rmtree(root / "usr/lib")


def metadata_only(root: Path) -> None:
    (root / "etc/deep/file").chmod(0o600)


def directory_mode(root: Path) -> None:
    (root / "usr/lib").chmod(0o700)


def opaque(root: Path) -> None:
    shutil.rmtree(root / "etc")
    (root / "etc").mkdir()
    (root / "etc/hosts").write_text("again")


def renamed(root: Path) -> None:
    (root / "etc/deep").rename(root / "moved")


def directory_to_file(root: Path) -> None:
    shutil.rmtree(root / "etc/deep")
    (root / "etc/deep").touch()


def copied_up_unchanged(root: Path) -> None:
    with (root / "etc/hosts").open("r+"):
        pass


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (added, ["C /etc", "C /etc/deep", "A /etc/deep/new", "A /etc/deep/new/file"]),
        (deleted, ["C /etc", "D /etc/hosts", "C /usr", "D /usr/lib"]),
        (metadata_only, ["C /etc", "C /etc/deep", "C /etc/deep/file"]),
        (directory_mode, ["C /usr", "C /usr/lib"]),
        (opaque, ["C /etc", "D /etc/deep", "C /etc/hosts"]),
        (renamed, ["C /etc", "D /etc/deep", "A /moved", "A /moved/file"]),
        (directory_to_file, ["C /etc", "C /etc/deep"]),
        (copied_up_unchanged, ["C /etc", "C /etc/hosts"]),
        (lambda _: None, []),
    ],
)
def test_a_change_also_modifies_its_parent_directories(
    change: Callable[[Path], None], expected: list[str], overlay: Overlay
) -> None:
    change(overlay.merged)
    assert changes_of_upper(overlay) == expected


def test_a_layer_without_a_parent_adds_all_its_files(overlay: Overlay) -> None:
    empty = overlay.root / "empty"
    empty.mkdir()
    empty_fd = os.open(empty, os.O_RDONLY)
    try:
        assert shown(tree_changes(overlay.merged_fd, None)) == [
            "A /etc",
            "A /etc/deep",
            "A /etc/deep/file",
            "A /etc/hosts",
            "A /usr",
            "A /usr/lib",
            "A /usr/lib/libc",
        ]
        assert tree_changes(overlay.merged_fd, None) == tree_changes(overlay.merged_fd, empty_fd)
    finally:
        os.close(empty_fd)


def test_a_tree_does_not_differ_from_itself(overlay: Overlay) -> None:
    assert tree_changes(overlay.merged_fd, overlay.merged_fd) == []
    assert tree_changes(overlay.merged_fd, overlay.parent_fd) == []


@pytest.mark.parametrize("attribute", ["uid", "mtime", "size", "target", "capability", "type"])
def test_a_different_attribute_is_a_modification(attribute: str, tmp_path: Path) -> None:
    fds = []
    for number in (1, 2):
        tree = tmp_path / str(number)
        tree.mkdir()
        different = number == 2
        file = tree / "file"
        if attribute == "type" and different:
            file.mkdir()
        elif attribute == "target":
            file.symlink_to("one" if different else "two")
        else:
            file.write_text("longer" if attribute == "size" and different else "short")
        if attribute == "uid" and different:
            os.chown(file, 1, 0)
        if attribute == "capability" and different:
            os.setxattr(file, "security.capability", bytes.fromhex("01000002" + "00040000" + "00" * 12))
        os.utime(file, ns=(1, 1 + (attribute == "mtime" and different)), follow_symlinks=False)
        fds.append(os.open(tree, os.O_RDONLY))
    try:
        assert shown(tree_changes(fds[1], fds[0])) == ["C /file"]
    finally:
        for fd in fds:
            os.close(fd)


def test_another_time_of_a_directory_is_a_modification_and_another_size_is_not(tmp_path: Path) -> None:
    for tree in ("1", "2"):
        for name in ("touched", "shrunk"):
            (tmp_path / tree / name).mkdir(parents=True)
            os.utime(tmp_path / tree / name, ns=(1, 2 if name == "touched" and tree == "2" else 1))
    for number in range(300):  # a directory of ext4 keeps its blocks when its entries are gone
        (tmp_path / "2/shrunk" / f"{number}-{'x' * 200}").touch()
    for file in (tmp_path / "2/shrunk").iterdir():
        file.unlink()
    os.utime(tmp_path / "2/shrunk", ns=(1, 1))
    fds = [os.open(tmp_path / name, os.O_RDONLY) for name in ("1", "2")]
    try:
        assert shown(tree_changes(fds[1], fds[0])) == ["C /touched"]
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.slow
def test_trees_deeper_than_the_interpreter_stack_are_compared(overlay: Overlay) -> None:
    path = overlay.merged
    for _ in range(1500):
        path = path / "d"
        path.mkdir()
    try:
        assert len(upper_changes(overlay.upper, overlay.merged_fd, overlay.parent_fd)) == 1500
        assert len(tree_changes(overlay.merged_fd, overlay.parent_fd)) == 1500
    finally:
        subprocess.run(["rm", "-rf", overlay.merged / "d"], check=True)
