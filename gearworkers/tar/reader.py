"""Read the entries of a tar stream in bounded memory, and account for every byte.

The reader accepts and rejects the same streams as Go's archive/tar, with which Docker reads layers: v7, ustar, PAX,
star and GNU headers, sparse files of all of GNU's formats, and an end without zero blocks if no entry is truncated. So
an empty stream is a tar without entries. The reader is stricter in one case: a stream that ends with an extended header
and without zero blocks is an error. It is more lenient in two cases that Docker rejects: contiguous files ('7') and old
GNU sparse files ('S') are regular files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn, Protocol

from gearworkers.errors import IntegrityError, InvalidInput
from gearworkers.tar import pax, sparse
from gearworkers.tar.entry import BLOCK_BYTES, CONTENTLESS, DIR, HARDLINK, REG, TarEntry, shown
from gearworkers.tar.header import (
    ZERO_BLOCK,
    c_string,
    is_gnu,
    parse_header,
    parse_size,
    parse_type,
    reject_compressed,
)
from gearworkers.tar.tar_split import TarSplitWriter

_V7_REG = 0
_CONTIGUOUS = ord("7")
_OLD_SPARSE = ord("S")
_RECORDS = ord("x")
_GLOBAL_RECORDS = ord("g")
_LONG_NAME = ord("L")
_LONG_LINK = ord("K")
_FILES = CONTENTLESS | {REG}
_REGULAR = frozenset((_V7_REG, _CONTIGUOUS, _OLD_SPARSE))
_EXTENSIONS = frozenset((_RECORDS, _GLOBAL_RECORDS, _LONG_NAME, _LONG_LINK))

_EMPTY = memoryview(b"")

DEFAULT_BUFFER_BYTES = 1 << 20


class Readable(Protocol):
    """The source of a tar: a blocking socket or file."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill a part of *buffer*; return the number of bytes, 0 at the end of the stream."""


class TarReader:
    """Reads the entries of one tar, in order, and the stored content of each.

    With a *log*, all bytes of the tar are logged in order, so that they can be reproduced. The reader logs headers, and
    content that the caller does not take. The caller logs exactly the bytes that `payload` and `chunks` return, before
    it calls `next` or `finish` again: by `log.content` or `log.slice` if the bytes are stored as an object, else by
    `log.raw`. Otherwise that call raises RuntimeError.

    InvalidInput (the input is malformed) and IntegrityError (the stream ends early) name the entry. Errors of *source*
    and *log* pass through.
    """

    def __init__(
        self, source: Readable, log: TarSplitWriter | None = None, *, buffer_bytes: int = DEFAULT_BUFFER_BYTES
    ) -> None:
        self._source = source
        self._log = log
        self._view = memoryview(bytearray(max(buffer_bytes, 8 * BLOCK_BYTES)))
        self._position = 0  # in the buffer: end of the bytes that were parsed or returned
        self._filled = 0  # in the buffer: end of the bytes that were read
        self._unlogged = 0  # in the buffer: bytes from here to the position are raw and not logged yet
        self._base_offset = 0  # offset in the tar of the buffer's first byte
        self._left_bytes = 0  # rest of the current entry's stored content
        self._padding_bytes = 0  # after the content
        self._name = b""  # name of the current entry, for messages
        self._ended = False
        self.guarded = False
        """Whether a guard was read; a Gear layer begins with one."""

    @property
    def offset(self) -> int:
        """The number of bytes of the tar that were parsed or returned."""
        return self._base_offset + self._position

    def __iter__(self) -> Iterator[TarEntry]:
        while (entry := self.next()) is not None:
            yield entry

    def next(self) -> TarEntry | None:
        """Return the next entry; None at the archive's end. Skip the rest of the previous content.

        Raises:
            InvalidInput: The archive or the entry is malformed, or has a type that Docker rejects.
            IntegrityError: The stream ends inside a header or a content.
        """
        while (entry := self._entry()) is not None and entry.guard:
            if entry.type != HARDLINK:
                _reject(entry, "it is marked as a guard but is not a hard link")
            self.guarded = True
        return entry

    def _entry(self) -> TarEntry | None:
        """Return the next entry, including guards."""
        if self._ended:
            return None
        self._leave_entry()
        records: pax.Records = {}
        gear: tuple[bytes, int] | None = None
        long_name = long_link = b""
        extended = False
        while True:
            offset = self._base_offset + self._position
            block = self._header_block(extended)
            if block is None:
                return None
            kind = parse_type(block, offset)
            if kind not in _EXTENSIONS:
                break
            special = self._special_content(block, offset)
            extended = kind != _GLOBAL_RECORDS
            if kind == _LONG_NAME:
                long_name = c_string(special)
            elif kind == _LONG_LINK:
                long_link = c_string(special)
            elif kind == _RECORDS:
                gear = pax.parse_gear_records(special)
                records = {} if gear is not None else _records(special, block, offset)
            else:  # Go returns a global header as an entry, which ends the effect of earlier headers.
                _records(special, block, offset)
                records, gear, long_name, long_link = {}, None, b"", b""
        entry = parse_header(block, offset)
        self._name = entry.name
        if extended or kind not in _FILES:
            entry.gear = gear
            self._complete(entry, block, records, long_name, long_link)
        elif kind != REG:
            entry.size_bytes = 0
        self._begin_content(entry)
        return entry

    def payload(self) -> memoryview | None:
        """Return the whole stored content of the current entry. Call before `chunks`.

        Returns:
            A view that is valid until the next call of any method; None if the content is larger than the buffer.

        Raises:
            IntegrityError: The stream ends inside the content.
        """
        size_bytes = self._left_bytes
        if not size_bytes:
            return _EMPTY
        if size_bytes > len(self._view):
            return None
        if self._filled - self._position < size_bytes and not self._fill(size_bytes):
            self._reject_truncated("its content")
        return self._take(size_bytes)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the rest of the current entry's stored content; each piece is valid until the next one.

        Raises:
            IntegrityError: The stream ends inside the content.
        """
        while self._left_bytes:
            if self._filled == self._position and not self._fill(1):
                self._reject_truncated("its content")
            yield self._take(min(self._left_bytes, self._filled - self._position))

    def finish(self) -> None:
        """Read to the end of the source: check and skip the remaining entries, and log the bytes after them.

        Raises:
            InvalidInput, IntegrityError: As `next`.
        """
        while self.next() is not None:
            pass
        self._position = self._filled
        while self._fill(1):
            self._position = self._filled

    # -- the buffer

    def _fill(self, wanted_bytes: int) -> bool:
        """Read until the buffer has *wanted_bytes* after the position; return False if the source ends first."""
        self._flush_raw()
        view, kept_bytes = self._view, self._filled - self._position
        view[:kept_bytes] = view[self._position : self._filled]
        self._base_offset += self._position
        self._position = self._unlogged = 0
        self._filled = kept_bytes
        while self._filled < wanted_bytes:
            read_bytes = self._source.readinto(view[self._filled :])
            if not read_bytes:
                return False
            self._filled += read_bytes
        return True

    def _flush_raw(self) -> None:
        if self._log is not None and self._unlogged < self._position:
            self._log.raw(self._view[self._unlogged : self._position])
        self._unlogged = self._position

    def _take(self, size_bytes: int) -> memoryview:
        start = self._position
        self._position = self._unlogged = start + size_bytes
        self._left_bytes -= size_bytes
        return self._view[start : self._position]

    def _skip(self, size_bytes: int) -> int:
        """Skip raw bytes; return the number of bytes missing because the source ended."""
        while size_bytes:
            if self._filled == self._position and not self._fill(1):
                return size_bytes
            step = min(size_bytes, self._filled - self._position)
            self._position += step
            size_bytes -= step
        return 0

    def _raw_block(self) -> bytes:
        if self._filled - self._position < BLOCK_BYTES and not self._fill(BLOCK_BYTES):
            self._reject_truncated("its header")
        self._position += BLOCK_BYTES
        return bytes(self._view[self._position - BLOCK_BYTES : self._position])

    # -- between entries

    def _leave_entry(self) -> None:
        if self._log is not None and self._log.size_bytes != self._base_offset + self._unlogged:
            raise RuntimeError(
                f"{self._base_offset + self._unlogged} bytes of the tar were returned, {self._log.size_bytes} logged"
            )
        if self._left_bytes:
            if self._skip(self._left_bytes):
                self._reject_truncated("its content")
            self._left_bytes = 0
        if self._padding_bytes:
            self._skip(self._padding_bytes)
            self._padding_bytes = 0

    def _header_block(self, extended: bool) -> bytes | None:
        """Return the next header block; None at the archive's end, which has two zero blocks, one, or none."""
        if self._filled - self._position < BLOCK_BYTES and not self._fill(BLOCK_BYTES):
            if self._filled != self._position or extended:
                if not self.offset:
                    reject_compressed(bytes(self._view[: self._filled]))
                self._reject_truncated("a header after it")
            self._end()
            return None
        start = self._position
        self._position = start + BLOCK_BYTES
        block = bytes(self._view[start : self._position])
        if block[0] == 0 and block == ZERO_BLOCK:
            self._second_zero_block()
            self._end()
            return None
        return block

    def _second_zero_block(self) -> None:
        if self._filled - self._position < BLOCK_BYTES and not self._fill(BLOCK_BYTES):
            if self._filled != self._position:
                self._reject_truncated("the zero block after it")
            return
        if self._view[self._position : self._position + BLOCK_BYTES] != ZERO_BLOCK:
            raise InvalidInput(f"tar: a single zero block at byte {self.offset - BLOCK_BYTES}, and more data after it")
        self._position += BLOCK_BYTES

    def _end(self) -> None:
        self._flush_raw()
        self._ended = True

    # -- one entry

    def _begin_content(self, entry: TarEntry) -> None:
        self._left_bytes = entry.stored_bytes
        self._padding_bytes = -entry.stored_bytes % BLOCK_BYTES
        if self._left_bytes:
            self._flush_raw()

    def _special_content(self, block: bytes, offset: int) -> bytes:
        """Return the content of the extended header *block*; it is logged as raw bytes."""
        size_bytes = parse_size(block)
        if not 0 <= size_bytes <= pax.MAX_SPECIAL_BYTES:
            _reject(parse_header(block, offset), f"its extended header is larger than {pax.MAX_SPECIAL_BYTES} bytes")
        start = self._position
        padded_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if self._filled - start >= padded_bytes:
            self._position = start + padded_bytes
            return bytes(self._view[start : start + size_bytes])
        self._name = parse_header(block, offset).name
        content = bytearray()
        while missing_bytes := size_bytes - len(content):
            if self._filled == self._position and not self._fill(1):
                self._reject_truncated("its extended header")
            start = self._position
            self._position = min(start + missing_bytes, self._filled)
            content += self._view[start : self._position]
        self._skip(-size_bytes % BLOCK_BYTES)
        return bytes(content)

    def _complete(
        self, entry: TarEntry, block: bytes, records: pax.Records, long_name: bytes, long_link: bytes
    ) -> None:
        """Apply the extended headers to *entry*, normalise its type, and find its sparse map."""
        try:
            if records:
                pax.merge(entry, records)
            entry.name = long_name or entry.name
            entry.linkname = long_link or entry.linkname
            self._name = entry.name
            kind = _normalised(entry)
            entry.stored_bytes = 0 if kind in CONTENTLESS else entry.size_bytes
            if entry.stored_bytes < 0:
                raise ValueError("its size is negative")
            segments = self._sparse_map(entry, block, records)
            if segments is not None:
                if kind != REG:
                    raise ValueError("it is sparse but not a regular file")
                sparse.check(segments, entry.size_bytes, entry.stored_bytes)
            if entry.gear is not None:
                _check_gear(entry, plain=kind == REG and segments is None)
        except ValueError as exc:
            _reject(entry, str(exc), exc)
        entry.type, entry.sparse = kind, segments
        if kind != REG:
            entry.size_bytes = 0

    def _sparse_map(self, entry: TarEntry, block: bytes, records: pax.Records) -> sparse.Segments | None:
        if entry.type == _OLD_SPARSE:
            if not is_gnu(block):
                raise ValueError("it is sparse in a format that is not GNU's")
            return sparse.read_old_gnu(entry, block, self._raw_block)
        return sparse.read_pax(entry, records, lambda: self._block_of_content(entry)) if records else None

    def _block_of_content(self, entry: TarEntry) -> bytes:
        if entry.stored_bytes < BLOCK_BYTES:
            raise ValueError("its sparse map is truncated")
        entry.stored_bytes -= BLOCK_BYTES
        return self._raw_block()

    def _reject_truncated(self, part: str) -> NoReturn:
        offset = self._base_offset + self._filled
        raise IntegrityError(f"the tar ends early, at byte {offset}: entry {shown(self._name)}: {part} is cut short")


def _records(content: bytes, block: bytes, offset: int) -> pax.Records:
    try:
        return pax.parse_records(content)
    except ValueError as exc:
        _reject(parse_header(block, offset), str(exc), exc)


def _normalised(entry: TarEntry) -> int:
    kind = entry.type
    if kind in _FILES:
        return kind
    if kind not in _REGULAR:
        _reject(entry, f"unhandled tar header type {kind} ({chr(kind)!r})")
    return DIR if kind == _V7_REG and entry.name.endswith(b"/") else REG


def _check_gear(entry: TarEntry, *, plain: bool) -> None:
    """Check that the Gear records fit the entry, whose content is complete in the archive or absent."""
    assert entry.gear is not None
    size_bytes = entry.gear[1]
    if not plain or entry.stored_bytes not in (0, size_bytes):
        raise ValueError(f"its Gear records name {size_bytes} bytes of content, which do not fit the entry")
    entry.size_bytes = size_bytes


def _reject(entry: TarEntry, why: str, cause: Exception | None = None) -> NoReturn:
    raise InvalidInput(f"tar entry {shown(entry.name)} at byte {entry.header_offset}: {why}") from cause
