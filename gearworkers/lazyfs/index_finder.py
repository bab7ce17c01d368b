"""Finds the indexes of original layers in the remote, so that a node need not download the layers.

A remote that is down or slow must not delay pulls: after one look-up that failed or took too long, none is begun until
the remote answers again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import structlog

from gearworkers.errors import GearError, Unavailable, from_os_error
from gearworkers.images.layer_records import LayerRecord, read_record
from gearworkers.lazyfs.client import LayerIndex

_log = structlog.get_logger(__name__)

LOOKUP_S = 1.0
"""Seconds for all look-ups of one image together."""
_ABSENT_S = 60.0
"""Seconds for which a layer without a record is not looked up again."""
_MAX_ABSENT = 10_000
_PROBE_INTERVAL_S = 5.0
_THREADS = 16
_FETCH_BASE_S = 5.0
_FETCH_BYTES_PER_S = 500_000
_PROBED_DIGEST = f"sha256:{'0' * 64}"


class IndexFinder:
    """Looks up records of layers and fetches their indexes; any thread may call its methods.

    Args:
        document: Returns a document of the remote.
        fetch: Yields the verified bytes of an object of the remote.
        lookup_s: As LOOKUP_S.
        probe_interval_s: Seconds between two questions to a remote that did not answer.
    """

    def __init__(
        self,
        document: Callable[[str], bytes | None],
        fetch: Callable[[bytes], Iterator[bytes]],
        *,
        lookup_s: float = LOOKUP_S,
        probe_interval_s: float = _PROBE_INTERVAL_S,
    ) -> None:
        self._document = document
        self._fetch = fetch
        self._lookup_s = lookup_s
        self._probe_interval_s = probe_interval_s
        self._threads = ThreadPoolExecutor(_THREADS, "index")
        self._absent_s: dict[str, float] = {}
        self._lock = threading.Lock()
        self._is_away = False
        self._closed = threading.Event()

    def find(self, digests: Sequence[str]) -> dict[str, LayerIndex]:
        """Return the indexes of the layers that have one, by the layer's digest; in LOOKUP_S at most."""
        now_s = time.monotonic()
        unknown = [digest for digest in digests if now_s - self._absent_s.get(digest, -_ABSENT_S) >= _ABSENT_S]
        if self._is_away or not unknown:
            return {}
        lookups = {digest: self._threads.submit(read_record, self._document, digest) for digest in unknown}
        wait(lookups.values(), self._lookup_s)
        found = {digest: self._index(digest, lookup) for digest, lookup in lookups.items()}
        return {digest: index for digest, index in found.items() if index is not None}

    def fetch(self, index: LayerIndex, target: Path) -> None:
        """Write an index to the new file *target*.

        Raises:
            Unavailable: It does not arrive in time.
            GearError: It cannot be fetched or written.
        """
        arrival = self._threads.submit(self._write, index.object_digest, target)
        try:
            arrival.result(_FETCH_BASE_S + index.size_bytes / _FETCH_BYTES_PER_S)
        except TimeoutError as exc:
            arrival.cancel()
            error = f"the index {index.object_digest.hex()} of a layer does not arrive"
            self._note_away(error)
            raise Unavailable(error) from exc

    def _write(self, digest: bytes, target: Path) -> None:
        try:
            with target.open("xb") as file:
                for piece in self._fetch(digest):
                    file.write(piece)
        except OSError as exc:
            raise from_os_error(exc, f"write {target}") from exc

    def close(self) -> None:
        """End the threads; no call may follow."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _index(self, digest: str, lookup: Future[LayerRecord | None]) -> LayerIndex | None:
        """Return the index that was found; remember a layer that has none, and a remote that did not answer."""
        if not lookup.done():
            lookup.cancel()
            self._note_away(f"no answer in {self._lookup_s:g} s")
            return None
        try:
            record = lookup.result()
        except GearError as exc:
            self._note_away(str(exc))
            return None
        if record is not None and record.has_index:
            made = record.converted
            return LayerIndex(made.object_digest, made.size_bytes, record.source_diff_id, record.source_tar_bytes)
        if len(self._absent_s) >= _MAX_ABSENT:
            self._absent_s.clear()
        self._absent_s[digest] = time.monotonic()
        return None

    def _note_away(self, reason: str) -> None:
        with self._lock:
            if self._is_away or self._closed.is_set():
                return
            self._is_away = True
        _log.warning("layers are downloaded as usual until the remote answers", error=reason)
        threading.Thread(target=self._probe, name="probe", daemon=True).start()

    def _probe(self) -> None:
        """Ask the remote now and then until it answers in time."""
        while not self._closed.wait(self._probe_interval_s):
            begin_s = time.monotonic()
            try:
                read_record(self._document, _PROBED_DIGEST)
            except GearError:
                continue
            if time.monotonic() - begin_s <= self._lookup_s:
                self._is_away = False
                _log.info("the remote answers again")
                return
