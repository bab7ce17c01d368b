"""HTTP over a Unix socket."""

from __future__ import annotations

import http.client
import os
import socket


class UnixHTTPConnection(http.client.HTTPConnection):
    """A connection to the server that listens on a Unix socket; use and errors as `http.client.HTTPConnection`."""

    def __init__(self, path: str | os.PathLike[str], timeout_s: float) -> None:
        """
        Args:
            path: Path of the socket.
            timeout_s: Longest wait for the connection, and for each send and receive.
        """
        super().__init__("localhost", timeout=timeout_s)
        self._path = os.fspath(path)
        self._timeout_s = timeout_s

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(self._path)
