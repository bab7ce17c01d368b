"""A running gateway, and a client of its socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gearworkers.settings import Settings
from tests.support.gateway_jobs import LONG, SHORT, Start, work
from tests.support.gateways import Running, Work, run_gateway
from tests.support.plugin import Plugin


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        gear_root=tmp_path / "gear",
        run_dir=tmp_path / "run",
        plugin_socket=str(tmp_path / "plugins" / "gear.sock"),
        node="n",
    )


@pytest.fixture
def start(settings: Settings) -> Iterator[Start]:
    started: list[Running] = []

    def begin(work: Work = work, *, workers: int = 1, **options: Any) -> tuple[Running, Plugin]:
        timeouts = LONG if workers else SHORT
        started.append(run_gateway(settings, work, workers=workers, timeouts=timeouts, **options))
        return started[-1], Plugin(settings.effective_plugin_socket)

    yield begin
    for running in started:
        running.stop()
