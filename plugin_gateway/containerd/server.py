"""The gRPC server: containerd's snapshots and diff services on a Unix socket, and one call for `gear`.

Requests run in threads. Heavy calls become jobs for the dispatcher, which runs on the gateway's event loop.

Source: containerd's docs/PLUGINS.md, "Proxy Plugins".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import structlog
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from gearworkers.containerd.api import diff_pb2, layers_pb2, snapshots_pb2, types_pb2
from gearworkers.errors import (
    AlreadyExists,
    FailedPrecondition,
    GearError,
    IntegrityError,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unavailable,
    from_os_error,
)
from plugin_gateway.containerd.diffs import Diffs, Unsupported
from plugin_gateway.containerd.ready_layers import ReadyLayers
from plugin_gateway.containerd.snapshot_table import Snapshot, SnapshotKind
from plugin_gateway.containerd.snapshots import Mount, Snapshots
from plugin_gateway.metrics import GatewayMetrics
from plugin_gateway.sockets import require_unused

_log = structlog.stdlib.get_logger(__name__)

_THREADS = 64
_GRACE_S = 10.0
_MAX_MESSAGE_BYTES = 16 << 20
_LIST_BATCH = 100
_CODES: tuple[tuple[type[GearError], grpc.StatusCode], ...] = (
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (IntegrityError, grpc.StatusCode.DATA_LOSS),
    (ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (Unsupported, grpc.StatusCode.UNIMPLEMENTED),
)
_KINDS = {
    SnapshotKind.VIEW: snapshots_pb2.Kind.VIEW,
    SnapshotKind.ACTIVE: snapshots_pb2.Kind.ACTIVE,
    SnapshotKind.COMMITTED: snapshots_pb2.Kind.COMMITTED,
}


class _Call(NamedTuple):
    """One call of a service."""

    request: type[Message]
    answer: Callable[[Any, Mapping[str, str]], Any]
    streams: bool = False
    """Whether the answer is an iterator of messages."""


class SnapshotEvents(NamedTuple):
    """Functions that are called after calls of containerd, from any thread."""

    removed: Callable[[], object]
    """After the removal of a snapshot."""
    applied: Callable[[], object]
    """After an Apply."""
    written: Callable[[str], object]
    """After the commit of a layer that was written through a mount."""


class ContainerdServer:
    """Answers containerd.

    Args:
        path: The socket.
        snapshots: Answers the snapshotter's calls.
        ready: Commits the layers that need no download.
        diffs: Answers the differ's calls.
        metrics: Counts the calls.
        events: Called after calls that make maintenance due.
    """

    def __init__(
        self,
        path: Path,
        snapshots: Snapshots,
        ready: ReadyLayers,
        diffs: Diffs,
        metrics: GatewayMetrics,
        events: SnapshotEvents,
    ) -> None:
        self._path = path
        self._snapshots = snapshots
        self._ready = ready
        self._diffs = diffs
        self._metrics = metrics
        self._events = events
        self._server: grpc.Server | None = None

    def open(self) -> None:
        """Answer calls.

        Raises:
            FailedPrecondition: Another process listens on the socket.
            GearError: The kernel refuses.
        """
        require_unused(self._path)
        threads = ThreadPoolExecutor(_THREADS, "containerd")
        options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)]
        server = grpc.server(threads, options=options)
        for service, calls in self._services().items():
            handlers = {name: self._handler(name, call) for name, call in calls.items()}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        try:
            server.add_insecure_port(f"unix:{self._path}")
            self._path.chmod(0o600)
        except (RuntimeError, OSError) as exc:
            error = exc if isinstance(exc, OSError) else OSError(str(exc))
            raise from_os_error(error, f"listen on {self._path}") from exc
        server.start()
        self._server = server

    async def close(self) -> None:
        """Accept no new calls, let running calls finish within their grace, remove the socket."""
        if self._server is not None:
            await asyncio.to_thread(self._server.stop(_GRACE_S).wait)
            self._server = None
            self._path.unlink(missing_ok=True)

    # -- dispatch

    def _handler(self, name: str, call: _Call) -> Any:
        make = grpc.unary_stream_rpc_method_handler if call.streams else grpc.unary_unary_rpc_method_handler
        return make(
            self._streaming(name, call) if call.streams else self._unary(name, call),
            request_deserializer=call.request.FromString,
            response_serializer=lambda response: response.SerializeToString(),
        )

    def _unary(self, name: str, call: _Call) -> Callable[[Any, grpc.ServicerContext], Any]:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            began_s = time.perf_counter()
            failed = True
            try:
                response = call.answer(request, _metadata(context))
                failed = False
                return response
            except Exception as exc:
                _abort(context, name, exc)
            finally:
                self._metrics.observe(f"containerd.{name}", time.perf_counter() - began_s, failed)

        return answer

    def _streaming(self, name: str, call: _Call) -> Callable[[Any, grpc.ServicerContext], Any]:
        unary = self._unary(name, call)

        def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from unary(request, context)

        return answer

    def _services(self) -> dict[str, dict[str, _Call]]:
        s = snapshots_pb2
        return {
            "containerd.services.snapshots.v1.Snapshots": {
                "Prepare": _Call(s.PrepareSnapshotRequest, self._prepare),
                "View": _Call(s.ViewSnapshotRequest, self._view),
                "Mounts": _Call(s.MountsRequest, self._mounts),
                "Commit": _Call(s.CommitSnapshotRequest, self._commit),
                "Remove": _Call(s.RemoveSnapshotRequest, self._remove),
                "Stat": _Call(s.StatSnapshotRequest, self._stat),
                "Update": _Call(s.UpdateSnapshotRequest, self._update),
                "List": _Call(s.ListSnapshotsRequest, self._list, streams=True),
                "Usage": _Call(s.UsageRequest, self._usage),
                "Cleanup": _Call(s.CleanupRequest, self._cleanup),
            },
            "containerd.services.diff.v1.Diff": {
                "Apply": _Call(diff_pb2.ApplyRequest, self._apply),
                "Diff": _Call(diff_pb2.DiffRequest, self._diff),
            },
            "gearworkers.layers.v1.Layers": {"Find": _Call(layers_pb2.FindLayerRequest, self._find_layer)},
        }

    # -- snapshots

    def _prepare(self, request: snapshots_pb2.PrepareSnapshotRequest, _: Mapping[str, str]) -> Message:
        if self._ready.commit(request.key, request.parent, request.labels):
            self._events.applied()
            raise AlreadyExists(f"the layer of snapshot {request.key} is committed already")
        mounts = self._snapshots.prepare(request.key, request.parent, request.labels)
        return snapshots_pb2.PrepareSnapshotResponse(mounts=_mounts(mounts))

    def _view(self, request: snapshots_pb2.ViewSnapshotRequest, _: Mapping[str, str]) -> Message:
        mounts = self._snapshots.view(request.key, request.parent, request.labels)
        return snapshots_pb2.ViewSnapshotResponse(mounts=_mounts(mounts))

    def _mounts(self, request: snapshots_pb2.MountsRequest, _: Mapping[str, str]) -> Message:
        return snapshots_pb2.MountsResponse(mounts=_mounts(self._snapshots.mounts(request.key)))

    def _commit(self, request: snapshots_pb2.CommitSnapshotRequest, _: Mapping[str, str]) -> Message:
        if written := self._snapshots.commit(request.key, request.name, request.labels, request.parent):
            self._events.written(written)
        return Empty()

    def _remove(self, request: snapshots_pb2.RemoveSnapshotRequest, _: Mapping[str, str]) -> Message:
        self._snapshots.remove(request.key)
        self._events.removed()
        return Empty()

    def _stat(self, request: snapshots_pb2.StatSnapshotRequest, _: Mapping[str, str]) -> Message:
        return snapshots_pb2.StatSnapshotResponse(info=_info(self._snapshots.stat(request.key)))

    def _update(self, request: snapshots_pb2.UpdateSnapshotRequest, _: Mapping[str, str]) -> Message:
        updated = self._snapshots.update(request.info.name, request.info.labels, request.update_mask.paths)
        return snapshots_pb2.UpdateSnapshotResponse(info=_info(updated))

    def _list(self, request: snapshots_pb2.ListSnapshotsRequest, _: Mapping[str, str]) -> Iterator[Message]:
        found = [_info(snapshot) for snapshot in self._snapshots.list(request.filters)]
        return (
            snapshots_pb2.ListSnapshotsResponse(info=found[start : start + _LIST_BATCH])
            for start in range(0, len(found), _LIST_BATCH)
        )

    def _usage(self, request: snapshots_pb2.UsageRequest, _: Mapping[str, str]) -> Message:
        usage = self._snapshots.usage(request.key)
        return snapshots_pb2.UsageResponse(size=usage.size_bytes, inodes=usage.inodes)

    def _cleanup(self, _: snapshots_pb2.CleanupRequest, __: Mapping[str, str]) -> Message:
        self._events.removed()
        return Empty()

    def _find_layer(self, request: layers_pb2.FindLayerRequest, metadata: Mapping[str, str]) -> Message:
        root, layer = self._snapshots.find_layer(metadata.get("containerd-namespace", ""), request.key)
        return layers_pb2.FindLayerResponse(root=str(root), layer=layer)

    # -- diffs

    def _apply(self, request: diff_pb2.ApplyRequest, _: Mapping[str, str]) -> Message:
        blob = request.diff
        applied = self._diffs.apply(blob.media_type, blob.digest, _mounts_of(request.mounts))
        self._events.applied()
        descriptor = types_pb2.Descriptor(media_type=applied.media_type, digest=applied.digest, size=applied.size_bytes)
        return diff_pb2.ApplyResponse(applied=descriptor)

    def _diff(self, request: diff_pb2.DiffRequest, metadata: Mapping[str, str]) -> Message:
        stored = self._diffs.diff(
            _mounts_of(request.left),
            _mounts_of(request.right),
            media_type=request.media_type,
            ref=request.ref,
            labels=request.labels,
            namespace=metadata.get("containerd-namespace", ""),
            max_mtime_ns=request.source_date_epoch.ToNanoseconds() if request.HasField("source_date_epoch") else None,
        )
        descriptor = types_pb2.Descriptor(media_type=stored.media_type, digest=stored.digest, size=stored.size_bytes)
        return diff_pb2.DiffResponse(diff=descriptor)


def _abort(context: grpc.ServicerContext, name: str, exc: Exception) -> None:
    """End the call with the code that containerd expects."""
    for kind, code in _CODES:
        if isinstance(exc, kind):
            context.abort(code, str(exc))
    if isinstance(exc, GearError):
        context.abort(grpc.StatusCode.UNKNOWN, str(exc))
    if isinstance(exc, OSError):
        _abort(context, name, from_os_error(exc, name))
    _log.exception("call failed: a bug", call=name)
    context.abort(grpc.StatusCode.INTERNAL, f"internal error in {name}: {type(exc).__name__}: {exc}")


def _metadata(context: grpc.ServicerContext) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}


def _mounts(mounts: Iterable[Mount]) -> list[types_pb2.Mount]:
    return [types_pb2.Mount(type=mount.type, source=mount.source, options=mount.options) for mount in mounts]


def _mounts_of(mounts: Iterable[types_pb2.Mount]) -> list[Mount]:
    return [Mount(mount.type, mount.source, tuple(mount.options)) for mount in mounts]


def _info(snapshot: Snapshot) -> snapshots_pb2.Info:
    info = snapshots_pb2.Info(
        name=snapshot.name,
        parent=snapshot.parent,
        kind=_KINDS[snapshot.kind],
        labels=snapshot.labels,
    )
    info.created_at.FromNanoseconds(snapshot.created_ns)
    info.updated_at.FromNanoseconds(snapshot.updated_ns)
    return info
