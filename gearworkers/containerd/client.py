"""A client of containerd's API: plugins, images, containers, leases, and blobs for the content store.

Source: containerd's api/services and core/content, "Writer".
"""

from __future__ import annotations

import hashlib
import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from gearworkers.containerd.api import (
    containers_pb2,
    content_pb2,
    images_pb2,
    introspection_pb2,
    layers_pb2,
    leases_pb2,
    version_pb2,
)
from gearworkers.errors import (
    AlreadyExists,
    FailedPrecondition,
    GearError,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

_M = TypeVar("_M", bound=Message)

_TIMEOUT_S = 30.0
_MAX_MESSAGE_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_MAX_QUEUED_PIECES = 8
_POLL_S = 1.0
_LEASE_LIFE = timedelta(hours=1)
_EXPIRE_LABEL = "containerd.io/gc.expire"
_CONTENT_PLUGIN = ("io.containerd.content.v1", "content")
CONTAINERD = "containerd"
GATEWAY = "the gateway"
_ERRORS: Mapping[grpc.StatusCode, type[GearError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
}


class Client:
    """Calls containerd in one namespace. Use from several threads; close it at the end.

    Args:
        channel: The gRPC channel.
        address: containerd's socket, for errors.
        namespace: containerd's namespace.
        server: Who listens there, for errors: CONTAINERD or GATEWAY.
    """

    def __init__(self, channel: grpc.Channel, address: Path, namespace: str, server: str) -> None:
        self._channel = channel
        self._address = address
        self._server = server
        self._metadata: tuple[tuple[str, str], ...] = (("containerd-namespace", namespace),) if namespace else ()

    def version(self) -> str:
        """Return containerd's version, such as ``1.7.24`` or ``v2.1.9``; Unavailable if it does not answer."""
        return self._call(
            "/containerd.services.version.v1.Version/Version", Empty(), version_pb2.VersionResponse
        ).version

    def plugin(self, type: str, id: str) -> introspection_pb2.Plugin:
        """Return the description of a plugin.

        Raises:
            Unavailable: containerd does not answer.
            NotFound: containerd does not have the plugin.
        """
        request = introspection_pb2.PluginsRequest(filters=[f"type=={type},id=={id}"])
        call = "/containerd.services.introspection.v1.Introspection/Plugins"
        for plugin in self._call(call, request, introspection_pb2.PluginsResponse).plugins:
            return plugin
        raise NotFound(f"containerd at {self._address} has no plugin {type}.{id}")

    def content_directory(self) -> Path:
        """Return the directory of the content store.

        Raises:
            Unavailable: containerd does not answer.
            NotFound: containerd has no content store of its own.
        """
        root = self.plugin(*_CONTENT_PLUGIN).exports.get("root")
        if not root:
            raise NotFound(f"containerd at {self._address} has no content directory of its own")
        return Path(root)

    def images(self, *filters: str) -> list[images_pb2.Image]:
        """Return the images of the namespace that match one of *filters*, in containerd's syntax.

        Raises:
            Unavailable: containerd does not answer.
        """
        request = images_pb2.ListImagesRequest(filters=filters)
        call = "/containerd.services.images.v1.Images/List"
        return list(self._call(call, request, images_pb2.ListImagesResponse).images)

    def containers(self, *filters: str) -> list[containers_pb2.Container]:
        """Return the containers of the namespace; filters and errors as `images`."""
        request = containers_pb2.ListContainersRequest(filters=filters)
        call = "/containerd.services.containers.v1.Containers/List"
        return list(self._call(call, request, containers_pb2.ListContainersResponse).containers)

    def find_layer(self, key: str) -> layers_pb2.FindLayerResponse:
        """Return GEAR_ROOT and layer of a snapshot in the namespace; only the gateway has this call.

        Args:
            key: Of an active snapshot, or the name of a committed one, as containerd's clients use it.

        Raises:
            Unavailable: The gateway does not answer.
            NotFound: It has no such snapshot.
        """
        request = layers_pb2.FindLayerRequest(key=key)
        return self._call("/gearworkers.layers.v1.Layers/Find", request, layers_pb2.FindLayerResponse)

    def create_lease(self) -> str:
        """Return the id of a new lease, which expires after an hour."""
        expires = (datetime.now(UTC) + _LEASE_LIFE).strftime("%Y-%m-%dT%H:%M:%SZ")
        request = leases_pb2.CreateRequest(id=f"gear-{secrets.token_hex(8)}", labels={_EXPIRE_LABEL: expires})
        call = "/containerd.services.leases.v1.Leases/Create"
        return self._call(call, request, leases_pb2.CreateResponse).lease.id

    def list_content(self, filter: str) -> list[str]:
        """Return the digests of the blobs that match *filter*, in containerd's syntax.

        Raises:
            Unavailable: containerd does not answer.
        """
        call = self._channel.unary_stream(
            "/containerd.services.content.v1.Content/List",
            request_serializer=content_pb2.ListContentRequest.SerializeToString,
            response_deserializer=content_pb2.ListContentResponse.FromString,
        )
        request = content_pb2.ListContentRequest(filters=[filter])
        try:
            responses = call(request, timeout=_TIMEOUT_S, metadata=self._metadata)
            return [info.digest for response in responses for info in response.info]
        except grpc.RpcError as exc:
            raise self._translated(exc, "Content.List") from exc

    def write_content(
        self, requests: Iterator[content_pb2.WriteContentRequest], lease: str
    ) -> Iterator[content_pb2.WriteContentResponse]:
        """Call Content.Write; yield its responses. The blob belongs to *lease*.

        Raises:
            AlreadyExists: The store has the blob.
            GearError: containerd refuses, or does not answer.
        """
        write = self._channel.stream_stream(
            "/containerd.services.content.v1.Content/Write",
            request_serializer=content_pb2.WriteContentRequest.SerializeToString,
            response_deserializer=content_pb2.WriteContentResponse.FromString,
        )
        try:
            yield from write(requests, metadata=(*self._metadata, ("containerd-lease", lease)))
        except grpc.RpcError as exc:
            raise self._translated(exc, "Content.Write") from exc

    def _call(self, path: str, request: Message, response: type[_M]) -> _M:
        call = self._channel.unary_unary(
            path, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
        )
        try:
            return call(request, timeout=_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as exc:
            raise self._translated(exc, path.rpartition(".")[2]) from exc

    def _translated(self, exc: Any, call: str) -> GearError:
        kind = _ERRORS.get(exc.code(), GearError)
        if kind is Unavailable:
            return Unavailable(f"{self._server} does not answer at {self._address}: {exc.details()}")
        return kind(f"{call} of {self._server} at {self._address}: {exc.details()}")


@contextmanager
def connected(address: Path, namespace: str = "", *, server: str = CONTAINERD) -> Iterator[Client]:
    """Yield a client of the *server* that listens at *address*; connects with the first call."""
    options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"unix:{address}", options=options) as channel:
        yield Client(channel, address, namespace, server)


class StoredContent(NamedTuple):
    """A blob in containerd's content store."""

    digest: str
    size_bytes: int


class BlobWriter:
    """Writes one blob to containerd's content store; `Writable`. Its bytes are visible after `commit`.

    A thread sends the bytes.

    Args:
        client: The client for the blob's namespace.
        ref: Identifies the write; empty for one of our own.
    """

    def __init__(self, client: Client, ref: str) -> None:
        self._client = client
        self._ref = ref or f"gear-{time.time_ns()}-{secrets.token_hex(4)}"
        self._hasher = hashlib.sha256()
        self._piece = bytearray()
        self._size_bytes = 0
        self._pieces: queue.Queue[content_pb2.WriteContentRequest | None] = queue.Queue(_MAX_QUEUED_PIECES)
        self._error: BaseException | None = None
        self._lease = client.create_lease()
        self._thread = threading.Thread(target=self._send, name="content", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Write all of *data*.

        Raises:
            GearError: containerd refuses, or does not answer.
        """
        self._hasher.update(data)
        self._piece += data
        if len(self._piece) >= _PIECE_BYTES:
            self._flush()

    def commit(self, labels: Mapping[str, str]) -> StoredContent:
        """Make the blob visible with *labels*; one that the store already has stays as it is.

        Raises:
            GearError: As `write`.
        """
        self._flush()
        digest = f"sha256:{self._hasher.hexdigest()}"
        action = content_pb2.WriteAction.COMMIT
        self._put(self._request(action, total=self._size_bytes, expected=digest, labels=dict(labels)))
        self._put(None)
        self._thread.join()
        if self._error is not None and not isinstance(self._error, AlreadyExists):
            raise self._error
        return StoredContent(digest, self._size_bytes)

    def abort(self) -> None:
        """End the thread; containerd drops the bytes. Does nothing after `commit`."""
        while self._thread.is_alive():
            try:
                self._pieces.put(None, timeout=_POLL_S)
            except queue.Full:
                continue
            self._thread.join()

    def _flush(self) -> None:
        if self._piece:
            self._put(self._request(content_pb2.WriteAction.WRITE, data=bytes(self._piece)))
            self._size_bytes += len(self._piece)
            self._piece.clear()

    def _request(self, action: content_pb2.WriteAction, **fields: Any) -> content_pb2.WriteContentRequest:
        return content_pb2.WriteContentRequest(action=action, ref=self._ref, offset=self._size_bytes, **fields)

    def _put(self, request: content_pb2.WriteContentRequest | None) -> None:
        while self._thread.is_alive():
            try:
                self._pieces.put(request, timeout=_POLL_S)
                return
            except queue.Full:
                continue
        if self._error is not None and not isinstance(self._error, AlreadyExists):
            raise self._error

    def _send(self) -> None:
        try:
            for _ in self._client.write_content(iter(self._pieces.get, None), self._lease):
                pass
        except BaseException as exc:
            self._error = exc
