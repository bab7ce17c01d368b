"""A node with an incomplete image, and a lazy file server in a process that fetches from a faulty source.

The source is a directory. It contains objects and chunks under their digests in hex, documents below `documents`, and
three control files: `delay_s` (time before each answer), `unreachable` (all requests fail while it exists) and `log`
(the source appends a line for each request for objects).
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from gearworkers.errors import NotFound, Unavailable
from gearworkers.fetch.source import BytesOrLayout, Chunk
from gearworkers.lazyfs.client import LazyStatus, read_status
from gearworkers.lazyfs.server import serve
from gearworkers.mounts.mountinfo import wait_until_mounted
from gearworkers.mounts.overlay import unmount
from gearworkers.settings import Settings
from gearworkers.util import syscalls
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.processes import PATIENCE_S, wait_until

CHUNK_BYTES = 64 << 10
MNT_FORCE = 1
SERVER_LIFE_S = 240.0
"""A server that runs longer is taken for one that does not answer; less than pytest's time limit."""


class DirectorySource:
    """A source with its contents and simulated faults in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    # -- for tests

    def put(self, content: bytes, *, large_bytes: int = 1 << 20) -> bytes:
        """Store an object, in chunks if it is large; return its digest."""
        digest = hashlib.sha256(content).digest()
        if len(content) < large_bytes:
            self._file(digest).write_bytes(content)
            return digest
        pieces = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
        digests = [hashlib.sha256(piece).digest() for piece in pieces]
        for piece, piece_digest in zip(pieces, digests, strict=True):
            self._file(piece_digest).write_bytes(piece)
        lines = [f"{len(piece)} {one.hex()}" for piece, one in zip(pieces, digests, strict=True)]
        self._file(digest).with_suffix(".layout").write_text("\n".join(lines))
        return digest

    def set_faults(self, *, delay_s: float = 0.0, unreachable: bool = False) -> None:
        """Set the simulated faults; without arguments there are none."""
        (self.root / "delay_s").write_text(str(delay_s))
        (self.root / "unreachable").unlink(missing_ok=True)
        if unreachable:
            (self.root / "unreachable").touch()

    def corrupt(self, digest: bytes) -> None:
        """Replace the content by wrong bytes of the same length."""
        path = self._file(digest)
        content = path.read_bytes()
        path.write_bytes(bytes(255 - byte for byte in content))

    def requests(self) -> list[str]:
        """Return the requests so far, in order, each as ``KIND DIGEST``."""
        log = self.root / "log"
        return log.read_text().splitlines() if log.exists() else []

    # -- as a source

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        self._log_request("fetch", digest)
        content = self._read(digest)
        yield content[: len(content) // 2]
        yield content[len(content) // 2 :]

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, BytesOrLayout]]:
        self._log_request("stream", digests[0])
        for digest in digests:
            self._log_request("many", digest)
            try:
                yield digest, self._layout(digest) or self._read(digest)
            except NotFound:
                continue

    def layout(self, digest: bytes) -> list[Chunk] | None:
        self._log_request("layout", digest)
        return self._layout(digest)

    def document(self, name: str) -> bytes | None:
        self._simulate_faults()
        path = self.root / "documents" / name
        return path.read_bytes() if path.exists() else None

    def _layout(self, digest: bytes) -> list[Chunk] | None:
        path = self._file(digest).with_suffix(".layout")
        if not path.exists():
            return None
        chunks: list[Chunk] = []
        at = 0
        for line in path.read_text().splitlines():
            size, name = line.split()
            chunks.append(Chunk(at, int(size), bytes.fromhex(name)))
            at += int(size)
        return chunks

    def chunk(self, digest: bytes) -> bytes:
        self._log_request("chunk", digest)
        return self._read(digest)

    def _log_request(self, kind: str, digest: bytes) -> None:
        with open(self.root / "log", "a") as log:
            log.write(f"{kind} {digest.hex()}\n")
        self._simulate_faults()

    def _simulate_faults(self) -> None:
        delay = self.root / "delay_s"
        if delay.exists():
            time.sleep(float(delay.read_text()))
        if (self.root / "unreachable").exists():
            raise Unavailable(f"{self.root} is unreachable")

    def _read(self, digest: bytes) -> bytes:
        try:
            return self._file(digest).read_bytes()
        except FileNotFoundError as exc:
            raise NotFound(f"{digest.hex()} is not in {self.root}") from exc

    def _file(self, digest: bytes) -> Path:
        return self.root / digest.hex()


class LazyNode:
    """A GEAR_ROOT with a driver, a server process and its sources."""

    def __init__(self, root: Path, sources: int = 1) -> None:
        self.settings = replace(
            Settings(), gear_root=root / "gear", run_dir=root / "run", node="test", fill_delay_s=0.3
        )
        self.sources = [DirectorySource(root / f"source{number}") for number in range(sources)]
        self.source = self.sources[0]
        self.driver = GearDriver(self.settings)
        self.driver.prepare()
        self._server: subprocess.Popen[bytes] | None = None

    def pull(self, files: Mapping[str, bytes], id: str = "image", links: Mapping[str, str] | None = None) -> None:
        """Store *files* in the first source and apply a Gear layer that names them, and has symbolic *links*."""
        for content in files.values():
            self.source.put(content)
        self.apply(gear_tar(files, links), id)

    def apply(self, tar: bytes, id: str) -> None:
        self.driver.create(id, "")
        self.driver.apply_diff(id, "", io.BytesIO(tar))

    def run(self, name: str, image: str = "image") -> Path:
        """Create and mount a container; return its root directory."""
        self.driver.create_read_write(name, image)
        return Path(self.driver.get(name))

    def start(self) -> None:
        """Start the server; return when it answers."""
        command = [sys.executable, "-m", "tests.support.lazynode", str(self.settings.gear_root.parent)]
        self._server = subprocess.Popen([*command, *(str(source.root) for source in self.sources)])
        threading.Thread(target=self._watch, args=(self._server,), daemon=True).start()
        wait_until_mounted(self.settings.lazy_mount_path, PATIENCE_S)
        wait_until(lambda: read_status(self.settings.lazyfs_socket) is not None, "the lazy file server answers")

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server with SIGTERM."""
        self._end(signal.SIGTERM)

    def status(self) -> LazyStatus:
        status = read_status(self.settings.lazyfs_socket)
        assert status is not None
        return status

    def close(self) -> None:
        """Unmount everything and end the server, in any state."""
        self.driver.cleanup()
        self.driver.release()
        if self._server is not None:
            self.kill()
        unmount(self.settings.lazy_mount_path)

    def _end(self, number: int) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.send_signal(number)
            server.wait(PATIENCE_S)

    def _watch(self, server: subprocess.Popen[bytes]) -> None:
        """Abort the file system if the server exits by itself or runs too long, so that the test fails.

        A test that waits for the server's answer waits in the kernel, where pytest's time limit does not interrupt it.
        """
        try:
            server.wait(SERVER_LIFE_S)
        except subprocess.TimeoutExpired:
            server.send_signal(signal.SIGUSR1)  # prints the stacks of its threads
            time.sleep(1.0)
        if self._server is server:
            print(f"aborting the lazy file system: its server has exit code {server.poll()}", file=sys.stderr)
            with suppress(OSError):
                syscalls.umount2(self.settings.lazy_mount_path, MNT_FORCE)


@contextmanager
def lazy_node(root: Path, sources: int = 1) -> Iterator[LazyNode]:
    """Run a node with its server."""
    node = LazyNode(root, sources)
    try:
        node.start()
        yield node
    finally:
        node.close()


def gear_tar(files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    """Return the tar of a Gear layer that names the contents of *files*, and has symbolic *links*, path to target."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            info.pax_headers = {"GEAR.sha256": hashlib.sha256(content).hexdigest(), "GEAR.size": str(len(content))}
            tar.addfile(info)
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return sink.getvalue()


def _main() -> None:
    faulthandler.register(signal.SIGUSR1)
    root = Path(sys.argv[1])
    settings = replace(Settings(), gear_root=root / "gear", run_dir=root / "run", fill_delay_s=0.3)
    serve(settings, [DirectorySource(Path(path)) for path in sys.argv[2:]])


if __name__ == "__main__":
    os.chdir("/")
    _main()
