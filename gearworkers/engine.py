"""All that works on one GEAR_ROOT, put together once."""

from __future__ import annotations

from dataclasses import dataclass

from gearworkers.cas.push_queue import PushSpool
from gearworkers.cas.refs import OBJECTS_FILE
from gearworkers.cas.store import ObjectStore
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.index.probe import IndexMode
from gearworkers.layers.mounts import MountedLayers
from gearworkers.layers.recovery import make_ready
from gearworkers.layers.store import MERGED, Kind, LayerStore
from gearworkers.layers.usage import UsageMeter
from gearworkers.mounts.overlay import is_mounted
from gearworkers.profiles.hooks import Starts
from gearworkers.profiles.recordings import Recordings
from gearworkers.settings import Settings


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts that belong to one GEAR_ROOT; they never change, so whoever has the engine sees one root alone.

    Several processes of a node may have one of the same root. In one process there should be one only: its parts hold
    the locks that keep its threads from each other.
    """

    settings: Settings
    objects: ObjectStore
    layers: LayerStore
    spool: PushSpool
    usage: UsageMeter
    starts: Starts
    mounts: MountedLayers
    index_mode: IndexMode

    @classmethod
    def of(cls, settings: Settings) -> Engine:
        """The engine of the settings' root; touches nothing on the disk."""
        objects = ObjectStore(settings.gear_public_cache_path)
        layers = LayerStore(settings, objects)
        starts = Starts(settings, layers, Recordings())
        return cls(
            settings,
            objects,
            layers,
            PushSpool(settings.gear_push_path, objects),
            UsageMeter(layers, objects),
            starts,
            MountedLayers(settings, layers, starts),
            IndexMode(settings.gear_root),
        )

    def id_maps(self) -> IdMaps:
        """Who owns what on the disk, as the last Init said."""
        return IdMaps.load(self.settings.gear_root)

    def prepare(self) -> None:
        """Make what is missing under the root and repair what a crash left; while no other process uses it.

        Raises:
            GearError: The root cannot be used.
        """
        make_ready(self.settings, self.objects, self.layers, self.spool)
        self.mounts.prepare()

    def is_absorbable(self, id: str) -> bool:
        """Whether the layer, whose Diff was taken, still has its contents in itself, though it need not.

        Nobody writes it any more, and it is not private.
        """
        layer = self.layers.get(id)
        directory = self.layers.directory(layer)
        return (
            layer.kind is Kind.CONTAINER
            and layer.absorbable
            and not (directory / OBJECTS_FILE).exists()
            and not is_mounted(directory / MERGED)
            and not self.layers.is_private(id)
        )
