"""The messages between the gateway and the process that does a job.

Glossary
    job      one heavy call or maintenance work, and a token (`WorkerJob`). Redis carries it; it holds no layer's bytes.
    token    identifies the job at the gateway. The first process that presents it gets the job.
    control  the process's connection to the gateway's streams socket. Its end shows each side that the other has died.
    stream   the bytes that the job reads or writes (`ByteStream`). The gateway hands them over without copying.

The messages on the control connection, each a frame (4 bytes little-endian length, then MessagePack)::

    process -> Claim      asks for the job with this token
    gateway -> Granted    hands over the job and its stream, the HTTP connection's descriptor with it; or
               Refused    another process does the job, or the gateway has withdrawn it
    process -> Progress   reports that the response begins, or that the caller stalls or continues
    process -> JobResult  ends the job

`claim` is the side of the process, `plugin_gateway.dispatch.claim_server` that of the gateway. `http_body` reads and
writes the HTTP connection. `plugin_gateway.dispatch.pending_job` has the states of a job.
"""

from __future__ import annotations

import secrets
import struct
from typing import Literal

import msgspec

from gearworkers.errors import InvalidInput

CHUNKED = -1
"""The length of a body with chunked transfer coding."""

_LENGTH = struct.Struct("<I")
_FRAME_LIMIT_BYTES = 4 << 20

Claimant = Literal["worker", "gateway"]
"""A Celery worker, or a process of the gateway's own pool."""


class _Job(msgspec.Struct, frozen=True, kw_only=True, tag_field="call"):
    gear_root: str
    """The gateway's GEAR_ROOT. A process with another one does not claim the job."""
    token: str = msgspec.field(default_factory=lambda: secrets.token_hex(16))
    id: str = ""
    """The layer; empty if the job is for the whole GEAR_ROOT."""

    @property
    def call(self) -> str:
        """The name in logs, in metrics and in the name of the Celery task."""
        return str(self.__struct_config__.tag)


class ApplyDiff(_Job, frozen=True, kw_only=True, tag="apply_diff"):
    """Fill layer *id* from the tar in the stream."""

    parent: str = ""


class Diff(_Job, frozen=True, kw_only=True, tag="diff"):
    """Write the difference of layer *id* from *parent* to the stream, as a tar."""

    parent: str = ""


class Push(_Job, frozen=True, kw_only=True, tag="push"):
    """Push the pending objects to the remote."""


class CollectGarbage(_Job, frozen=True, kw_only=True, tag="collect_garbage"):
    """Remove unreferenced objects."""


class Dedupe(_Job, frozen=True, kw_only=True, tag="dedupe"):
    """Move the contents of the finished read-write layer *id* to the object store."""


HeavyJob = ApplyDiff | Diff
"""Docker waits for its result. It needs its stream, so it runs once and only for a gateway."""
MaintenanceJob = Push | CollectGarbage | Dedupe
"""No caller waits for it. It is idempotent, and can also run without a gateway."""
WorkerJob = HeavyJob | MaintenanceJob


class HttpConnection(msgspec.Struct, frozen=True, tag="http"):
    """The caller's own HTTP connection: the job reads the request's body, or writes the response.

    The message carries its descriptor (SCM_RIGHTS). It stays non-blocking, since the gateway shares that flag.
    """

    body_bytes: int = CHUNKED
    """Length of the request's body, or CHUNKED."""
    received: bytes = b""
    """The first bytes of the body, which the gateway has read already."""


class StoredBlob(msgspec.Struct, frozen=True, tag="stored_blob"):
    """A layer's blob in containerd's content store, compressed or not: an ApplyDiff reads the file."""

    path: str
    is_index: bool = False
    """Whether the file is the index of a layer instead (`images.layer_records`)."""


class NewBlob(msgspec.Struct, frozen=True, tag="new_blob"):
    """A blob that a Diff writes to containerd's content store."""

    address: str
    """containerd's socket."""
    namespace: str
    ref: str
    """Identifies the write in containerd; empty for one of our own."""
    media_type: str
    """A layer's media type; says how it is compressed."""
    labels: dict[str, str]
    max_mtime_ns: int | None = None
    """As for `Engine.diff`."""


ByteStream = HttpConnection | StoredBlob | NewBlob | None
"""The stream of a job; None for a MaintenanceJob."""


class Claim(msgspec.Struct, frozen=True, tag=True):
    """Asks for the job with this token."""

    token: str
    by: Claimant
    pid: int


class Granted(msgspec.Struct, frozen=True, tag=True):
    """Hands over a job. The process does this job, not the one from Redis, which other writers may have changed."""

    job: WorkerJob
    stream: ByteStream = None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Rejects a claim: another process has the job, or the gateway has withdrawn it."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Reports a change in the progress of the job to the gateway."""

    response_begun: bool = False
    """The first byte of the response is being written, so only an aborted connection can report an error now."""
    stalled: bool = False
    """The process waits for the caller to send or receive, and uses no core."""


class JobResult(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """The result of a job."""

    error: str = ""
    retryable: bool = False
    error_kind: str = ""
    """The name of the error's class."""
    size_bytes: int = 0
    digest: str = ""
    """The digest of the tar that was read from a StoredBlob, or of the NewBlob."""
    stream_bytes: int = 0
    """Length in bytes of that tar or blob."""
    figures: dict[str, int] = {}


Message = Claim | Granted | Refused | Progress | JobResult
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def frame(message: Message) -> bytes:
    """Return the message as a frame for the control connection."""
    data = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(data)) + data


class FrameBuffer:
    """Splits received bytes into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._data += data

    def next(self) -> Message | None:
        """Return the next message, or None if more bytes are needed.

        Raises:
            InvalidInput: The bytes are not a valid message, or it is too long.
        """
        if len(self._data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._data)
        if length > _FRAME_LIMIT_BYTES:
            raise InvalidInput(f"streams socket: a message of {length} bytes exceeds the limit")
        end = _LENGTH.size + length
        if len(self._data) < end:
            return None
        try:
            message = _decoder.decode(memoryview(self._data)[_LENGTH.size : end])
        except msgspec.DecodeError as exc:
            raise InvalidInput(f"streams socket: {exc}") from exc
        del self._data[:end]
        return message
