"""Parts of the lazy file server by themselves, without a file system."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import InvalidInput, NotFound
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import ImageEvent, LazyStatus, order_prefetch
from gearworkers.lazyfs.control import ControlServer
from gearworkers.profiles import prefetch
from gearworkers.profiles.prefetch import ProfilePrefetcher
from gearworkers.settings import Settings


def not_asked() -> LazyStatus:
    raise AssertionError("no status is asked here")


def test_who_looks_for_profiles_ends_also_in_the_middle_of_a_pull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_SETTLED_S", 120.0)
    layers = LayerStore(Settings(gear_root=tmp_path), ObjectStore(tmp_path / "public"))
    profiles = ProfilePrefetcher(layers, lambda name: None, lambda parts: None)
    profiles.notify(ImageEvent("layer", starts=False))
    profiles.close()
    profiles._thread.join(60)
    assert not profiles._thread.is_alive()


def test_many_who_ask_before_the_first_is_answered_are_not_refused(tmp_path: Path) -> None:
    with ControlServer(tmp_path / "socket", not_asked, {}) as control, ExitStack() as stack:
        control._server.shutdown()  # it gets round to none of them
        for _ in range(50):
            asking = stack.enter_context(socket.socket(socket.AF_UNIX))
            asking.settimeout(1.0)
            asking.connect(str(tmp_path / "socket"))


def test_what_is_wrong_with_an_order_is_told_in_words(tmp_path: Path) -> None:
    def refuse(body: bytes) -> None:
        raise NotFound("layer <a>: there is none")

    path = tmp_path / "socket"
    with ControlServer(path, not_asked, {"/prefetch": refuse}), pytest.raises(InvalidInput) as caught:
        order_prefetch(path, ["a"])
    assert str(caught.value) == "POST /prefetch: layer <a>: there is none"
