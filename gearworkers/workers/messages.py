"""Where a heavy call meets the process that does it: the node's streams socket, and a caller's connection handed over.

Glossary
    order       what is to be done, as a task carries it: ids and a token, never bytes (`Order`)
    token       names one offer of one order; whoever shows it first does the order
    control     the connection to the streams socket: claim, grant, answer; its end is the death of the other side
    connection  the caller's own HTTP connection: its descriptor comes with the grant, so a body is read, or an
                answer's bytes are written, by the process that needs them, and by no one between

What is said on the control connection, each a frame (4 bytes little-endian length, JSON)::

    worker  -> Claim     I take this token
    gateway -> Grant     yes (with the connection's descriptor, and what was read of the body), or no
    worker  -> Progress  an answer's first byte follows; the caller keeps me waiting, or no longer
    worker  -> Answer    the end

The connection stays non-blocking, since that flag is shared with the gateway. Here are the words; `claiming` is the
worker's side, `bodies` what goes over the connection.
"""

from __future__ import annotations

import struct

import msgspec

from gearworkers.errors import InvalidInput

CHUNKED = -1
"""As a body's length: it comes in chunks."""

_LENGTH = struct.Struct("<I")
_FRAME_LIMIT_BYTES = 1 << 20


class Order(msgspec.Struct, frozen=True):
    """What a worker is asked to do; travels through Redis."""

    call: str
    """``apply_diff``, ``diff``, ``push``, ``collect_garbage`` or ``dedupe``."""
    gear_root: str
    """The gateway's; whoever does it checks that it is his own."""
    token: str
    id: str = ""
    parent: str = ""


class Claim(msgspec.Struct, frozen=True):
    """A process offers to do the order with this token."""

    token: str
    by: str
    """``worker`` or ``gateway``: a process of the gateway's own pool."""
    pid: int


class Grant(msgspec.Struct, frozen=True):
    """Whether it may."""

    accepted: bool
    has_connection: bool = False
    body_bytes: int = CHUNKED
    """Length of the request's body, or CHUNKED."""
    head_bytes: int = 0
    """How much of the body, as it came, follows this frame."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How it stands, told when that changes."""

    started: bool = False
    """Diff: the answer's first byte is about to be written or was, so an error can only be told by breaking off."""
    stalled: bool = False
    """The process waits for the caller to send or to take something, and uses no core."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """What became of it."""

    error: str = ""
    retryable: bool = False
    size_bytes: int = 0
    figures: dict[str, int] = {}


def frame(message: msgspec.Struct) -> bytes:
    """The message as it goes over the control connection."""
    data = msgspec.json.encode(message)
    return _LENGTH.pack(len(data)) + data


class FrameBuffer:
    """Makes frames of received bytes."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._data += data

    def next(self) -> bytes | None:
        """The next whole frame's JSON, or None if more bytes are needed; InvalidInput if it is absurdly long."""
        if len(self._data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._data)
        if length > _FRAME_LIMIT_BYTES:
            raise InvalidInput(f"streams socket: a message of {length} bytes")
        end = _LENGTH.size + length
        if len(self._data) < end:
            return None
        message = bytes(self._data[_LENGTH.size : end])
        del self._data[:end]
        return message

    def rest(self) -> bytes:
        """What follows the last frame."""
        rest = bytes(self._data)
        self._data.clear()
        return rest
