"""The driver returns any tree exactly as applied, and a commit keeps all changes of a container."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from gearworkers.settings import Settings
from gearworkers.tar.entry import BLOCK, CHAR, DIR, FIFO, HARDLINK, REG, SYMLINK, TarEntry
from tests.conformance.drivers import InProcess, new_layer_id
from tests.conformance.layers import File, apply_layer, committed, mounted, shown, tar
from tests.property.test_diff_sequences import OPERATION, REJECTED, Operation
from tests.support.overlays import Node

EXAMPLES = examples(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

_NAME_BYTES = st.integers(1, 255).filter(lambda byte: byte not in (0x2F, 0x01))
NAME = st.one_of(
    st.sampled_from([b"a", b"b", b"c", b"\xff", b"...", b"-", b"n" * 255]),
    st.lists(_NAME_BYTES, min_size=1, max_size=12).map(bytes),
).filter(lambda name: name not in (b".", b"..") and not name.startswith(b".wh."))
XATTRS = st.dictionaries(st.sampled_from([b"user.a", b"user.b", b"trusted.test"]), st.binary(max_size=40), max_size=2)
CONTENT = st.one_of(st.binary(max_size=20), st.sampled_from([b"x" * 511, b"x" * 512, b"x" * 513, bytes(100_000)]))
MODE = st.integers(0, 0o7777)
OWNER = st.one_of(st.just(0), st.integers(1, 70_000), st.just((1 << 32) - 2))
TIME = st.one_of(st.just(0), st.integers(0, 4_000_000_000 * 10**9))
KIND = st.sampled_from([REG, REG, REG, DIR, DIR, SYMLINK, HARDLINK, FIFO, CHAR, BLOCK])


@st.composite
def trees(draw: st.DrawFn) -> list[File]:
    """Generate entries, parents before children, each name once."""
    directories, files = [b""], list[File]()
    taken = set[bytes]()
    plain = list[TarEntry]()
    for _ in range(draw(st.integers(0, 12))):
        path = draw(st.sampled_from(directories)) + draw(NAME)
        if path in taken:
            continue
        taken.add(path)
        kind = draw(KIND)
        entry, content = _entry(draw, path, kind, plain)
        files.append((entry, content))
        if entry.type == DIR:
            directories.append(path + b"/")
        elif entry.type == REG:
            plain.append(entry)
    return files


def _entry(draw: st.DrawFn, path: bytes, kind: int, plain: list[TarEntry]) -> File:
    if kind == HARDLINK and plain:
        first = draw(st.sampled_from(plain))
        return TarEntry(path, HARDLINK, first.name, first.mode, first.uid, first.gid, 0, first.mtime_ns), b""
    kind = REG if kind == HARDLINK else kind
    content = draw(CONTENT) if kind == REG else b""
    entry = TarEntry(
        path + b"/" if kind == DIR else path,
        kind,
        draw(NAME) if kind == SYMLINK else b"",
        0o777 if kind == SYMLINK else draw(MODE),
        draw(OWNER),
        draw(OWNER),
        len(content),
        draw(TIME),
    )
    if kind in (CHAR, BLOCK):
        entry.devmajor, entry.devminor = draw(st.integers(1, 4095)), draw(st.integers(0, (1 << 20) - 1))
    if kind in (REG, DIR):
        entry.xattrs = draw(XATTRS) or None
    return entry, content


@pytest.fixture(scope="module")
def driver() -> Iterator[InProcess]:
    with tempfile.TemporaryDirectory(prefix="gw-") as directory:
        driver = InProcess(Settings(gear_root=Path(directory, "gear"), run_dir=Path(directory, "run"), node="test"))
        driver.init()
        yield driver
        driver.cleanup()


@EXAMPLES
@given(trees())
def test_a_mount_shows_any_tree_as_applied_and_diff_returns_its_tar(driver: InProcess, files: list[File]) -> None:
    data = tar(*files)
    id = new_layer_id()
    driver.create(id)
    driver.apply_diff(id, "", data)
    nodes = shown(driver, id)
    assert set(nodes) == {entry.name.rstrip(b"/") for entry, _ in files}
    for entry, content in files:
        check_node(nodes[entry.name.rstrip(b"/")], entry, content)
    assert driver.diff(id) == data
    driver.remove(id)


def check_node(node: Node, entry: TarEntry, content: bytes) -> None:
    formats = {REG: stat.S_IFREG, DIR: stat.S_IFDIR, SYMLINK: stat.S_IFLNK, FIFO: stat.S_IFIFO}
    formats |= {CHAR: stat.S_IFCHR, BLOCK: stat.S_IFBLK, HARDLINK: stat.S_IFREG}
    assert node.mode == formats[entry.type] | entry.mode
    assert (node.uid, node.gid, node.mtime_ns) == (entry.uid, entry.gid, entry.mtime_ns)
    if entry.type == SYMLINK:
        assert node.content == entry.linkname
    if entry.type in (CHAR, BLOCK):
        assert node.rdev == os.makedev(entry.devmajor, entry.devminor)
    if entry.type == HARDLINK:
        assert {entry.name, entry.linkname} <= node.links
    elif entry.type in (REG, DIR):
        assert dict(node.xattrs) == {name.decode(): value for name, value in (entry.xattrs or {}).items()}
    if entry.type == REG:
        assert node.content == hashlib.sha256(content).digest()


@EXAMPLES
@example([(TarEntry(b"a/", DIR), b"")], [(TarEntry(b"a/", DIR, mtime_ns=1), b"")])
@given(trees(), trees())
def test_any_two_trees_are_merged_and_the_diff_of_two_layers_turns_one_into_the_other(
    driver: InProcess, lower: list[File], upper: list[File]
) -> None:
    base = apply_layer(driver, *lower)
    top = apply_layer(driver, *upper, parent=base)
    nodes = shown(driver, top)
    assert {entry.name.rstrip(b"/") for entry, _ in upper} <= set(nodes)
    alone = apply_layer(driver)
    again = new_layer_id()
    driver.create(again, alone)
    driver.apply_diff(again, alone, driver.diff(top, alone))
    assert unlinked(shown(driver, again)) == unlinked(nodes)
    back = new_layer_id()
    driver.create(back, top)
    driver.apply_diff(back, top, driver.diff(base, top))
    assert unlinked(shown(driver, back)) == unlinked(shown(driver, base))
    for id in (back, again, alone, top, base):
        driver.remove(id)


def unlinked(nodes: dict[bytes, Node]) -> dict[bytes, Node]:
    """Return *nodes* without links. As in Docker, two trees that differ only in links have no changes."""
    return {name: node._replace(links=frozenset()) for name, node in nodes.items()}


@EXAMPLES
@given(trees(), st.lists(st.lists(OPERATION, max_size=8), min_size=1, max_size=3))
def test_a_commit_keeps_all_changes_of_a_container(
    driver: InProcess, files: list[File], turns: list[list[Operation]]
) -> None:
    layers = [apply_layer(driver, *files)]
    for operations in turns:
        parent, id = layers[-1], new_layer_id()
        driver.create_read_write(id, parent)
        with mounted(driver, id) as merged:
            for operation in operations:
                attempt(operation, merged)
        seen = shown(driver, id)
        layers += [id, committed(driver, id, parent)]
        assert shown(driver, layers[-1]) == seen
    for id in reversed(layers):
        driver.remove(id)


def attempt(operation: Operation, merged: Path) -> None:
    try:
        operation(merged)
    except OSError as exc:
        assert exc.errno in (*REJECTED, errno.ENXIO, errno.ENODEV, errno.EOVERFLOW), exc
