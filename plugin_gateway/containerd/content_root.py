"""The directory of containerd's content store."""

from __future__ import annotations

import threading
from pathlib import Path

from gearworkers.containerd.client import connected
from gearworkers.errors import NotFound

_CONTENT_PLUGIN = ("io.containerd.content.v1", "content")


class ContentRoot:
    """Asks containerd for the directory once; a containerd with another root must be on another socket.

    Args:
        address: containerd's socket.
    """

    def __init__(self, address: Path) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._found: Path | None = None

    def get(self) -> Path:
        """Return the directory.

        Raises:
            Unavailable: containerd does not answer.
            NotFound: containerd has no content store of its own.
        """
        with self._lock:
            if self._found is None:
                with connected(self._address) as client:
                    root = client.plugin(*_CONTENT_PLUGIN).exports.get("root")
                if not root:
                    raise NotFound(f"containerd at {self._address} has no content directory of its own")
                self._found = Path(root)
            return self._found
