"""The light calls: what the gateway answers by itself, each a request, a method of the driver, an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gearworkers.layers.diff.changes import Change
from gearworkers.layers.idmap import IDMap
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.messages import InitRequest, LayerRequest, Response, decode, wire_change


class Driver(Protocol):
    """What the gateway asks of a driver; called from several threads at a time. Errors are GearError."""

    @property
    def settings(self) -> Settings:
        """As they are after Init; after prepare those of a dockerd that runs."""

    def prepare(self) -> None:
        """Repair what a crash left."""

    def init(self, home: str, opts: Sequence[str], uid_maps: Sequence[IDMap], gid_maps: Sequence[IDMap]) -> None:
        """A dockerd has started."""

    def capabilities(self) -> dict[str, bool]:
        """What the driver can."""

    def create(self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None) -> None:
        """Make a layer to be filled."""

    def create_read_write(
        self, id: str, parent: str, mount_label: str = "", storage_opt: Mapping[str, str] | None = None
    ) -> None:
        """Make a layer that a container writes."""

    def remove(self, id: str) -> None:
        """Remove a layer."""

    def get(self, id: str, mount_label: str = "", *, may_wait: bool = True) -> str:
        """Mount a layer; where. LazyServerNeeded if that waits for the lazy file server and it may not."""

    def put(self, id: str) -> None:
        """One user of the mount less."""

    def exists(self, id: str) -> bool:
        """Whether there is such a layer."""

    def status(self) -> list[tuple[str, str]]:
        """For docker info."""

    def get_metadata(self, id: str) -> dict[str, str]:
        """For docker inspect."""

    def cleanup(self) -> None:
        """dockerd ends."""

    def release(self) -> None:
        """The gateway ends: keep only the mounts that containers have."""

    def changes(self, id: str, parent: str) -> list[Change]:
        """For docker diff."""

    def diff_size(self, id: str, parent: str) -> int:
        """Bytes of the difference."""

    def can_dedupe(self, id: str) -> bool:
        """Whether a finished read-write layer still keeps its contents to itself."""


Light = Callable[[Driver, bytes], Response]


def init(driver: Driver, body: bytes) -> Response:
    """GraphDriver.Init."""
    request = decode(body, InitRequest)
    driver.init(request.home, request.opts or (), request.uid_maps or (), request.gid_maps or ())
    return Response()


def _layer_call(call: Callable[[Driver, LayerRequest], Response | None]) -> Light:
    """A call on a layer; one that gives nothing answers {}."""

    def light(driver: Driver, body: bytes) -> Response:
        return call(driver, decode(body, LayerRequest)) or Response()

    return light


def get_patiently(driver: Driver, body: bytes) -> Response:
    """GraphDriver.Get of a layer that has to wait."""
    request = decode(body, LayerRequest)
    return Response(dir=driver.get(request.id, request.mount_label))


def _changes(driver: Driver, request: LayerRequest) -> Response:
    return Response(changes=[wire_change(change) for change in driver.changes(request.id, request.parent)])


LIGHT_CALLS: Mapping[str, Light] = {
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
    """The id that a call was about."""
    return decode(body, LayerRequest).id
