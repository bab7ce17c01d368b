"""A containerd that has only a content directory, a proxy snapshotter, and an introspection service."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from gearworkers.containerd.api import introspection_pb2
from gearworkers.containerd.api.types_pb2 import Descriptor
from gearworkers.containerd.config import REMAP_IDS, SNAPSHOTTER, SNAPSHOTTER_TYPE

_SERVICE = "containerd.services.introspection.v1.Introspection"
_CONTENT = ("io.containerd.content.v1", "content")
_SNAPSHOTTER = (SNAPSHOTTER_TYPE, SNAPSHOTTER)


class FakeContainerd:
    """Answers which directory its content store has, and which capabilities our snapshotter has.

    Args:
        socket: Where it listens after `start`.
        content: The directory.
    """

    def __init__(self, socket: Path, content: Path) -> None:
        self.exports: Mapping[str, str] = {"root": str(content)}
        """The exports of the content plugin."""
        self.capabilities: list[str] | None = [REMAP_IDS]
        """The capabilities of our snapshotter in the configuration; None if it is not there."""
        self._socket = socket
        self._content = content
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Answer calls."""
        server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_unary_rpc_method_handler(
            self._plugins,
            request_deserializer=introspection_pb2.PluginsRequest.FromString,
            response_serializer=introspection_pb2.PluginsResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"Plugins": handler}),))
        server.add_insecure_port(f"unix:{self._socket}")
        server.start()
        self._server = server

    def stop(self) -> None:
        """Close the socket."""
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None
            self._socket.unlink(missing_ok=True)

    def blob_path(self, data: bytes) -> Path:
        """Return the path of the blob with these bytes, stored or not."""
        return self._content / "blobs" / "sha256" / hashlib.sha256(data).hexdigest()

    def store(self, data: bytes, media_type: str) -> Descriptor:
        """Store a blob and return its descriptor."""
        path = self.blob_path(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return descriptor(data, media_type)

    def _plugins(
        self, request: introspection_pb2.PluginsRequest, _: grpc.ServicerContext
    ) -> introspection_pb2.PluginsResponse:
        plugins = [introspection_pb2.Plugin(type=_CONTENT[0], id=_CONTENT[1], exports=self.exports)]
        if self.capabilities is not None:
            type, id = _SNAPSHOTTER
            plugins.append(introspection_pb2.Plugin(type=type, id=id, capabilities=self.capabilities))
        (filter,) = request.filters
        found = [plugin for plugin in plugins if filter == f"type=={plugin.type},id=={plugin.id}"]
        return introspection_pb2.PluginsResponse(plugins=found)


def descriptor(data: bytes, media_type: str) -> Descriptor:
    """Return the descriptor of a blob."""
    return Descriptor(media_type=media_type, digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size=len(data))
