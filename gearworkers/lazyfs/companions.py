"""Companions of a missing file: files that a container without a start-up profile will probably open next.

Without a profile, each first open of a file costs a round trip. So each miss brings companions, in one request and
after the missing file itself:

- for a program or library, the libraries that it needs, and those that they need;
- for another file, the files with the same suffix that precede and follow it in the layer's tar, within a budget. Tars
  are in the order of directories, and a program that has read one module mostly reads its neighbours.

Of a large library only the parts that the dynamic linker reads are fetched.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import structlog

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError
from gearworkers.fetch.download import Download
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.futures import completed, then
from gearworkers.fetch.prefetch import Arrived, PrefetchObject
from gearworkers.fetch.priority_pool import Priority
from gearworkers.layers.file_names import NamedObject, named_objects
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs import elf
from gearworkers.util.open_file import ObjectFile

_log = structlog.get_logger(__name__)

_AFTER_BYTES = 128 << 10
_BEFORE_BYTES = 32 << 10
_MAX_NEIGHBOUR_BYTES = 64 << 10
"""Larger files are no neighbours: one of them would use up the budget."""
_WINDOW_S = 300.0
"""Seconds without a miss after which the names of an image's files are forgotten."""
_MAX_IMAGES = 8
_PROGRAM_DIRECTORIES = (b"bin", b"sbin")
_LIBRARY_SUFFIX = b".so"


FetchSoon = Callable[[Sequence[PrefetchObject], Arrived | None], None]
"""`Prefetcher.fetch_soon`."""


class _Place(NamedTuple):
    """A file among the files of its layer with the same suffix, in the order of the tar."""

    files: list[NamedObject]
    number: int

    @property
    def file(self) -> NamedObject:
        return self.files[self.number]

    def neighbours(self) -> Iterator[NamedObject]:
        """Yield the files after this one, then those before it, the nearest first, within the budgets."""
        yield from _within(_AFTER_BYTES, islice(self.files, self.number + 1, None))
        yield from _within(_BEFORE_BYTES, (self.files[number] for number in range(self.number - 1, -1, -1)))


@dataclass(slots=True)
class _Image:
    """The named files of an image."""

    places: dict[bytes, _Place] = field(default_factory=dict)
    """By digest."""
    libraries: dict[bytes, NamedObject] = field(default_factory=dict)
    """By file name, and by each name that results from it without the last numbers of its version."""
    seen: set[bytes] = field(default_factory=set)
    """Digests of the files whose companions were fetched."""
    last_miss_s: float = field(default_factory=time.monotonic)


class Companions:
    """Fetches companions in a thread of its own; any thread may call all methods, and none blocks.

    Args:
        layers: The node's layers.
        store: Their objects.
        fetcher: Holds the downloads.
        fetch_soon: Fetches objects in the background, in order.
    """

    def __init__(self, layers: LayerStore, store: ObjectStore, fetcher: Fetcher, fetch_soon: FetchSoon) -> None:
        self._layers = layers
        self._store = store
        self._fetcher = fetcher
        self._fetch_soon = fetch_soon
        self._images: dict[str, _Image] = {}
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="companions", daemon=True).start()

    def begin(self, image: str) -> None:
        """From now on, fetch companions for the image with this topmost layer: it has no profile."""
        self._calls.put(partial(self._begin, image))

    def missed(self, digest: bytes) -> None:
        """Fetch the companions of an object that a container waits for."""
        if self._images:
            self._calls.put(partial(self._missed, digest))

    def close(self) -> None:
        """Let the thread end."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except GearError as exc:
                _log.info("no companions of a file are fetched", error=str(exc))
            except Exception:
                _log.exception("cannot fetch the companions of a file")

    def _begin(self, id: str) -> None:
        now_s = time.monotonic()
        recent = {known: image for known, image in self._images.items() if now_s - image.last_miss_s < _WINDOW_S}
        if id not in recent and len(recent) < _MAX_IMAGES:
            recent[id] = _Image()
            for layer in self._layers.layer_chain(id):
                if not layer.complete:
                    _add_files(recent[id], named_objects(self._layers.directory(layer)))
        self._images = recent

    def _missed(self, digest: bytes) -> None:
        for image in self._images.values():
            place = image.places.get(digest)
            if place is None or digest in image.seen:
                continue
            image.seen.add(digest)
            image.last_miss_s = time.monotonic()
            if _is_program(place.file.path):
                self._look_into(image, place.file)
            else:
                self._fetch(place.neighbours())

    def _fetch(self, files: Iterable[NamedObject], arrived: Arrived | None = None) -> None:
        parts = [
            PrefetchObject(file.digest, file.size_bytes, ((0, elf.HEAD_BYTES),))
            for file in files
            if not self._fetcher.is_here(file.digest)
        ]
        if parts:
            self._fetch_soon(parts, arrived)

    # -- libraries

    def _look_into(self, image: _Image, file: NamedObject) -> None:
        """Fetch the libraries that a file needs, as soon as its beginning has arrived."""
        opened: Future[Download | None] = completed(None)
        if not self._fetcher.is_here(file.digest):
            opened = self._fetcher.open(file.digest, file.size_bytes, Priority.READ_AHEAD)
        names: Future[list[bytes]] = then(opened, lambda download: self._needed(file, download))
        names.add_done_callback(lambda done: self._calls.put(lambda: self._fetch_libraries(image, done.result())))

    def _needed(self, file: NamedObject, download: Download | None) -> Future[list[bytes]]:
        """Return the names of the libraries that a file needs; fetch the loaded parts of a large one."""
        source = download or ObjectFile(self._store.open(file.digest))

        def read(part: elf.Part) -> Future[bytes]:
            found = source.read(*part)
            return found if isinstance(found, Future) else completed(found)

        def with_head(head: bytes) -> Future[list[bytes]]:
            program = elf.parse_head(head)
            if program is None:
                return completed([])
            if download is not None:
                self._fetch_soon([PrefetchObject(file.digest, file.size_bytes, tuple(program.loaded()))], None)
            return then(read(program.dynamic), partial(with_dynamic, program))

        def with_dynamic(program: elf.Program, data: bytes) -> Future[list[bytes]]:
            needed = elf.parse_dynamic(program, data)
            if needed is None:
                return completed([])
            return then(read(needed.strings), partial(elf.names_of, needed))

        return then(read(elf.Part(0, elf.HEAD_BYTES)), with_head)

    def _fetch_libraries(self, image: _Image, names: Iterable[bytes]) -> None:
        found = (image.libraries[name] for name in names if name in image.libraries)
        unseen = {file.digest: file for file in found if file.digest not in image.seen}
        image.seen.update(unseen)
        for file in unseen.values():
            if self._fetcher.is_here(file.digest):
                self._look_into(image, file)
        self._fetch(unseen.values(), lambda digest: self._calls.put(partial(self._look_into, image, unseen[digest])))


def _add_files(image: _Image, files: Iterable[NamedObject]) -> None:
    """Add the files of one layer; files of layers above take precedence."""
    groups: dict[bytes, list[NamedObject]] = {}
    for file in files:
        name = file.path.rpartition(b"/")[2]
        group = groups.setdefault(_suffix(name), [])
        image.places.setdefault(file.digest, _Place(group, len(group)))
        group.append(file)
        if _LIBRARY_SUFFIX in name:
            for known in _library_names(name):
                image.libraries.setdefault(known, file)


def _within(budget_bytes: int, files: Iterable[NamedObject]) -> Iterator[NamedObject]:
    for file in files:
        if file.size_bytes > _MAX_NEIGHBOUR_BYTES:
            continue
        budget_bytes -= file.size_bytes
        if budget_bytes < 0:
            return
        yield file


def _suffix(name: bytes) -> bytes:
    return name.rpartition(b".")[2] if b"." in name else b""


def _library_names(name: bytes) -> Iterator[bytes]:
    """Yield the names under which programs may ask for a library: libz.so.1.2.13, libz.so.1.2, libz.so.1, libz.so."""
    while name:
        yield name
        name, _, number = name.rpartition(b".")
        if not number.isdigit():
            return


def _is_program(path: bytes) -> bool:
    directory, _, name = path.rpartition(b"/")
    return directory.rpartition(b"/")[2] in _PROGRAM_DIRECTORIES or name.endswith(_LIBRARY_SUFFIX) or b".so." in name
