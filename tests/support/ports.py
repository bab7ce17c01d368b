"""Free ports on loopback, for servers that need a port number."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a free TCP port that the kernel assigns to no other socket while this process lives.

    The port stays bound, so the kernel gives it to no bind of port 0 and to no outgoing connection. A server that binds
    it with SO_REUSEADDR, as all do, can still listen on it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    port = int(reserved.getsockname()[1])
    reserved.detach()
    return port
