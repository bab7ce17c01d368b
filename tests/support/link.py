"""A TCP connection that misbehaves as a network between a node and its remote can."""

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
    """Forwards its own port to another one; the treatment of answers can change at any time."""

    port: int
    bytes_per_s: float = 0.0
    """Rate limit of all answers together; 0 for no limit."""
    cut_after_bytes: int = 0
    """Each connection is broken when so many bytes of answers have passed; 0 for never."""
    first_cut_after_bytes: list[int] = field(default_factory=list)
    """Limits for the next connections, one each; `cut_after_bytes` applies to those after them."""
    passed_bytes: int = 0
    """Of answers, since the beginning."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def heal(self) -> None:
        """Do nothing to anything."""
        self.bytes_per_s, self.cut_after_bytes = 0.0, 0

    def _answers(self, source: socket.socket, target: socket.socket) -> None:
        """Forward the far end's bytes."""
        passed_bytes = 0
        own_cut_after_bytes = self.first_cut_after_bytes.pop(0) if self.first_cut_after_bytes else None
        try:
            while data := source.recv(_PIECE_BYTES):
                if self.bytes_per_s:
                    with self._lock:
                        time.sleep(len(data) / self.bytes_per_s)
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
    """A link to the port *port* of loopback, and its own port, while the context lasts."""
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
        threading.Thread(target=_requests, args=(near, far, link), daemon=True).start()


def _requests(near: socket.socket, far: socket.socket, link: Link) -> None:
    """Forward the near end's bytes and the answers; close both."""
    with near, far:
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answers = threading.Thread(target=link._answers, args=(far, near), daemon=True)
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
