"""Helpers that make, change and show snapshots for the conformance tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.containerd import Labels, SnapshotClient, mounted
from tests.support.fake_containerd import FakeContainerd
from tests.support.overlays import Node, snapshot
from tests.support.sandbox import scratch
from tests.support.stack import Stack

Change = Callable[[Path], object]
"""Changes a tree, given its top."""

_numbers = itertools.count(1)


@contextmanager
def gateway(name: str) -> Iterator[Stack]:
    """Run a gateway alone, with *name* in its paths; no log entry may show a bug."""
    stack = Stack(scratch() / name, name=name)
    stack.set(CONTAINERD_ADDRESS=str(stack.run_dir / "fake.sock"))
    stack.start("gateway")
    try:
        yield stack
        stack.check_log("gateway")
    finally:
        stack.stop("gateway")


@contextmanager
def containerd_of(stack: Stack) -> Iterator[FakeContainerd]:
    """Run a fake containerd at the stack's CONTAINERD_ADDRESS."""
    fake = FakeContainerd(Path(stack.settings["CONTAINERD_ADDRESS"]), scratch() / f"{stack.name}-content")
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()


def new_key(word: str) -> str:
    """Return a key or name that no other test uses, in containerd's format."""
    return f"tests/{next(_numbers)}/{word}"


def active(client: SnapshotClient, parent: str = "", change: Change | None = None) -> str:
    """Prepare a snapshot, change it and return its key."""
    key = new_key("active")
    mounts = client.prepare(key, parent)
    if change is not None:
        with mounted(mounts) as top:
            change(top)
    return key


def committed(
    client: SnapshotClient, parent: str = "", change: Change | None = None, labels: Labels = None, name: str = ""
) -> str:
    """Prepare a snapshot, change it, commit it and return its name."""
    name = name or new_key("committed")
    client.commit(active(client, parent, change), name, labels)
    return name


def shown(client: SnapshotClient, parent: str) -> dict[bytes, Node]:
    """Return the tree that a view of a committed snapshot shows."""
    key = new_key("view")
    try:
        with mounted(client.view(key, parent)) as top:
            return tree(top)
    finally:
        client.remove(key)


def tree(top: Path) -> dict[bytes, Node]:
    """Return everything below *top* but modification times."""
    return {path: node._replace(mtime_ns=0) for path, node in snapshot(top).items()}


def check_chain(client: SnapshotClient, plain: Path, *changes: Change) -> str:
    """Commit a chain of snapshots, one for each change. Check each against the plain directory with these changes.

    Returns:
        The name of the last snapshot.
    """
    plain.mkdir()
    name = ""
    for change in changes:
        name = committed(client, name, change)
        change(plain)
        assert shown(client, name) == tree(plain)
    return name
