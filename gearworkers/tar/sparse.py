"""Parse GNU's sparse maps, which list the data segments of a file, and expand sparse files.

Source: GNU tar manual, "Storing Sparse Files"; validated as in Go's archive/tar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from gearworkers.tar.entry import BLOCK_BYTES, TarEntry
from gearworkers.tar.header import parse_number
from gearworkers.tar.pax import MAX_SPECIAL_BYTES, SPARSE_MAP, Records, parse_integer

Segments = tuple[tuple[int, int], ...]

_OLD_MAP = slice(386, 483)
_OLD_REAL_SIZE = slice(483, 495)
_SEGMENT_BYTES = 24
_FORMATS_IN_RECORDS = ((b"0", b"0"), (b"0", b"1"))
_FORMAT_IN_CONTENT = (b"1", b"0")
_ZEROS = memoryview(bytes(1 << 20))


def read_old_gnu(entry: TarEntry, block: bytes, next_block: Callable[[], bytes]) -> Segments:
    """Return the map of a type 'S' header and of its extension blocks; set the entry's real size.

    Raises:
        ValueError: A number is malformed, or the map is longer than MAX_SPECIAL_BYTES.
    """
    entry.size_bytes = parse_number(block[_OLD_REAL_SIZE])
    numbers: list[int] = []
    table, read_bytes = block[_OLD_MAP], 0
    while True:
        table_end = len(table) // _SEGMENT_BYTES * _SEGMENT_BYTES
        for at in range(0, table_end, _SEGMENT_BYTES):
            if table[at] == 0:
                break
            numbers += (parse_number(table[at : at + 12]), parse_number(table[at + 12 : at + 24]))
        if not table[table_end]:
            return _paired(numbers)
        read_bytes += BLOCK_BYTES
        if read_bytes > MAX_SPECIAL_BYTES:
            raise ValueError(f"its sparse map is longer than {MAX_SPECIAL_BYTES} bytes")
        table = next_block()


def read_pax(entry: TarEntry, records: Records, next_block: Callable[[], bytes]) -> Segments | None:
    """Return the map of format 0.0 or 0.1 (in the records) or 1.0 (before the content); None without a map.

    Set the entry's real name and size.

    Raises:
        ValueError: The map is malformed or too long.
    """
    version = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
    in_content = version == _FORMAT_IN_CONTENT
    unversioned = version == (b"", b"") and bool(records.get(SPARSE_MAP))
    if not (in_content or unversioned or version in _FORMATS_IN_RECORDS):
        return None
    name = records.get(b"GNU.sparse.name")
    if name:
        if b"\0" in name:
            raise ValueError("its GNU.sparse.name contains a NUL byte")
        entry.name = name
    size = records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize")
    if size:
        entry.size_bytes = parse_integer(size)
    return _map_in_content(next_block) if in_content else _map_in_records(records)


def _map_in_records(records: Records) -> Segments:
    count = parse_integer(records.get(b"GNU.sparse.numblocks", b""))
    text = records.get(SPARSE_MAP, b"")
    numbers = text.split(b",") if text else []
    if len(numbers) != 2 * count:
        raise ValueError("the length of its sparse map differs from GNU.sparse.numblocks")
    return _paired(map(parse_integer, numbers))


def _map_in_content(next_block: Callable[[], bytes]) -> Segments:
    """Parse decimal numbers, one per line: a count, then offset and length of each segment; padded to blocks."""
    data = bytearray()
    _read_lines(data, 1, next_block)
    count = parse_integer(bytes(data[: data.index(b"\n")]))
    if not 0 <= count <= MAX_SPECIAL_BYTES:
        raise ValueError("the number of segments in its sparse map is invalid")
    _read_lines(data, 1 + 2 * count, next_block)
    return _paired(map(parse_integer, bytes(data).split(b"\n")[1 : 1 + 2 * count]))


def _read_lines(data: bytearray, lines: int, next_block: Callable[[], bytes]) -> None:
    complete = data.count(b"\n")
    while complete < lines:
        if len(data) >= MAX_SPECIAL_BYTES:
            raise ValueError(f"its sparse map is longer than {MAX_SPECIAL_BYTES} bytes")
        block = next_block()
        data += block
        complete += block.count(b"\n")


def _paired(numbers: Iterable[int]) -> Segments:
    each = iter(numbers)
    return tuple(zip(each, each, strict=True))


def check(segments: Segments, size_bytes: int, stored_bytes: int) -> None:
    """Check that the segments are in order and inside the file, and have the length of the stored content.

    Raises:
        ValueError: One of these conditions does not hold.
    """
    end = total = 0
    for offset, length in segments:
        if offset < end or length < 0 or offset + length > size_bytes:
            raise ValueError("its sparse segments overlap, are out of order or are outside the file")
        end = offset + length
        total += length
    if size_bytes < 0 or total != stored_bytes:
        raise ValueError(f"its sparse segments have {total} bytes, but {stored_bytes} are stored")


def expanded(stored: Iterator[memoryview], segments: Segments | None, size_bytes: int) -> Iterator[memoryview | int]:
    """Yield a file's content in order: stored bytes, and for each hole its length in bytes.

    Args:
        stored: The stored content, as `TarReader.chunks` yields it.
        segments: A checked map of *stored*; None for a file that is not sparse.
        size_bytes: Size of the file, holes included.
    """
    if segments is None:
        yield from stored
        return
    piece, at = memoryview(b""), 0
    for offset, length in segments:
        if offset > at:
            yield offset - at
        at = offset + length
        while length:
            piece = piece or next(stored)
            taken = min(length, len(piece))
            yield piece[:taken]
            piece, length = piece[taken:], length - taken
    if size_bytes > at:
        yield size_bytes - at


def zeros(size_bytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a hole in pieces of at most 1 MiB."""
    while size_bytes:
        step = min(size_bytes, len(_ZEROS))
        yield _ZEROS[:step]
        size_bytes -= step
