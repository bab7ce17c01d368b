"""What the images and containers of a containerd leave in a stack's root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.support.containerd import connected
from tests.support.stack import Stack

_OF_LAYERS = ("images", "containers", "views")
"""Directories in GEAR_ROOT with one entry for each layer or view."""


def leftovers(stack: Stack, *, objects: bool = True) -> list[str]:
    """Return up to 50 traces of images and containers; the gateway runs.

    Args:
        stack: Only containerd uses it.
        objects: Whether objects count, which a collection removes some seconds after the layers.

    Returns:
        Snapshots as the gateway lists them, directories of layers and views, mounts, staged files and objects.
    """
    with connected(stack.containerd_socket) as client:
        found = [f"snapshot {info.name}" for info in client.list()]
    found += [str(path) for name in _OF_LAYERS for path in (stack.root / name).iterdir()]
    found += [f"mount {path}" for path in mounts_of_layers(stack.root)]
    found += [f"staged {path}" for path in stack.staged()]
    if objects:
        found += [str(path) for path in (stack.root / "public").rglob("*") if path.is_file()]
    return found[:50]


def mounts_of_layers(root: Path) -> Iterator[Path]:
    """Yield the mount points of layers and views below GEAR_ROOT."""
    parents = [root / name for name in _OF_LAYERS]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = Path(line.split()[4])
        if any(parent in point.parents for parent in parents):
            yield point
