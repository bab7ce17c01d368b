"""containerd's way to apply layers, with the calls that the graphdriver's suite uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpc import StatusCode

from gearworkers.settings import Settings
from tests.conformance.drivers import DriverError
from tests.conformance.snapshots import new_key
from tests.support.containerd import Refused, SnapshotClient
from tests.support.fake_containerd import FakeContainerd
from tests.support.stack import Stack

_TAR = "application/vnd.oci.image.layer.v1.tar"
_BUGS = (StatusCode.UNKNOWN, StatusCode.INTERNAL, StatusCode.UNIMPLEMENTED, StatusCode.UNAVAILABLE)


class SnapshotDoor:
    """Layers are snapshots: `create` prepares one, `apply_diff` applies a blob, `get` commits it and shows a view.

    Args:
        stack: Its gateway serves *client*.
        client: Calls the gateway.
        containerd: Stores the blobs.
    """

    def __init__(self, stack: Stack, client: SnapshotClient, containerd: FakeContainerd) -> None:
        self._stack = stack
        self._client = client
        self._containerd = containerd
        self._active: dict[str, str] = {}
        self._committed: dict[str, str] = {}
        self._views: dict[str, str] = {}

    @property
    def settings(self) -> Settings:
        return Settings.from_environ(self._stack.environ())

    def create(self, id: str, parent: str = "") -> None:
        key = new_key(f"extract-1-{id} sha256:{id}")
        with _translated():
            self._client.prepare(key, self._commit(parent) if parent else "")
        self._active[id] = key

    def apply_diff(self, id: str, parent: str, source: bytes) -> int:
        blob = self._containerd.store(source, _TAR)
        with _translated():
            applied = self._client.apply(blob, self._client.mounts(self._active[id]))
        assert (applied.digest, applied.size) == (blob.digest, len(source))
        return applied.size

    def get(self, id: str) -> Path:
        with _translated():
            name, key = self._commit(id), new_key("view")
            (mount,) = self._client.view(key, name)
        self._views[id] = key
        return Path(mount.source)

    def put(self, id: str) -> None:
        self._client.remove(self._views.pop(id))

    def remove(self, id: str) -> None:
        layers = self._committed if id in self._committed else self._active
        self._client.remove(layers.pop(id))

    def close(self) -> None:
        """Remove all layers, children before their parents."""
        for id in [*self._active, *reversed(self._committed)]:
            self.remove(id)

    def _commit(self, id: str) -> str:
        """Commit a layer unless it is committed; return its name."""
        if id in self._active:
            name = new_key("committed")
            self._client.commit(self._active[id], name)
            del self._active[id]
            self._committed[id] = name
        return self._committed[id]


@contextmanager
def _translated() -> Iterator[None]:
    """Translate errors, and check that their code does not stand for a bug or make containerd ask another differ."""
    try:
        yield
    except Refused as exc:
        assert exc.code not in _BUGS, f"{exc.code}: {exc}"
        raise DriverError(str(exc)) from exc
