"""A client of the gateway's snapshots and diff services, as containerd is one, and mounts of snapshots."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from gearworkers.containerd.api import diff_pb2, snapshots_pb2
from gearworkers.containerd.api.snapshots_pb2 import Info, UsageResponse
from gearworkers.containerd.api.types_pb2 import Descriptor, Mount
from gearworkers.util import syscalls

_TIMEOUT_S = 90.0
_SNAPSHOTS = "/containerd.services.snapshots.v1.Snapshots"
_DIFF = "/containerd.services.diff.v1.Diff"
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)

_M = TypeVar("_M", bound=Message)
Labels = Mapping[str, str] | None


class Refused(Exception):
    """The gateway returned an error."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


@contextmanager
def refused(code: grpc.StatusCode, match: str | None = None) -> Iterator[None]:
    """Check that a call in the context is refused with *code* and a message that contains the pattern *match*."""
    with pytest.raises(Refused, match=match) as caught:
        yield
    assert caught.value.code is code, caught.value


class SnapshotClient:
    """The calls of both services; each raises Refused if the gateway returns an error.

    Args:
        channel: The gRPC channel.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    # -- snapshots

    def prepare(self, key: str, parent: str = "", labels: Labels = None) -> list[Mount]:
        request = snapshots_pb2.PrepareSnapshotRequest(key=key, parent=parent, labels=labels)
        return list(self._call(f"{_SNAPSHOTS}/Prepare", request, snapshots_pb2.PrepareSnapshotResponse).mounts)

    def view(self, key: str, parent: str = "", labels: Labels = None) -> list[Mount]:
        request = snapshots_pb2.ViewSnapshotRequest(key=key, parent=parent, labels=labels)
        return list(self._call(f"{_SNAPSHOTS}/View", request, snapshots_pb2.ViewSnapshotResponse).mounts)

    def mounts(self, key: str) -> list[Mount]:
        request = snapshots_pb2.MountsRequest(key=key)
        return list(self._call(f"{_SNAPSHOTS}/Mounts", request, snapshots_pb2.MountsResponse).mounts)

    def commit(self, key: str, name: str, labels: Labels = None, parent: str = "") -> None:
        request = snapshots_pb2.CommitSnapshotRequest(key=key, name=name, labels=labels, parent=parent)
        self._call(f"{_SNAPSHOTS}/Commit", request, Empty)

    def remove(self, key: str) -> None:
        self._call(f"{_SNAPSHOTS}/Remove", snapshots_pb2.RemoveSnapshotRequest(key=key), Empty)

    def stat(self, key: str) -> Info:
        request = snapshots_pb2.StatSnapshotRequest(key=key)
        return self._call(f"{_SNAPSHOTS}/Stat", request, snapshots_pb2.StatSnapshotResponse).info

    def update(self, info: Info, *paths: str) -> Info:
        request = snapshots_pb2.UpdateSnapshotRequest(info=info, update_mask=FieldMask(paths=paths))
        return self._call(f"{_SNAPSHOTS}/Update", request, snapshots_pb2.UpdateSnapshotResponse).info

    def list(self, *filters: str) -> Iterator[Info]:
        """Yield the snapshots as they arrive; other calls may be made meanwhile."""
        call = self._channel.unary_stream(
            f"{_SNAPSHOTS}/List",
            request_serializer=snapshots_pb2.ListSnapshotsRequest.SerializeToString,
            response_deserializer=snapshots_pb2.ListSnapshotsResponse.FromString,
        )
        request = snapshots_pb2.ListSnapshotsRequest(filters=filters)
        with _translated():
            for response in call(request, timeout=_TIMEOUT_S, wait_for_ready=True):
                yield from response.info

    def usage(self, key: str) -> UsageResponse:
        return self._call(f"{_SNAPSHOTS}/Usage", snapshots_pb2.UsageRequest(key=key), UsageResponse)

    def cleanup(self) -> None:
        self._call(f"{_SNAPSHOTS}/Cleanup", snapshots_pb2.CleanupRequest(), Empty)

    # -- diffs

    def apply(self, blob: Descriptor, mounts: Iterable[Mount]) -> Descriptor:
        request = diff_pb2.ApplyRequest(diff=blob, mounts=mounts)
        return self._call(f"{_DIFF}/Apply", request, diff_pb2.ApplyResponse).applied

    def diff(self, left: Iterable[Mount], right: Iterable[Mount], media_type: str = "") -> Descriptor:
        request = diff_pb2.DiffRequest(left=left, right=right, media_type=media_type)
        return self._call(f"{_DIFF}/Diff", request, diff_pb2.DiffResponse).diff

    def _call(self, path: str, request: Message, response: type[_M]) -> _M:
        return unary(self._channel, path, request, response)


def unary(channel: grpc.Channel, path: str, request: Message, response: type[_M]) -> _M:
    """Call a method of a gRPC service; wait until the service listens.

    Args:
        channel: To the service.
        path: ``/SERVICE/METHOD``.
        request: The argument.
        response: The type of the answer.

    Raises:
        Refused: The service returned an error.
    """
    call = channel.unary_unary(
        path, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
    )
    with _translated():
        return call(request, timeout=_TIMEOUT_S, wait_for_ready=True)


@contextmanager
def connected(socket: Path) -> Iterator[SnapshotClient]:
    """Yield a client of the gateway's *socket*. Its calls wait until the gateway listens."""
    with channel_to(socket) as channel:
        yield SnapshotClient(channel)


def channel_to(socket: Path) -> grpc.Channel:
    """Return a channel of its own to a Unix socket; it reconnects quickly."""
    return grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)


@contextmanager
def mounted(mounts: Sequence[Mount]) -> Iterator[Path]:
    """Mount a snapshot in a temporary directory as containerd does, and yield the directory."""
    (mount,) = mounts
    assert mount.type == "bind", mount
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory)
        subprocess.run(["mount", "-o", ",".join(mount.options), mount.source, directory], check=True)
        try:
            yield target
        finally:
            syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as exc:
        assert isinstance(exc, grpc.Call)
        raise Refused(exc.code(), exc.details() or "") from exc
