"""Which nodes use the manager."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Annotated

import msgspec

LIVES_S = 600.0
"""So long after it was last heard of a node is forgotten."""

MOST_NODE_CHARS = 255
_MOST_NODES = 10_000


class Joining(msgspec.Struct, frozen=True):
    """What a node says of itself."""

    node: Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_NODE_CHARS)]


class Node(msgspec.Struct, frozen=True):
    """One node."""

    node: str
    address: str
    joined_s: float
    """Since the epoch."""
    seen_s: float
    """Since the epoch."""


class Nodes:
    """In memory: whoever lives is heard of again."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[str, Node] = OrderedDict()

    def seen(self, name: str, address: str) -> Node:
        """Note that a node is there."""
        now_s = time.time()
        known = self._nodes.pop(name, None)
        node = Node(name, address, known.joined_s if known else now_s, now_s)
        self._nodes[name] = node
        self._forget(now_s)
        return node

    def alive(self) -> list[Node]:
        """Those heard of lately, by name."""
        self._forget(time.time())
        return sorted(self._nodes.values(), key=lambda node: node.node)

    def _forget(self, now_s: float) -> None:
        while self._nodes:
            oldest = next(iter(self._nodes.values()))
            if oldest.seen_s > now_s - LIVES_S and len(self._nodes) <= _MOST_NODES:
                return
            del self._nodes[oldest.node]
