"""A tar stream to entries, in bounded memory, with every byte accounted for.

What is accepted and what is refused is what Go's archive/tar does, since it is what Docker reads layers with:
v7, ustar, PAX, star and GNU headers, sparse files of all of GNU's formats, an end without zero blocks as long as
no entry is cut; so a stream of no bytes is a tar without entries. Stricter in one thing: an extended header that
describes nothing at a bare end of the stream is a cut. More lenient in two that Docker refuses: contiguous files ('7')
and old GNU sparse files ('S') are regular files.
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

_NOTHING = memoryview(b"")

DEFAULT_BUFFER_BYTES = 1 << 20


class Readable(Protocol):
    """Where the tar comes from: a socket's or a file's raw readinto, blocking."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill some of *buffer*; how many bytes, 0 at the clean end."""


class TarReader:
    """Entries of one tar, in order, and the stored content of each.

    With a *log*, all bytes of the tar go there in order, so that they can be made again. The reader logs what is
    not content, and content that nobody took, by itself. For content handed out by `payload` or `chunks` the
    caller does it, before the next call of `next` or `finish` and for exactly the bytes handed out: `log.content`
    or `log.slice` where they are kept as an object, `log.raw` where not. A caller that does not is a bug and is
    told so at the next call.

    Errors: InvalidInput for what is malformed, IntegrityError for a stream that ends too early; both name the
    entry. What *source* and *log* raise passes through.
    """

    def __init__(
        self, source: Readable, log: TarSplitWriter | None = None, *, buffer_bytes: int = DEFAULT_BUFFER_BYTES
    ) -> None:
        self._source = source
        self._log = log
        self._view = memoryview(bytearray(max(buffer_bytes, 8 * BLOCK_BYTES)))
        self._position = 0  # in the buffer: what was parsed or handed out ends here
        self._filled = 0  # in the buffer: what was read ends here
        self._unlogged = 0  # in the buffer: from here to the position is raw, and not yet in the log
        self._base_offset = 0  # of the buffer's first byte in the tar
        self._left_bytes = 0  # of the current entry's stored content
        self._padding_bytes = 0  # behind it
        self._name = b""  # of the current entry, for messages
        self._ended = False
        self.guarded = False
        """Whether there was a guard so far; a Gear layer begins with one."""

    @property
    def offset(self) -> int:
        """How many bytes of the tar have been parsed or handed out."""
        return self._base_offset + self._position

    def __iter__(self) -> Iterator[TarEntry]:
        while (entry := self.next()) is not None:
            yield entry

    def next(self) -> TarEntry | None:
        """The next entry; None at the archive's end. Skips what was not taken of the content before.

        Raises:
            InvalidInput: The archive or the entry is malformed, or of a type that Docker refuses.
            IntegrityError: The stream ends inside a header or a content.
        """
        while (entry := self._entry()) is not None and entry.guard:
            if entry.type != HARDLINK:
                _refuse(entry, "it is marked as a guard, but is no hard link")
            self.guarded = True
        return entry

    def _entry(self) -> TarEntry | None:
        """As `next`, guards included."""
        if self._ended:
            return None
        self._leave_entry()
        records: pax.Records | None = None
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
                records = _records(special, block, offset)
            else:  # Go hands a global header out as an entry, which ends the effect of the headers before it.
                _records(special, block, offset)
                records, long_name, long_link = None, b"", b""
        entry = parse_header(block, offset)
        self._name = entry.name
        if extended or kind not in _FILES:
            self._complete(entry, block, records or {}, long_name, long_link)
        elif kind != REG:
            entry.size_bytes = 0
        self._begin_content(entry)
        return entry

    def payload(self) -> memoryview | None:
        """All of the current entry's stored content, if none of it was taken and it fits into the buffer.

        Returns:
            A view that is valid until the next call of any method; None if the content is too large: use `chunks`.

        Raises:
            IntegrityError: The stream ends inside the content.
        """
        size_bytes = self._left_bytes
        if not size_bytes:
            return _NOTHING
        if size_bytes > len(self._view):
            return None
        if self._filled - self._position < size_bytes and not self._fill(size_bytes):
            self._cut("its content")
        return self._hand_out(size_bytes)

    def chunks(self) -> Iterator[memoryview]:
        """What is left of the current entry's stored content, piece by piece; each valid until the next is asked.

        Raises:
            IntegrityError: The stream ends inside the content.
        """
        while self._left_bytes:
            if self._filled == self._position and not self._fill(1):
                self._cut("its content")
            yield self._hand_out(min(self._left_bytes, self._filled - self._position))

    def finish(self) -> None:
        """Read to the end of the source: what entries are left are checked and skipped, what trails them is logged.

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
        """Have *wanted_bytes* behind the position in the buffer; False if the source ends before."""
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

    def _hand_out(self, size_bytes: int) -> memoryview:
        start = self._position
        self._position = self._unlogged = start + size_bytes
        self._left_bytes -= size_bytes
        return self._view[start : self._position]

    def _skip(self, size_bytes: int) -> int:
        """Pass over raw bytes; how many are missing because the source ended."""
        while size_bytes:
            if self._filled == self._position and not self._fill(1):
                return size_bytes
            step = min(size_bytes, self._filled - self._position)
            self._position += step
            size_bytes -= step
        return 0

    def _raw_block(self) -> bytes:
        if self._filled - self._position < BLOCK_BYTES and not self._fill(BLOCK_BYTES):
            self._cut("its header")
        self._position += BLOCK_BYTES
        return bytes(self._view[self._position - BLOCK_BYTES : self._position])

    # -- between entries

    def _leave_entry(self) -> None:
        if self._log is not None and self._log.size_bytes != self._base_offset + self._unlogged:
            raise RuntimeError(
                f"{self._base_offset + self._unlogged} bytes of the tar were handed out, {self._log.size_bytes} logged"
            )
        if self._left_bytes:
            if self._skip(self._left_bytes):
                self._cut("its content")
            self._left_bytes = 0
        if self._padding_bytes:
            self._skip(self._padding_bytes)
            self._padding_bytes = 0

    def _header_block(self, extended: bool) -> bytes | None:
        """The next header block; None at the archive's end, which is two zero blocks, one, or none."""
        if self._filled - self._position < BLOCK_BYTES and not self._fill(BLOCK_BYTES):
            if self._filled != self._position or extended:
                if not self.offset:
                    reject_compressed(bytes(self._view[: self._filled]))
                self._cut("a header behind it")
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
                self._cut("the end mark behind it")
            return
        if self._view[self._position : self._position + BLOCK_BYTES] != ZERO_BLOCK:
            raise InvalidInput(f"tar: a single zero block at byte {self.offset - BLOCK_BYTES}, and more behind it")
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
        """The content behind the extended header *block*, which is not logged as content but raw."""
        size_bytes = parse_size(block)
        if not 0 <= size_bytes <= pax.MAX_SPECIAL_BYTES:
            _refuse(parse_header(block, offset), f"its extended header is larger than {pax.MAX_SPECIAL_BYTES} bytes")
        start = self._position
        padded_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if self._filled - start >= padded_bytes:
            self._position = start + padded_bytes
            return bytes(self._view[start : start + size_bytes])
        self._name = parse_header(block, offset).name
        content = bytearray()
        while missing_bytes := size_bytes - len(content):
            if self._filled == self._position and not self._fill(1):
                self._cut("its extended header")
            start = self._position
            self._position = min(start + missing_bytes, self._filled)
            content += self._view[start : self._position]
        self._skip(-size_bytes % BLOCK_BYTES)
        return bytes(content)

    def _complete(
        self, entry: TarEntry, block: bytes, records: pax.Records, long_name: bytes, long_link: bytes
    ) -> None:
        """Put what the extended headers say into *entry*, normalise its type, find its sparse map."""
        try:
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
                    raise ValueError("it is sparse, but no regular file")
                sparse.check(segments, entry.size_bytes, entry.stored_bytes)
            if entry.gear is not None:
                _check_gear(entry, plain=kind == REG and segments is None)
        except ValueError as exc:
            _refuse(entry, str(exc), exc)
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
            raise ValueError("its sparse map is cut off")
        entry.stored_bytes -= BLOCK_BYTES
        return self._raw_block()

    def _cut(self, what: str) -> NoReturn:
        raise IntegrityError(
            f"the tar ends early, at byte {self._base_offset + self._filled}: entry {shown(self._name)}: {what} is cut"
        )


def _records(content: bytes, block: bytes, offset: int) -> pax.Records:
    try:
        return pax.parse_records(content)
    except ValueError as exc:
        _refuse(parse_header(block, offset), str(exc), exc)


def _normalised(entry: TarEntry) -> int:
    kind = entry.type
    if kind in _FILES:
        return kind
    if kind not in _REGULAR:
        _refuse(entry, f"unhandled tar header type {kind} ({chr(kind)!r})")
    return DIR if kind == _V7_REG and entry.name.endswith(b"/") else REG


def _check_gear(entry: TarEntry, *, plain: bool) -> None:
    """A content named by Gear records is that of the file: whole in the archive, or not there at all."""
    assert entry.gear is not None
    size_bytes = entry.gear[1]
    if not plain or entry.stored_bytes not in (0, size_bytes):
        raise ValueError(f"its Gear records name {size_bytes} bytes of content, but do not fit the entry")
    entry.size_bytes = size_bytes


def _refuse(entry: TarEntry, why: str, cause: Exception | None = None) -> NoReturn:
    raise InvalidInput(f"tar entry {shown(entry.name)} at byte {entry.header_offset}: {why}") from cause
