"""A process that does nothing but hold the lazy file system's descriptor, so that no crash of the server ends it.

The server gives it the descriptor of /dev/fuse after mounting; a successor takes it from there. It ends itself when
the file system has no mount left. The server watches it and starts another one when it dies: the file system is lost
only if both die at once.

    server → keeper    b"take"           keeper → server    b"none", or b"here" with the descriptor
    server → keeper    b"keep" with the descriptor           b"kept"

The connection stays open afterwards: its end tells the server that the keeper died.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from pathlib import Path

from gearworkers.errors import Unavailable

_MESSAGE_BYTES = 16


class Keeper:
    """The server's side: one connection to the keeper, which is started if there is none.

    Raises:
        Unavailable: It could not be started.
    """

    def __init__(self, path: Path) -> None:
        self._socket = _connected(path)

    def take(self) -> int | None:
        """The descriptor that is kept, if there is one; it stays kept."""
        self._socket.send(b"take")
        message, descriptors, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, 1)
        if message == b"here" and descriptors:
            os.set_inheritable(descriptors[0], False)
            return descriptors[0]
        return None

    def keep(self, fuse_fd: int) -> None:
        """Have it hold *fuse_fd* instead of what it held."""
        socket.send_fds(self._socket, [b"keep"], [fuse_fd])
        if self._socket.recv(_MESSAGE_BYTES) != b"kept":
            raise Unavailable("the keeper of the lazy file system died at once")

    def is_dead(self) -> bool:
        """Whether the keeper has ended."""
        poll = select.poll()  # it takes any descriptor, and a server has thousands
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Let go; the keeper goes on."""
        self._socket.close()


def hold(path: Path) -> None:
    """Be the keeper, listening at *path*, until the file system it was given has no mount left; a daemon."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen()
        _become_daemon()
        _Holder(listener).run()


class _Holder:
    """The keeper's loop."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._clients: dict[int, socket.socket] = {}
        self._fuse_fd = -1
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def run(self) -> None:
        while True:
            for fd, events in self._poll.poll():
                if fd == self._fuse_fd:
                    if events & select.POLLERR:
                        return  # its last mount is gone
                elif fd == self._listener.fileno():
                    client, _ = self._listener.accept()
                    self._clients[client.fileno()] = client
                    self._poll.register(client, select.POLLIN)
                else:
                    self._serve(self._clients[fd])
            if self._fuse_fd < 0 and not self._clients:
                return  # nothing is held, for nobody

    def _serve(self, client: socket.socket) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(client, _MESSAGE_BYTES, 1)
            if message == b"take" and self._fuse_fd >= 0:
                socket.send_fds(client, [b"here"], [self._fuse_fd])
            elif message == b"take":
                client.send(b"none")
            elif message == b"keep" and descriptors:
                self._replace(descriptors[0])
                client.send(b"kept")
            else:
                self._drop(client)
        except OSError:
            self._drop(client)

    def _replace(self, fuse_fd: int) -> None:
        if self._fuse_fd >= 0:
            self._poll.unregister(self._fuse_fd)
            os.close(self._fuse_fd)
        self._fuse_fd = fuse_fd
        self._poll.register(fuse_fd, 0)

    def _drop(self, client: socket.socket) -> None:
        self._poll.unregister(client)
        del self._clients[client.fileno()]
        client.close()


def _connected(path: Path) -> socket.socket:
    """A connection to the keeper; it is started if none answers."""
    for attempt in range(2):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            client.connect(os.fspath(path))
            return client
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
        if not attempt:
            _start(path)
    raise Unavailable(f"the keeper of the lazy file system did not start at {path}")


def _start(path: Path) -> None:
    """Run it in a session of its own, so that what ends the server's does not end it; it listens on return."""
    command = [sys.executable, "-m", "gearworkers.lazyfs.fd_keeper", os.fspath(path)]
    started = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
    if started.returncode:
        told = started.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Unavailable(f"the keeper of the lazy file system did not start at {path}: {' '.join(told)}")


def _become_daemon() -> None:
    """Go on in a child that nobody waits for."""
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null_fd = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null_fd, fd)


if __name__ == "__main__":
    hold(Path(sys.argv[1]))
