"""The engine on this node's store, for the commands that work on it."""

from __future__ import annotations

from gearworkers.engine.engine import Engine
from gearworkers.errors import NotFound
from gearworkers.settings import Settings


def open_engine(settings: Settings) -> Engine:
    """Return the engine of this node's store.

    Raises:
        NotFound: GEAR_ROOT holds no store.
    """
    if not settings.gear_public_cache_path.is_dir():
        raise NotFound(
            f"{settings.gear_root} holds no store; set GEAR_ROOT to the store's directory, or start the gateway"
        )
    return Engine.of(settings)
