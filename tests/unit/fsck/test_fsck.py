"""`gear fsck` reports missing and damaged files of layers, and nothing for undamaged layers."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.tiny import tar_of


@pytest.fixture
def driver(tmp_path: Path) -> GearDriver:
    driver = GearDriver(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run"))
    driver.prepare()
    driver.create("layer", "")
    driver.apply_diff("layer", "", io.BytesIO(tar_of({f"file{n}": b"content %d" % n * 50 for n in range(300)})))
    return driver


def faults(driver: GearDriver) -> list[str]:
    return list(driver.engine.faults(read_data=False, repair=False))


def data_segments(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the file's data segments."""
    end, size_bytes = 0, path.stat().st_size
    with open(path, "rb") as file:
        while end < size_bytes:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end


def test_empty_layers_are_undamaged_even_in_a_new_store(tmp_path: Path) -> None:
    driver = GearDriver(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run"))
    driver.prepare()
    for number, tar in enumerate([b"", bytes(1024), tar_of({"file": b"content"}), b""]):
        driver.create(f"layer{number}", "")
        driver.apply_diff(f"layer{number}", "", io.BytesIO(tar))
        assert os.listdir(driver.get(f"layer{number}")) == ["file"] * (number == 2)
        driver.put(f"layer{number}")
    assert faults(driver) == []
    driver.cleanup()


@pytest.mark.parametrize("name", ["index.erofs", "stream.zst", "objects"])
def test_a_flipped_bit_or_a_truncated_file_is_reported_with_the_layer(driver: GearDriver, name: str) -> None:
    path = driver.settings.gear_images_path / "layer" / name
    stored = [at for start, end in data_segments(path) for at in range(start, end)]
    assert faults(driver) == []
    with open(path, "r+b") as file:
        for at in stored[:: max(len(stored) // 23, 1)]:
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), at)
            assert any(fault.startswith("layer layer: ") for fault in faults(driver)), at
            os.pwrite(file.fileno(), byte, at)
        assert faults(driver) == []
        file.truncate(path.stat().st_size - 40)
    assert any(fault.startswith("layer layer: ") for fault in faults(driver))


@pytest.mark.parametrize("name", ["index.erofs", "stream.zst", "objects"])
def test_a_missing_file_is_reported_with_the_layer(driver: GearDriver, name: str) -> None:
    (driver.settings.gear_images_path / "layer" / name).unlink()
    fault = faults(driver)[0]
    assert fault.startswith("layer layer: ") and name in fault and fault.endswith("remove the image and pull it again")
