"""A TCP forwarder that simulates a slow or broken network between a node and its remote."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_PIECE_BYTES = 1 << 14


@dataclass
class Link:
    """Forwards its own port to another one; a test can change the faults at any time."""

    port: int
    bytes_per_s: float = 0.0
    """Rate limit of all answers together; 0 for no limit."""
    cut_after_bytes: int = 0
    """Break each connection after this many bytes of answers; 0 for never."""
    first_cut_after_bytes: list[int] = field(default_factory=list)
    """Limits for the next connections, one each; `cut_after_bytes` applies to later ones."""
    passed_bytes: int = 0
    """Bytes of answers forwarded so far."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Remove the rate limit and the byte limit."""
        self.bytes_per_s, self.cut_after_bytes = 0.0, 0

    def forward_answers(self, source: socket.socket, target: socket.socket) -> None:
        """Forward bytes from the target to the client."""
        passed_bytes = 0
        own_cut_after_bytes = self.first_cut_after_bytes.pop(0) if self.first_cut_after_bytes else None
        try:
            while data := source.recv(_PIECE_BYTES):
                if bytes_per_s := self.bytes_per_s:
                    with self._lock:
                        time.sleep(len(data) / bytes_per_s)
                cut_after_bytes = self.cut_after_bytes if own_cut_after_bytes is None else own_cut_after_bytes
                if cut_after_bytes and passed_bytes + len(data) > cut_after_bytes:
                    target.sendall(data[: cut_after_bytes - passed_bytes])
                    break
                target.sendall(data)
                passed_bytes += len(data)
                self.passed_bytes += len(data)
        except OSError:
            pass
        _shut_down(source, target)


@contextmanager
def linked(port: int) -> Iterator[tuple[Link, int]]:
    """Run a link to a port on loopback; yield the link and its own port."""
    link = Link(port)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        accepting = threading.Thread(target=_accept, args=(server, link), daemon=True)
        accepting.start()
        yield link, int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        accepting.join()


def _accept(server: socket.socket, link: Link) -> None:
    while True:
        try:
            near, _ = server.accept()
        except OSError:
            return
        try:
            far = socket.create_connection(("127.0.0.1", link.port))
        except OSError:
            near.close()
            continue
        threading.Thread(target=_forward_requests, args=(near, far, link), daemon=True).start()


def _forward_requests(near: socket.socket, far: socket.socket, link: Link) -> None:
    """Forward bytes from the client to the target, and the answers; close both sockets."""
    with near, far:
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answers = threading.Thread(target=link.forward_answers, args=(far, near), daemon=True)
        answers.start()
        try:
            while data := near.recv(_PIECE_BYTES):
                far.sendall(data)
        except OSError:
            pass
        _shut_down(near, far)
        answers.join()


def _shut_down(*ends: socket.socket) -> None:
    for end in ends:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
