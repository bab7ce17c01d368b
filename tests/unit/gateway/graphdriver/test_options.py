"""The gateway uses the options of the running dockerd, whichever started first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, GearError, InvalidInput
from gearworkers.settings import Settings
from plugin_gateway.engines import Engines
from plugin_gateway.graphdriver import options
from plugin_gateway.graphdriver.driver import GearDriver

pytestmark = pytest.mark.slow

BROKER = "redis://elsewhere/0"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "run").mkdir()
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run")


def started(settings: Settings, *opts: str) -> GearDriver:
    """Return the driver of a gateway after the Init of a dockerd with *opts*."""
    driver = GearDriver(settings)
    driver.prepare()
    driver.init("", opts, (), ())
    return driver


def test_a_restarted_gateway_uses_the_options_of_the_running_dockerd(settings: Settings, tmp_path: Path) -> None:
    started(settings, f"gear.root={tmp_path}/elsewhere", f"gear.broker={BROKER}").create("layer", "")
    restarted = GearDriver(settings)
    restarted.prepare()
    assert restarted.settings.broker_url == BROKER
    assert restarted.exists("layer")


def test_a_dockerd_without_options_inherits_none_of_the_previous_dockerd(settings: Settings, tmp_path: Path) -> None:
    driver = started(settings, f"gear.root={tmp_path}/elsewhere", f"gear.broker={BROKER}")
    driver.init("", (), (), ())
    assert driver.settings == settings
    restarted = GearDriver(settings)
    restarted.prepare()
    assert restarted.settings == settings


def test_rejected_options_are_not_saved(settings: Settings) -> None:
    driver = started(settings)
    with pytest.raises(InvalidInput, match=r"gear\.root=…, gear\.broker=…"):
        driver.init("", ["gear.nope=1"], (), ())
    assert options.load(settings.run_dir) == []


def test_damaged_options_are_reported(settings: Settings) -> None:
    started(settings)
    (path,) = settings.run_dir.glob("*.json")
    path.write_bytes(b"[")
    with pytest.raises(GearError, match="remove it and restart dockerd"):
        GearDriver(settings).prepare()


@contextmanager
def other_gateway(root: Path) -> Iterator[None]:
    """Run another process that uses GEAR_ROOT *root*; kill it at the end."""
    code = f"""
from pathlib import Path
from plugin_gateway.engines import Engines
from plugin_gateway.graphdriver.driver import GearDriver
from gearworkers.settings import Settings
settings = Settings(gear_root=Path({str(root)!r}), run_dir=Path({str(root)!r} + "-run"))
driver = GearDriver(settings, Engines(exclusive=True))
driver.prepare()
print("prepared", flush=True)
input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "prepared\n"
            yield
        finally:
            process.kill()


def test_a_second_gateway_of_a_root_is_rejected_before_it_repairs_anything(settings: Settings, tmp_path: Path) -> None:
    with other_gateway(settings.gear_root):
        under_way = settings.gear_build_path / "layer.under-way"
        under_way.mkdir()
        driver = GearDriver(settings, Engines(exclusive=True))
        with pytest.raises(FailedPrecondition, match="a gateway of this GEAR_ROOT is already running"):
            driver.prepare()
        own = GearDriver(replace(settings, gear_root=tmp_path / "own"), Engines(exclusive=True))
        own.prepare()
        with pytest.raises(FailedPrecondition, match="is already running"):
            own.init("", [f"gear.root={settings.gear_root}"], (), ())
        assert own.settings.gear_root == tmp_path / "own"
        assert under_way.exists()
    driver.prepare()
    assert not under_way.exists()


def test_status_leaves_nothing_in_the_root_and_returns_the_same_each_time(settings: Settings) -> None:
    started(settings)
    before = set(settings.gear_root.iterdir())
    restarted = GearDriver(settings)  # beside a running dockerd: the index mode has not been probed yet
    restarted.prepare()
    with ThreadPoolExecutor(4) as pool:
        modes = {dict(status)["Kernel Mode"] for status in pool.map(lambda _: restarted.status(), range(8))}
    modes |= {dict(GearDriver(settings).status())["Kernel Mode"] for _ in range(2)}
    (mode,) = modes
    assert "mounted" in mode
    assert set(settings.gear_root.iterdir()) == before
