"""Diff of an image layer: write the exact tar that ApplyDiff received."""

from __future__ import annotations

import os
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import IntegrityError
from gearworkers.layers.apply import STREAM_FILE
from gearworkers.layers.diff.export import Writable
from gearworkers.tar.tar_split import RawBytes, TarSplitReader

_PIECE_BYTES = 1 << 20


def replay(directory: Path, store: ObjectStore, sink: Writable) -> None:
    """Write the tar of the image layer in *directory*; *store* contains its contents.

    Raises:
        NotFound: An object is missing.
        IntegrityError: The stream file or an object is damaged; a part of the tar may have been written.
    """
    try:
        stream_file = open(directory / STREAM_FILE, "rb")
    except FileNotFoundError as exc:
        raise IntegrityError(f"layer {directory.name}: its {STREAM_FILE} is missing; run `gear fsck`") from exc
    with stream_file:
        for piece in TarSplitReader(stream_file):
            if isinstance(piece, RawBytes):
                sink.write(piece.data)
            else:
                _write_content(store, piece.digest, piece.offset_bytes, piece.length_bytes, sink)


def _write_content(store: ObjectStore, digest: bytes, offset_bytes: int, length_bytes: int, sink: Writable) -> None:
    fd = store.open(digest)
    try:
        while length_bytes:
            data = os.pread(fd, min(length_bytes, _PIECE_BYTES), offset_bytes)
            if not data:
                raise IntegrityError(f"object {digest.hex()} is too short by {length_bytes} bytes; run `gear fsck`")
            sink.write(data)
            offset_bytes += len(data)
            length_bytes -= len(data)
    finally:
        os.close(fd)
