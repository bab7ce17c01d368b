"""Preparation of a GEAR_ROOT at a gateway's start: repair of the leftovers of a crash, and garbage collection."""

from __future__ import annotations

from pathlib import Path

from gearworkers.cas.collector import GarbageCollector, GarbageReport, publishing
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.store import ObjectStore
from gearworkers.errors import from_os_error
from gearworkers.layers.pins import Pins
from gearworkers.layers.store import LayerStore
from gearworkers.layers.unsynced import verify_unsynced_objects
from gearworkers.settings import NodeSettings

_BOOT_FILE = "boot_id"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def prepare_root(settings: NodeSettings, objects: ObjectStore, layers: LayerStore, push_queue: PushQueue) -> None:
    """Create missing directories and repair the leftovers of a crash or power cut; no import may run meanwhile.

    Raises:
        GearError: The root cannot be used.
    """
    try:
        settings.gear_root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (settings.gear_push_path, settings.gear_pins_path, settings.gear_nfs_path):
            path.mkdir(mode=0o700, exist_ok=True)
        objects.prepare()
        layers.prepare()
        layers.recover()
        with publishing(settings.gear_root, objects):
            pass
        _remove_unsynced(settings, objects, layers, push_queue)
    except OSError as exc:
        raise from_os_error(exc, f"prepare {settings.gear_root}") from exc


def collect_garbage(settings: NodeSettings, objects: ObjectStore) -> GarbageReport:
    """Remove unreferenced objects, and pending pushes of objects that were never stored; safe during imports.

    Layers and pins hold references.

    Raises:
        GearError: The file system refuses.
    """
    try:
        settings.gear_pins_path.mkdir(mode=0o700, exist_ok=True)
        collector = GarbageCollector(
            settings.gear_root,
            objects,
            published=(settings.gear_images_path, settings.gear_containers_path, settings.gear_pins_path),
            building=settings.gear_build_path,
        )
        report = collector.collect()
        collector.remove_stale_announcements(PushQueue(settings.gear_push_path, objects))
        return report
    except OSError as exc:
        raise from_os_error(exc, f"collect garbage in {settings.gear_root}") from exc


def _remove_unsynced(settings: NodeSettings, objects: ObjectStore, layers: LayerStore, push_queue: PushQueue) -> None:
    """After a reboot, remove objects that a power cut may have left without their bytes.

    Publishing a layer syncs its objects first. So only two kinds of objects can lack bytes: those that no published
    layer refers to, and those that an incomplete layer received after its publication.
    """
    record = settings.gear_root / _BOOT_FILE
    boot_id = _BOOT_ID.read_text()
    if not record.exists() or record.read_text() != boot_id:
        pinned = (digest for digest, _ in Pins(settings, layers, objects).objects())
        verify_unsynced_objects(settings.gear_images_path, objects, pinned)
        collect_garbage(settings, objects)
        push_queue.prune()
        record.write_text(boot_id)
