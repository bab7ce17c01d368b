"""The diff of any sequence of file operations, applied to the parent, reproduces the tree of the container."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gearworkers.layers.diff.changes import ChangeKind, tree_changes, upper_changes
from gearworkers.layers.diff.export import write_diff
from gearworkers.layers.idmap import IdMaps
from gearworkers.mounts.overlay import detached
from tests.support.overlays import Overlay, apply_tar, mounted, snapshot

NAMES = ("a", "b", "c")
PATHS = [Path(*parts) for parts in [(x,) for x in NAMES] + [(x, y) for x in NAMES for y in NAMES]]
PATHS += [Path(x, y, z) for x in NAMES for y in NAMES for z in NAMES]
REJECTED = (
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.EPERM,
    errno.ELOOP,
)
"""Errors of the kernel for an operation that does not fit the tree. The sequence continues."""

Operation = Callable[[Path], None]


def lower(tree: Path) -> None:
    (tree / "a/a").mkdir(parents=True)
    (tree / "a/b").mkdir()
    (tree / "b/c").mkdir(parents=True)
    for path in ("a/a/a", "a/a/b", "a/c", "b/c/a", "b/a", "c"):
        (tree / path).write_text(f"lower {path}")


def middle(tree: Path) -> None:
    (tree / "a/a").mkdir(parents=True)
    os.mknod(tree / "a/a/b", stat.S_IFCHR, 0)
    (tree / "a/a/c").write_text("middle")
    (tree / "b/c").mkdir(parents=True)
    os.setxattr(tree / "b/c", "trusted.overlay.opaque", b"y")
    (tree / "b/c/b").write_text("middle too")


def write(path: Path, text: str) -> Operation:
    def operation(root: Path) -> None:
        target = root / path
        if os.path.lexists(target) and not stat.S_ISREG(target.lstat().st_mode):
            raise OSError(errno.EINVAL, "writing to a FIFO would block, and writing to a device would reach it")
        target.write_text(text)

    return operation


def no_symlink(path: Path) -> Path:
    """Return the path; reject a symlink, so that operations do not follow it."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a symlink")
    return path


def remove(path: Path) -> Operation:
    def operation(root: Path) -> None:
        target = root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()

    return operation


def chmod(path: Path, mode: int) -> Operation:
    return lambda root: no_symlink(root / path).chmod(mode)


def chown(path: Path, uid: int) -> Operation:
    return lambda root: os.chown(root / path, uid, uid, follow_symlinks=False)


def touch(path: Path, mtime_ns: int) -> Operation:
    return lambda root: os.utime(root / path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)


def note(path: Path, value: bytes) -> Operation:
    return lambda root: os.setxattr(no_symlink(root / path), "user.note", value)


def rename(old: Path, new: Path) -> Operation:
    return lambda root: os.rename(root / old, root / new)


def link(old: Path, new: Path) -> Operation:
    return lambda root: os.link(root / old, root / new, follow_symlinks=False)


def symlink(path: Path, to: str) -> Operation:
    return lambda root: os.symlink(to, root / path)


def mkdir(path: Path) -> Operation:
    return lambda root: (root / path).mkdir()


PATH = st.sampled_from(PATHS)
OPERATION = st.one_of(
    st.builds(write, PATH, st.text("xy", max_size=3)),
    st.builds(remove, PATH),
    st.builds(mkdir, PATH),
    st.builds(chmod, PATH, st.sampled_from([0o600, 0o755, 0o4711, 0o1777])),
    st.builds(chown, PATH, st.sampled_from([0, 7, 1000])),
    st.builds(touch, PATH, st.sampled_from([0, 5, 1_500_000_000_000_000_001])),
    st.builds(note, PATH, st.binary(max_size=3)),
    st.builds(rename, PATH, PATH),
    st.builds(rename, PATH, PATH),
    st.builds(link, PATH, PATH),
    st.builds(symlink, PATH, st.sampled_from(NAMES)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OPERATION, min_size=1, max_size=14))
def test_the_diff_of_any_sequence_reproduces_the_tree_of_the_container(operations: list[Operation]) -> None:
    with tempfile.TemporaryDirectory(prefix="gw-") as directory:
        root = Path(directory, "overlay")
        root.mkdir()
        with mounted(root, [lower, middle]) as overlay:
            for operation in operations:
                attempt(operation, overlay.merged)
            check(overlay, Path(directory))


def attempt(operation: Operation, merged: Path) -> None:
    try:
        operation(merged)
    except OSError as exc:
        assert exc.errno in REJECTED, exc


def check(overlay: Overlay, directory: Path) -> None:
    seen = snapshot(overlay.merged_fd)
    tar = diff(overlay, overlay.merged_fd)
    assert apply_tar(overlay.parent_fd, tar, directory / "copy") == seen
    with detached(overlay.spec) as fresh_fd:
        assert diff(overlay, fresh_fd) == tar, "a detached mount gives the same diff"
    of_upper = upper_changes(overlay.upper, overlay.merged_fd, overlay.parent_fd)
    of_trees = tree_changes(overlay.merged_fd, overlay.parent_fd)
    both = [[change for change in changes if change.kind is not ChangeKind.MODIFY] for changes in (of_upper, of_trees)]
    assert both[0] == both[1]
    assert {change.path for change in of_trees} <= {change.path for change in of_upper}


def diff(overlay: Overlay, merged_fd: int) -> bytes:
    out = io.BytesIO()
    write_diff(overlay.upper, merged_fd, overlay.parent_fd, out, IdMaps())
    return out.getvalue()
