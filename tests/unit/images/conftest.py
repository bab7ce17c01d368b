"""A registry, and settings with a directory as the remote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.settings import RegistrySettings, RemoteSettings, Settings
from tests.support import registries
from tests.support.conversions import Converter
from tests.support.layouts import Layout
from tests.support.registry import Registry


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Registry]:
    with registries.registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("remote", "other-remote", "empty"):
        (tmp_path / name).mkdir()
    return Settings(
        remote=RemoteSettings(url=str(tmp_path / "remote")),
        registry=RegistrySettings(docker_config=tmp_path / "docker"),
        gear_root=tmp_path / "gear",
    )


@pytest.fixture(scope="module")
def shared_peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def converter(settings: Settings, shared_peer: Registry) -> Converter:
    return Converter(settings, shared_peer.host)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")
