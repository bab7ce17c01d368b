"""The engines of a gateway: one per GEAR_ROOT, shared by the front doors."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from threading import Lock

from gearworkers.engine.engine import Engine
from gearworkers.settings import Settings
from gearworkers.util.locks import sole_process


class Engines:
    """Opens each GEAR_ROOT once; methods may be called from many threads.

    Args:
        exclusive: Lock each GEAR_ROOT: a second gateway would take the first one's unfinished work for the leftovers of
            a crash.
    """

    def __init__(self, *, exclusive: bool = False) -> None:
        self._exclusive = exclusive
        self._engines: dict[Path, Engine] = {}
        self._locks = ExitStack()
        self._guard = Lock()

    def open(self, settings: Settings) -> Engine:
        """Return the engine of the settings' GEAR_ROOT; the first call also repairs the leftovers of a crash.

        Raises:
            FailedPrecondition: Another gateway has the root.
            GearError: The root cannot be used.
        """
        with self._guard:
            root = settings.gear_root.resolve()
            if root not in self._engines:
                engine = Engine.of(settings)
                with ExitStack() as locks:
                    if self._exclusive:
                        locks.enter_context(sole_process(settings.gateway_lock, "a gateway of this GEAR_ROOT"))
                    engine.prepare()
                    self._locks.enter_context(locks.pop_all())
                self._engines[root] = engine
            return self._engines[root]

    def close(self) -> None:
        """Close the engines and unlock their roots; mounts of containers stay."""
        with self._guard:
            for engine in self._engines.values():
                engine.close()
            self._locks.close()
            self._engines.clear()
