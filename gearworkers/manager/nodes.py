"""The nodes that use the manager."""

from __future__ import annotations

import time
from collections import OrderedDict

import msgspec

EXPIRY_S = 600.0
"""Time after the last request of a node until it is forgotten."""

MAX_NAME_CHARS = 255
_MAX_NODES = 10_000


class NodeRecord(msgspec.Struct, frozen=True):
    """A node that uses the manager."""

    node: str
    address: str
    joined_s: float
    """Since the epoch."""
    seen_s: float
    """Since the epoch."""


class NodeRegistry:
    """Keeps the nodes in memory: after a restart their next requests fill it again."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[str, NodeRecord] = OrderedDict()

    def seen(self, name: str, address: str) -> None:
        """Record a request of a node."""
        now_s = time.time()
        known = self._nodes.pop(name, None)
        self._nodes[name] = NodeRecord(name, address, known.joined_s if known else now_s, now_s)
        self._forget_expired(now_s)

    def alive(self) -> list[NodeRecord]:
        """Return the nodes that are not expired, by name."""
        self._forget_expired(time.time())
        return sorted(self._nodes.values(), key=lambda node: node.node)

    def _forget_expired(self, now_s: float) -> None:
        while self._nodes:
            oldest = next(iter(self._nodes.values()))
            if oldest.seen_s > now_s - EXPIRY_S and len(self._nodes) <= _MAX_NODES:
                return
            del self._nodes[oldest.node]
