"""Parts of the lazy file server by themselves, without a file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from gearworkers.layers.store import LayerStore
from gearworkers.mounts.lazy.client import Image
from gearworkers.objects.store import ObjectStore
from gearworkers.services import lazyfs_profiles
from gearworkers.services.lazyfs_profiles import Profiles
from gearworkers.settings import Settings


def test_who_looks_for_profiles_ends_also_in_the_middle_of_a_pull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazyfs_profiles, "_SETTLED_S", 20.0)
    layers = LayerStore(Settings(gear_root=tmp_path), ObjectStore(tmp_path / "public"))
    profiles = Profiles(layers, lambda name: None, lambda parts: None)
    profiles.tell(Image("layer", starts=False))
    profiles.close()
    profiles._thread.join(10)
    assert not profiles._thread.is_alive()
