"""The search for profiles, without a lazy file server."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gearworkers.cas.store import ObjectStore
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import ImageEvent
from gearworkers.profiles import prefetch
from gearworkers.profiles.prefetch import ProfilePrefetcher
from gearworkers.profiles.resolve import profile_name
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.lazynode import gear_tar
from tests.support.processes import wait_until


def test_the_profile_thread_ends_even_during_a_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "SETTLE_S", 120.0)
    layers = LayerStore(Settings(gear_root=tmp_path), ObjectStore(tmp_path / "public"))
    earlier = set(threading.enumerate())
    profiles = ProfilePrefetcher(layers, lambda name: None, lambda parts: None, lambda image: None)
    (thread,) = set(threading.enumerate()) - earlier
    profiles.notify(ImageEvent("layer", starts=False))
    profiles.close()
    thread.join(60)
    assert not thread.is_alive()


def test_a_layer_that_was_removed_during_a_pull_is_not_an_image(tmp_path: Path) -> None:
    settings = Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run")
    driver = GearDriver(settings)
    driver.prepare()
    driver.create("image", "")
    driver.apply_diff("image", "", io.BytesIO(gear_tar({"file": b"content" * 100})))
    asked: list[str] = []
    layers = driver.engine.layers
    profiles = ProfilePrefetcher(layers, lambda name: asked.append(name), lambda parts: None, lambda image: None)
    with capture_logs() as logs:
        profiles.notify(ImageEvent("early-1", starts=False))
        profiles.notify(ImageEvent("image", starts=False))
        wait_until(lambda: bool(asked), "the profile of the image is looked for")
    profiles.close()
    driver.release()
    assert asked == [profile_name(layers, "image")] and not logs
