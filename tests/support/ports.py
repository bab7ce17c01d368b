"""Ports of loopback for servers that are told theirs."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port that nobody listens on, and that nobody is given by chance while this process lives.

    It stays bound. A server that binds it with SO_REUSEADDR, as all do, may listen there nevertheless; the kernel
    gives it to no bind of port 0 and to no outgoing connection.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = int(held.getsockname()[1])
    held.detach()
    return port
