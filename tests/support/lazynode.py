"""A node with an incomplete image and a lazy file server of its own process, fed from a directory that misbehaves.

The directory holds objects and chunks under their digest in hex, and these files, which each request reads:
`delay_s` (before each answer), `away` (nothing answers), `log` (one line a request for objects, written by the source).
Below `documents` it holds documents.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gearworkers.errors import NotFound, Unavailable
from gearworkers.fetch.source import BytesOrLayout, Chunk
from gearworkers.lazyfs.client import LazyStatus, read_status
from gearworkers.lazyfs.server import serve
from gearworkers.mounts.mountinfo import wait_until_mounted
from gearworkers.mounts.overlay import unmount
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.processes import PATIENCE_S

CHUNK_BYTES = 64 << 10


class Shelf:
    """The source directory: what it holds, and how it behaves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    # -- for tests

    def put(self, content: bytes, *, large_bytes: int = 1 << 20) -> bytes:
        """Hold an object, in chunks if it is large; its digest."""
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

    def behave(self, *, delay_s: float = 0.0, away: bool = False) -> None:
        (self.root / "delay_s").write_text(str(delay_s))
        (self.root / "away").unlink(missing_ok=True)
        if away:
            (self.root / "away").touch()

    def spoil(self, digest: bytes) -> None:
        """Wrong bytes of the right length."""
        path = self._file(digest)
        content = path.read_bytes()
        path.write_bytes(bytes(255 - byte for byte in content))

    def requests(self) -> list[str]:
        """``kind digest`` of each, in order."""
        log = self.root / "log"
        return log.read_text().splitlines() if log.exists() else []

    # -- as a source

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        self._asked("fetch", digest)
        content = self._read(digest)
        yield content[: len(content) // 2]
        yield content[len(content) // 2 :]

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, BytesOrLayout]]:
        self._asked("stream", digests[0])
        for digest in digests:
            self._asked("many", digest)
            try:
                yield digest, self._layout(digest) or self._read(digest)
            except NotFound:
                continue

    def layout(self, digest: bytes) -> list[Chunk] | None:
        self._asked("layout", digest)
        return self._layout(digest)

    def document(self, name: str) -> bytes | None:
        self._suffer()
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
        self._asked("chunk", digest)
        return self._read(digest)

    def _asked(self, kind: str, digest: bytes) -> None:
        with open(self.root / "log", "a") as log:
            log.write(f"{kind} {digest.hex()}\n")
        self._suffer()

    def _suffer(self) -> None:
        delay = self.root / "delay_s"
        if delay.exists():
            time.sleep(float(delay.read_text()))
        if (self.root / "away").exists():
            raise Unavailable(f"{self.root} is away")

    def _read(self, digest: bytes) -> bytes:
        try:
            return self._file(digest).read_bytes()
        except FileNotFoundError as exc:
            raise NotFound(f"{digest.hex()} is not in {self.root}") from exc

    def _file(self, digest: bytes) -> Path:
        return self.root / digest.hex()


class LazyNode:
    """GEAR_ROOT, driver, server process and its sources."""

    def __init__(self, root: Path, shelves: int = 1) -> None:
        self.settings = replace(
            Settings(), gear_root=root / "gear", run_dir=root / "run", node="test", fill_delay_s=0.3
        )
        self.shelves = [Shelf(root / f"shelf{number}") for number in range(shelves)]
        self.shelf = self.shelves[0]
        self.driver = GearDriver(self.settings)
        self.driver.prepare()
        self._server: subprocess.Popen[bytes] | None = None

    def pull(self, files: Mapping[str, bytes], id: str = "image") -> None:
        """Have a Gear image of one layer, which names what the first source holds."""
        for content in files.values():
            self.shelf.put(content)
        self.apply(gear_tar(files), id)

    def apply(self, tar: bytes, id: str) -> None:
        self.driver.create(id, "")
        self.driver.apply_diff(id, "", io.BytesIO(tar))

    def run(self, name: str, image: str = "image") -> Path:
        """The root directory of a new container."""
        self.driver.create_read_write(name, image)
        return Path(self.driver.get(name))

    def start(self) -> None:
        """Start the server, and wait until it serves."""
        command = [sys.executable, "-m", "tests.support.lazynode", str(self.settings.gear_root.parent)]
        self._server = subprocess.Popen([*command, *(str(shelf.root) for shelf in self.shelves)])
        wait_until_mounted(self.settings.lazy_mount_path, PATIENCE_S)
        until(lambda: read_status(self.settings.lazyfs_socket) is not None, "the lazy file server answers")

    def kill(self) -> None:
        """SIGKILL the server."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM the server."""
        self._end(signal.SIGTERM)

    def status(self) -> LazyStatus:
        status = read_status(self.settings.lazyfs_socket)
        assert status is not None
        return status

    def close(self) -> None:
        """End all of it, whatever state it is in."""
        self.driver.cleanup()
        self.driver.release()
        if self._server is not None:
            self.kill()
        unmount(self.settings.lazy_mount_path)

    def _end(self, number: int) -> None:
        if self._server is not None:
            self._server.send_signal(number)
            self._server.wait(PATIENCE_S)
            self._server = None


@contextmanager
def lazy_node(root: Path, shelves: int = 1) -> Iterator[LazyNode]:
    """A node whose server runs."""
    node = LazyNode(root, shelves)
    try:
        node.start()
        yield node
    finally:
        node.close()


def gear_tar(files: Mapping[str, bytes]) -> bytes:
    """A layer that names the contents of *files* instead of holding them."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            info.pax_headers = {"GEAR.sha256": hashlib.sha256(content).hexdigest(), "GEAR.size": str(len(content))}
            tar.addfile(info)
    return sink.getvalue()


def until(is_so: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as it is so."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        time.sleep(0.01)


def _main() -> None:
    root = Path(sys.argv[1])
    settings = replace(Settings(), gear_root=root / "gear", run_dir=root / "run", fill_delay_s=0.3)
    serve(settings, [Shelf(Path(path)) for path in sys.argv[2:]])


if __name__ == "__main__":
    os.chdir("/")
    _main()
