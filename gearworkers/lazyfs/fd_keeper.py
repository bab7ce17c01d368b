"""The keeper: a process that only holds the lazy file system's descriptor, so that a crash of the server loses nothing.

The server hands it the descriptor of /dev/fuse after mounting; a successor takes it from there. The keeper exits when
the file system has no mount left. The server watches it and starts another one when it dies: the file system is lost
only if both die at once.

    server → keeper    b"take"           keeper → server    b"none", or b"here" with the descriptor
    server → keeper    b"keep" with the descriptor           b"kept"

The connection stays open afterwards: its end shows the server that the keeper died.
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


class FdKeeper:
    """The server's connection to the keeper; starts a keeper if none runs.

    Raises:
        Unavailable: The keeper cannot be started.
    """

    def __init__(self, path: Path) -> None:
        self._socket = _connected(path)

    def take(self) -> int | None:
        """Return a copy of the kept descriptor; None if there is none."""
        self._socket.send(b"take")
        message, descriptors, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, 1)
        if message == b"here" and descriptors:
            os.set_inheritable(descriptors[0], False)
            return descriptors[0]
        return None

    def keep(self, fuse_fd: int) -> None:
        """Make the keeper hold *fuse_fd* instead of its current descriptor."""
        socket.send_fds(self._socket, [b"keep"], [fuse_fd])
        if self._socket.recv(_MESSAGE_BYTES) != b"kept":
            raise Unavailable("the keeper of the lazy file system died right after its start")

    def is_dead(self) -> bool:
        """Return whether the keeper has exited."""
        poll = select.poll()  # select() fails above descriptor 1023, and a server has thousands
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the connection; the keeper runs on."""
        self._socket.close()


def hold(path: Path) -> None:
    """Run as the keeper, a daemon that listens at *path*, until its file system has no mount left."""
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
                        return  # the file system has no mount left
                elif fd == self._listener.fileno():
                    client, _ = self._listener.accept()
                    self._clients[client.fileno()] = client
                    self._poll.register(client, select.POLLIN)
                else:
                    self._serve(self._clients[fd])
            if self._fuse_fd < 0 and not self._clients:
                return  # no descriptor and no client

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
    """Connect to the keeper; start one if none answers."""
    for attempt in range(2):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            client.connect(os.fspath(path))
            return client
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
        if not attempt:
            _start(path)
    raise Unavailable(f"cannot start the keeper of the lazy file system at {path}")


def _start(path: Path) -> None:
    """Start the keeper in its own session, which outlives the server's; it listens when this returns."""
    command = [sys.executable, "-m", "gearworkers.lazyfs.fd_keeper", os.fspath(path)]
    started = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
    if started.returncode:
        last_line = started.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Unavailable(f"cannot start the keeper of the lazy file system at {path}: {' '.join(last_line)}")


def _become_daemon() -> None:
    """Continue in a child process whose parent exits."""
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null_fd = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null_fd, fd)


if __name__ == "__main__":
    hold(Path(sys.argv[1]))
