"""The directory of containerd's content store."""

from __future__ import annotations

import threading
from pathlib import Path

from gearworkers.containerd.client import connected


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
        """Return the directory; errors as `Client.content_directory`."""
        with self._lock:
            if self._found is None:
                with connected(self._address) as client:
                    self._found = client.content_directory()
            return self._found
