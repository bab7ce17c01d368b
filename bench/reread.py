"""Second reads of files that were fetched in a running container of a Gear image, against overlay2."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from bench.frame import Figure, Pairs, Side, both_sides, drop_caches, fresh_disk, is_fetching_done
from gearworkers.images.convert_local import convert_locally
from gearworkers.images.plan import plan_conversion
from gearworkers.settings import RemoteSettings, Settings
from tests.support import rootfs
from tests.support.images import Image, tar_of
from tests.support.processes import wait_until
from tests.support.registry import Registry

GOAL = 1.031
"""At least 0.97 of overlay2's throughput."""
PASSES = 15
COLD_PASSES = 5
_SMALL_FILES = 2000
_SMALL_BYTES = 20_000
_LARGE_BYTES = 128 << 20
_READER = """
import os, sys, time
small = sorted("/data/small/" + name for name in os.listdir("/data/small"))
buffer = bytearray(131072)
large = os.open("/data/large", os.O_RDONLY)
def read(fd):
    while os.readv(fd, [buffer]):
        pass
def read_path(path):
    fd = os.open(path, os.O_RDONLY)
    read(fd)
    os.close(fd)
def reread_large():
    os.lseek(large, 0, os.SEEK_SET)
    read(large)
def close_large():
    os.close(large)
work = {"small": lambda: [read_path(path) for path in small], "anew": lambda: read_path("/data/large"),
        "still open": reread_large, "close": close_large}
for line in sys.stdin:
    begin = time.monotonic()
    work[line.strip()]()
    print(time.monotonic() - begin, flush=True)
"""

Ask = Callable[[str], float]
"""Makes the reader in a container do some work; returns the seconds it took."""


def reread() -> list[Figure]:
    """Measure rereads of small files, and of a large file, first open since its fetch, then opened again."""
    with fresh_disk() as disk, both_sides(disk) as sides, ExitStack() as stack:
        image = _image()
        readers = [(side, stack.enter_context(_reader(side, _load_image(side, disk, image)))) for side in sides]
        for side, ask in readers:
            ask("small")
            ask("still open")
            if side.stack is not None:
                wait_until(lambda side=side: is_fetching_done(side), "all files have arrived", 120.0)  # type: ignore[misc]
        figures = [
            _warm(readers, "small", f"reread of {_SMALL_FILES} small files, warm, s"),
            _warm(readers, "still open", "reread of 128 MB that are still open, warm, s"),
        ]
        for _, ask in readers:
            ask("close")
        figures += [
            _warm(readers, "anew", "reread of 128 MB opened anew, warm, s"),
            _cold(readers, "small", f"reread of {_SMALL_FILES} small files, cold, s"),
            _cold(readers, "anew", "reread of 128 MB opened anew, cold, s"),
            _warm(readers, "anew", "reread of 128 MB opened anew, warm after cold, s"),
        ]
    return figures


def _warm(readers: list[tuple[Side, Ask]], work: str, text: str) -> Figure:
    pairs = Pairs()
    for turn in range(PASSES):
        for side, ask in readers if turn % 2 else reversed(readers):
            ask(work)
            pairs.add(side, ask(work))
    return pairs.figure(text, GOAL)


def _cold(readers: list[tuple[Side, Ask]], work: str, text: str) -> Figure:
    pairs = Pairs()
    for turn in range(COLD_PASSES):
        for side, ask in readers if turn % 2 else reversed(readers):
            drop_caches()
            pairs.add(side, ask(work))
    return pairs.figure(text, GOAL)


def _image() -> Image:
    """Return an image of Debian and a layer of files that are in no other image."""
    noise = hashlib.shake_256(b"reread").digest(_LARGE_BYTES)
    files = [("data/large", noise)]
    for number in range(_SMALL_FILES):
        at = number * _SMALL_BYTES
        files.append((f"data/small/{number:04}", noise[at : at + _SMALL_BYTES]))
    return Image((rootfs.debian().read_bytes(), tar_of(files)), compression="")


def _load_image(side: Side, disk: Path, image: Image) -> str:
    """Load *image*; on gearworkers as a Gear image without contents. Return its name."""
    archive = disk / "image.tar"
    if not archive.exists():
        archive.write_bytes(image.saved("reread:1"))
    if side.stack is None:
        side.dockerd.docker("load", "-i", str(archive))
        return "reread:1"
    remote = disk / "remote"
    remote.mkdir()
    side.stack.set(GEAR_REMOTE=str(remote), GEAR_FILL_DELAY_S="1", GEAR_PROFILE_WINDOW_S="0")
    side.stack.stop("lazyfs")
    side.stack.start("lazyfs")
    registry = Registry(disk / "registry")
    registry.start()
    try:
        settings = replace(Settings(), remote=RemoteSettings(url=str(remote)))
        target = f"{registry.host}/reread:gear"
        convert_locally(
            settings, plan_conversion(settings.registry, f"docker-archive:{archive}", target), 2, lambda *_: None
        )
        side.dockerd.docker("pull", target)
    finally:
        registry.stop()
    return target


@contextmanager
def _reader(side: Side, image: str) -> Iterator[Ask]:
    """Run a container that reads on demand."""
    container = side.dockerd.run(image, "sleep", "100000", options=("-d",))
    command = ("exec", "-i", container, "python3", "-u", "-c", _READER)
    with side.dockerd.popen(*command) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(work: str) -> float:
            stdin.write(work.encode() + b"\n")
            stdin.flush()
            return float(stdout.readline())

        yield ask
        stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
