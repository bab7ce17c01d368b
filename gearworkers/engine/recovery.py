"""Making a GEAR_ROOT ready at a gateway's start, and what is repaired then: what a crash or a power cut has left."""

from __future__ import annotations

from pathlib import Path

from gearworkers.cas.collector import GarbageCollector, GarbageReport, publishing
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.store import ObjectStore
from gearworkers.errors import from_os_error
from gearworkers.layers.pins import Pins
from gearworkers.layers.store import LayerStore
from gearworkers.layers.unsynced import verify_unsynced_objects
from gearworkers.settings import Settings

_BOOT_FILE = "boot_id"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def make_ready(settings: Settings, objects: ObjectStore, layers: LayerStore, push_queue: PushQueue) -> None:
    """Make what is missing, and repair; nobody imports meanwhile.

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
        _distrust_after_reboot(settings, objects, layers, push_queue)
    except OSError as exc:
        raise from_os_error(exc, f"prepare {settings.gear_root}") from exc


def collect_garbage(settings: Settings, objects: ObjectStore) -> GarbageReport:
    """Remove the objects that no layer and no pin refers to, and announcements of such for push; safe beside imports.

    Raises:
        GearError: What the file system says.
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


def _distrust_after_reboot(settings: Settings, objects: ObjectStore, layers: LayerStore, push_queue: PushQueue) -> None:
    """Remove the objects that no published layer vouches for: a power cut may have left them without bytes.

    A published layer's objects were synced before it was published, but for what an incomplete one gets later.
    """
    record = settings.gear_root / _BOOT_FILE
    boot_id = _BOOT_ID.read_text()
    if not record.exists() or record.read_text() != boot_id:
        pinned = (digest for digest, _ in Pins(settings, layers, objects).objects())
        verify_unsynced_objects(settings.gear_images_path, objects, pinned)
        collect_garbage(settings, objects)
        push_queue.prune()
        record.write_text(boot_id)
