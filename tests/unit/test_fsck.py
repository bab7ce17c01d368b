"""`gear fsck` sees whatever is wrong with a layer's own files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from gearworkers.driver import GearDriver
from gearworkers.settings import Settings
from tests.support.tiny import tar_of


@pytest.fixture
def driver(tmp_path: Path) -> GearDriver:
    driver = GearDriver(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run"))
    driver.prepare()
    driver.create("layer", "")
    driver.apply_diff("layer", "", io.BytesIO(tar_of({f"file{n}": b"content %d" % n * 50 for n in range(300)})))
    return driver


def faults(driver: GearDriver) -> list[str]:
    return list(driver.faults(read_data=False, repair=False))


@pytest.mark.parametrize("name", ["index.erofs", "stream.zst", "objects"])
def test_one_wrong_bit_anywhere_is_told_with_the_layer(driver: GearDriver, name: str) -> None:
    path = driver.settings.gear_images_path / "layer" / name
    whole = path.read_bytes()
    assert faults(driver) == []
    for at in range(0, len(whole), max(len(whole) // 23, 1)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert any(fault.startswith("layer layer: ") for fault in faults(driver)), at
    path.write_bytes(whole[:-40])
    assert any(fault.startswith("layer layer: ") for fault in faults(driver))
    path.write_bytes(whole)
    assert faults(driver) == []


@pytest.mark.parametrize("name", ["index.erofs", "stream.zst", "objects"])
def test_a_file_that_is_missing_is_told_with_the_layer(driver: GearDriver, name: str) -> None:
    (driver.settings.gear_images_path / "layer" / name).unlink()
    fault = faults(driver)[0]
    assert fault.startswith("layer layer: ") and name in fault and fault.endswith("remove the image and pull it again")
