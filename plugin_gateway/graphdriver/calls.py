"""The light calls, which the gateway answers itself: each decodes a request and calls one method of the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gearworkers.layers.diff.changes import Change
from gearworkers.layers.idmap import IdRange
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.messages import InitRequest, LayerRequest, Response, decode, wire_change


class Driver(Protocol):
    """The driver that the gateway calls, from several threads at the same time. Errors are GearError."""

    @property
    def settings(self) -> Settings:
        """The settings with the options of the running dockerd; current after `prepare` and `init`."""

    def prepare(self) -> None:
        """Repair the leftovers of a crash."""

    def init(self, home: str, opts: Sequence[str], uid_maps: Sequence[IdRange], gid_maps: Sequence[IdRange]) -> None:
        """Start to serve a new dockerd."""

    def capabilities(self) -> dict[str, bool]:
        """Return the driver's capabilities."""

    def create(self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None) -> None:
        """Create an empty layer that ApplyDiff or a mount fills."""

    def create_read_write(
        self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None
    ) -> None:
        """Create the read-write layer of a container."""

    def remove(self, id: str) -> None:
        """Remove a layer."""

    def get(self, id: str, mount_label: str = "", *, may_wait: bool = True) -> str:
        """Mount a layer and return the path.

        Raises:
            LazyServerNeeded: The mount would wait for the lazy file server, and *may_wait* is False.
        """

    def put(self, id: str) -> None:
        """Remove one user of the mount; unmount after the last."""

    def exists(self, id: str) -> bool:
        """Whether there is such a layer."""

    def status(self) -> list[tuple[str, str]]:
        """Return names and values for `docker info`."""

    def get_metadata(self, id: str) -> dict[str, str]:
        """Return names and values for `docker inspect`."""

    def cleanup(self) -> None:
        """Unmount everything, when dockerd ends."""

    def release(self) -> None:
        """Unmount everything except containers, when the gateway ends."""

    def changes(self, id: str, parent: str) -> list[Change]:
        """Return the paths that differ from *parent*."""

    def diff_size(self, id: str, parent: str) -> int:
        """Return the size in bytes of the layer's files that differ from *parent*."""

    def can_dedupe(self, id: str) -> bool:
        """Whether the layer is a finished read-write layer whose contents are not shared yet."""


LightCall = Callable[[Driver, bytes], Response]


def init(driver: Driver, body: bytes) -> Response:
    """Answer GraphDriver.Init."""
    request = decode(body, InitRequest)
    driver.init(request.home, request.opts or (), request.uid_maps or (), request.gid_maps or ())
    return Response()


def _layer_call(call: Callable[[Driver, LayerRequest], Response | None]) -> LightCall:
    """Return the light call for *call* on one layer; its response is {} if *call* returns None."""

    def light(driver: Driver, body: bytes) -> Response:
        return call(driver, decode(body, LayerRequest)) or Response()

    return light


def blocking_get(driver: Driver, body: bytes) -> Response:
    """Answer GraphDriver.Get; wait for the lazy file server if the layer needs it."""
    request = decode(body, LayerRequest)
    return Response(dir=driver.get(request.id, request.mount_label))


def _changes(driver: Driver, request: LayerRequest) -> Response:
    return Response(changes=[wire_change(change) for change in driver.changes(request.id, request.parent)])


LIGHT_CALLS: Mapping[str, LightCall] = {
    "GraphDriver.Init": init,
    "GraphDriver.Capabilities": _layer_call(lambda d, r: Response(capabilities=d.capabilities())),
    "GraphDriver.Create": _layer_call(lambda d, r: d.create(r.id, r.parent, r.mount_label, r.storage_opt)),
    "GraphDriver.CreateReadWrite": _layer_call(
        lambda d, r: d.create_read_write(r.id, r.parent, r.mount_label, r.storage_opt)
    ),
    "GraphDriver.Remove": _layer_call(lambda d, r: d.remove(r.id)),
    "GraphDriver.Get": _layer_call(lambda d, r: Response(dir=d.get(r.id, r.mount_label, may_wait=False))),
    "GraphDriver.Put": _layer_call(lambda d, r: d.put(r.id)),
    "GraphDriver.Exists": _layer_call(lambda d, r: Response(exists=d.exists(r.id))),
    "GraphDriver.Status": _layer_call(lambda d, r: Response(status=d.status())),
    "GraphDriver.GetMetadata": _layer_call(lambda d, r: Response(metadata=d.get_metadata(r.id))),
    "GraphDriver.Cleanup": _layer_call(lambda d, r: d.cleanup()),
    "GraphDriver.Changes": _layer_call(_changes),
    "GraphDriver.DiffSize": _layer_call(lambda d, r: Response(size=d.diff_size(r.id, r.parent))),
}


def layer_id(body: bytes) -> str:
    """Return the layer id in a request's body."""
    return decode(body, LayerRequest).id
