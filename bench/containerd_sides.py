"""Two containerds on one fresh disk: gearworkers' snapshotter and overlayfs, each with a Docker on its image store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.containerd_host import Containerd, ContainerdDocker, environ, stack_for_containerd
from tests.support.disk import tree_bytes
from tests.support.stack import Stack

_PEER = "overlayfs"
_DIFFERS = 'plugins."io.containerd.service.v1.diff-service"'


@dataclass
class ContainerdSide:
    """A containerd, a Docker on it, and for gearworkers the stack that serves it."""

    containerd: Containerd
    docker: ContainerdDocker
    peer: str = _PEER
    """The snapshotter of a side without a stack."""

    @property
    def is_ours(self) -> bool:
        """Whether this is gearworkers."""
        return self.containerd.stack is not None

    @property
    def snapshotter(self) -> str:
        """The snapshotter's name in containerd."""
        return "gear" if self.is_ours else self.peer

    @property
    def data_root(self) -> Path:
        """The directory of the layers, without containerd's content store."""
        stack = self.containerd.stack
        return stack.root if stack else self.containerd.directory / f"root/io.containerd.snapshotter.v1.{self.peer}"

    def stored_bytes(self) -> int:
        """Return the bytes on disk of the layers and their metadata, without containerd's content store."""
        os.sync()
        return tree_bytes(self.data_root)


def erofs_side(peer: ContainerdSide) -> ContainerdSide | None:
    """Return the side of the peer's EROFS snapshotter; None if containerd or this host does not have it."""
    has_erofs = peer.containerd.version >= (2, 1) and shutil.which("mkfs.erofs", path=environ()["PATH"])
    return replace(peer, peer="erofs") if has_erofs else None


@contextmanager
def containerd_sides(
    disk: Path, turn: int = 0, docker: bool = False
) -> Iterator[tuple[ContainerdSide, ContainerdSide]]:
    """Run both sides with empty roots; yield gearworkers first in even turns, the peer first in odd ones.

    Args:
        disk: Where the roots are made.
        turn: Part of the directories' names.
        docker: Start the dockerds too.
    """
    with ExitStack() as stops:
        stack = stops.enter_context(stack_for_containerd(disk / f"stack{turn}", f"ours{turn}"))
        ours, peer = (_side(disk / f"{name}{turn}", of) for name, of in (("ours", stack), ("peer", None)))
        for side in (ours, peer):
            stops.callback(side.containerd.stop)
            side.containerd.start()
            if docker:
                stops.callback(side.docker.stop)
                side.docker.start()
        yield (peer, ours) if turn % 2 else (ours, peer)


def _side(directory: Path, stack: Stack | None) -> ContainerdSide:
    containerd = Containerd(directory, stack)
    if stack is None and containerd.version >= (2, 1):
        containerd.add_settings(_DIFFERS, 'default = ["erofs", "walking"]')
    return ContainerdSide(containerd, ContainerdDocker(containerd))
