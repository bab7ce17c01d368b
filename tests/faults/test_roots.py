"""Init switches GEAR_ROOT during other calls; each call uses one root from start to end."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest

from gearworkers.errors import NotFound
from gearworkers.layers.idmap import IdMaps
from gearworkers.settings import Settings
from plugin_gateway.engines import Engines
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.layers import file, tar
from tests.faults.crashes import Interrupted

ROOTS = ("a", "b")
THREADS = 6
SWITCHES = 24


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "a", run_dir=tmp_path / "run", node="test")


def switch(driver: GearDriver, settings: Settings, root: str) -> None:
    driver.init("", [f"gear.root={settings.gear_root.with_name(root)}"], (), ())


@pytest.fixture
def fast_thread_switching() -> Iterator[None]:
    """Make threads switch as often as possible."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.fixture
def driver(settings: Settings) -> Iterator[GearDriver]:
    """Yield a driver with two roots that have the same layer ids; a file in each image names the root."""
    driver = GearDriver(settings, Engines(exclusive=True))
    driver.prepare()
    for root in ROOTS:
        switch(driver, settings, root)
        for image in ("image", f"only-{root}"):
            driver.create(image, "")
            driver.apply_diff(image, "", io.BytesIO(tar(file("root", root.encode()))))
        for number in range(THREADS):
            driver.create_read_write(f"container-{number}", "image")
    yield driver
    for root in ROOTS:
        switch(driver, settings, root)
        driver.cleanup()
    driver.release()


def calls_of_one_thread(driver: GearDriver, settings: Settings, number: int, ended: Event) -> int:
    """Make calls as dockerd does until *ended* is set; return the number of rounds."""
    container = f"container-{number}"
    for turn in itertools.count():
        if ended.is_set():
            return turn
        assert driver.exists(container)
        merged = Path(driver.get(container))
        assert (merged / "root").read_text() == merged.parents[2].name
        driver.put(container)
        for root, other in (ROOTS, ROOTS[::-1]):
            id = f"{number}-{turn}-{root}"
            with suppress(NotFound):
                driver.create(id, f"only-{root}")
                assert (settings.gear_root.with_name(root) / "images" / id).is_dir()
            assert not (settings.gear_root.with_name(other) / "images" / id).exists()
    raise AssertionError


@pytest.mark.usefixtures("fast_thread_switching")
def test_each_call_uses_one_root_while_init_switches_back_and_forth(driver: GearDriver, settings: Settings) -> None:
    ended = Event()
    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(calls_of_one_thread, driver, settings, number, ended) for number in range(THREADS)]
        try:
            for _, root in zip(range(SWITCHES), itertools.cycle(ROOTS), strict=False):
                switch(driver, settings, root)
        finally:
            ended.set()
    assert all(thread.result() for thread in running)


def test_a_call_interrupted_by_init_answers_from_the_root_that_it_began_with(
    driver: GearDriver, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch(driver, settings, "a")
    load = IdMaps.load

    def meanwhile(root: Path) -> IdMaps:
        monkeypatch.undo()
        switch(driver, settings, "b")
        return load(root)

    monkeypatch.setattr(IdMaps, "load", meanwhile)
    sink = io.BytesIO()
    driver.diff("image", "", sink)
    assert sink.getvalue() == tar(file("root", b"a"))


def test_an_import_continues_in_the_root_where_it_began(driver: GearDriver, settings: Settings) -> None:
    def meanwhile() -> None:
        for root in ("a", "b"):
            switch(driver, settings, root)

    switch(driver, settings, "a")
    driver.create("layer", "")
    whole = tar(file("first", b"1"), file("second", b"2"))
    driver.apply_diff("layer", "", Interrupted(whole[:1024], meanwhile, whole[1024:]))
    assert not driver.exists("layer"), "the driver now uses the other root"
    switch(driver, settings, "a")
    assert {path.name for path in Path(driver.get("layer")).iterdir()} == {"first", "second"}


@pytest.mark.parametrize("name", ["a", "link"])
def test_an_init_does_not_disturb_a_running_import(driver: GearDriver, settings: Settings, name: str) -> None:
    """The import may be for an earlier dockerd; its path may be another name for the same root."""
    settings.gear_root.with_name("link").symlink_to("a")
    switch(driver, settings, "a")
    driver.create("layer", "")
    whole = tar(file("first", b"1"), file("second", b"2"))
    driver.apply_diff("layer", "", Interrupted(whole[:1024], lambda: switch(driver, settings, name), whole[1024:]))
    assert {path.name for path in Path(driver.get("layer")).iterdir()} == {"first", "second"}
