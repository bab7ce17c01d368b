"""Companions of a missing file: files that a container without a start-up profile will probably open next.

Without a profile, each first open of a file costs a round trip. So each miss brings companions, in one request and
after the missed file itself:

- for a program or library, the libraries that it needs, and those that they need; for a script, its interpreter, and
  for a shell script also the programs that its text names;
- for another file, and for a plugin (a library without a version in its name), the block of files around it, as in a
  large object that is read at random. The files of a layer with the same suffix count as one object, in the order of
  its tar. Tars are in the order of directories, and a program that has read one module mostly reads its neighbours.

The programs that an image's command names are fetched as soon as the image is pulled, and with them a few files that
most containers read. Of a large program or library only the parts that the dynamic linker reads are fetched.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial

import structlog

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError
from gearworkers.fetch.download import Download
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.futures import completed, then
from gearworkers.fetch.prefetch import Arrived, PrefetchObject
from gearworkers.fetch.priority_pool import Priority
from gearworkers.layers.file_names import NamedObject, named_files
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs import elf, scripts
from gearworkers.lazyfs.image_files import STARTUP_FILES, ImageFiles, LayerFiles, Neighbour
from gearworkers.util.open_file import ObjectFile

_log = structlog.get_logger(__name__)

_WINDOW_S = 300.0
"""Seconds without a miss or a new image after which the names of all files are forgotten."""
_MAX_IMAGES = 8
_MAX_PROGRAMS = 32
"""Limit of the programs that one command or script brings."""

FetchSoon = Callable[[Sequence[PrefetchObject], Arrived | None], None]
"""`Prefetcher.fetch_soon`."""


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
        self._images: dict[str, ImageFiles] = {}
        """By topmost layer; the oldest first."""
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="companions", daemon=True).start()

    def begin(self, image: str, command: str) -> None:
        """From now on, fetch companions for the image with this topmost layer: it has no profile.

        Args:
            image: The topmost layer.
            command: Names the programs that the image's containers run first, if known.
        """
        self._calls.put(partial(self._begin, image, command))

    def missed(self, digest: bytes) -> None:
        """Fetch the companions of an object that a container waits for."""
        if self._images:
            self._calls.put(partial(self._missed, digest))

    def close(self) -> None:
        """Let the thread end."""
        self._calls.put(None)

    def _run(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=_WINDOW_S)
            except queue.Empty:
                self._images = {}
                continue
            if call is None:
                return
            try:
                call()
            except GearError as exc:
                _log.info("no companions of a file are fetched", error=str(exc))
            except Exception:
                _log.exception("cannot fetch the companions of a file")

    def _begin(self, id: str, command: str) -> None:
        if id not in self._images:
            known = {layer.id: layer for image in self._images.values() for layer in image.layers}
            incomplete = [layer for layer in self._layers.layer_chain(id) if not layer.complete]
            files = ImageFiles(
                [
                    known.get(layer.id) or LayerFiles(layer.id, partial(named_files, self._layers.directory(layer)))
                    for layer in incomplete
                ]
            )
            # The layers below may have been taken for images while this image was pulled.
            others = [other for other in self._images if not any(other == layer.id for layer in incomplete)]
            self._images = {other: self._images[other] for other in others[1 - _MAX_IMAGES :]} | {id: files}
        for word in scripts.words_of(command.encode())[:_MAX_PROGRAMS]:
            self._fetch_programs(self._images[id], [word])
        self._fetch(filter(None, map(self._images[id].find, STARTUP_FILES)))

    def _missed(self, digest: bytes) -> None:
        for image in self._images.values():
            for layer in image.layers:
                program, neighbours = layer.program(digest), layer.neighbours(digest)
                if program is None:
                    self._fetch(neighbours)
                    continue
                if digest not in image.seen:
                    image.seen.add(digest)
                    self._look_into(image, program)
                self._bring(image, filter(None, (layer.program(neighbour.digest) for neighbour in neighbours)))

    def _fetch(self, files: Iterable[Neighbour | NamedObject], arrived: Arrived | None = None) -> None:
        parts = [
            PrefetchObject(file.digest, file.size_bytes, ((0, elf.HEAD_BYTES),))
            for file in files
            if not self._fetcher.is_here(file.digest)
        ]
        if parts:
            self._fetch_soon(parts, arrived)

    # -- programs

    def _fetch_programs(self, image: ImageFiles, names: Iterable[bytes]) -> None:
        found = [file for name in names if (file := image.find(name)) is not None and file.digest not in image.seen]
        self._bring(image, found[:_MAX_PROGRAMS])

    def _bring(self, image: ImageFiles, programs: Iterable[NamedObject]) -> None:
        """Fetch programs and libraries, and look into each when its beginning has arrived."""
        unseen = {file.digest: file for file in programs if file.digest not in image.seen}
        image.seen.update(unseen)
        for file in unseen.values():
            if self._fetcher.is_here(file.digest):
                self._look_into(image, file)
        self._fetch(unseen.values(), lambda digest: self._calls.put(partial(self._look_into, image, unseen[digest])))

    def _look_into(self, image: ImageFiles, file: NamedObject) -> None:
        """Fetch what a program or library needs."""
        opened: Future[Download | None] = completed(None)
        if not self._fetcher.is_here(file.digest):
            opened = self._fetcher.open(file.digest, file.size_bytes, Priority.READ_AHEAD)
        names: Future[list[bytes]] = then(opened, lambda download: self._needed(file, download))
        names.add_done_callback(lambda done: self._calls.put(lambda: self._fetch_programs(image, done.result())))

    def _needed(self, file: NamedObject, download: Download | None) -> Future[list[bytes]]:
        """Return the names of what a file needs; fetch the loaded parts of a large program."""
        source = download or ObjectFile(self._store.open(file.digest))

        def read(part: elf.Part) -> Future[bytes]:
            found = source.read(*part)
            return found if isinstance(found, Future) else completed(found)

        def with_head(head: bytes) -> Future[list[bytes]]:
            if scripts.is_script(head):
                return then(read(elf.Part(0, scripts.MAX_SCRIPT_BYTES)), scripts.words_of_script)
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
