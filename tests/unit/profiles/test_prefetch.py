"""The search for profiles, without a lazy file server."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import ImageEvent
from gearworkers.profiles import prefetch
from gearworkers.profiles.prefetch import ProfilePrefetcher
from gearworkers.settings import Settings


def test_the_profile_thread_ends_even_during_a_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "SETTLE_S", 120.0)
    layers = LayerStore(Settings(gear_root=tmp_path), ObjectStore(tmp_path / "public"))
    earlier = set(threading.enumerate())
    profiles = ProfilePrefetcher(layers, lambda name: None, lambda parts: None)
    (thread,) = set(threading.enumerate()) - earlier
    profiles.notify(ImageEvent("layer", starts=False))
    profiles.close()
    thread.join(60)
    assert not thread.is_alive()
