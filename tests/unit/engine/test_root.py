"""Workers use the GEAR_ROOT that the node's gateway recorded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.engine.root import save_root, with_current_root
from gearworkers.errors import GearError
from gearworkers.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "of the environment", run_dir=tmp_path)


def test_the_last_recorded_root_replaces_the_root_from_the_environment(settings: Settings, tmp_path: Path) -> None:
    assert with_current_root(settings) == settings
    for name in ("first", "two\r\nlines", os.fsdecode(b"not UTF-8 \xff")):
        save_root(settings.run_dir, tmp_path / name)
        assert with_current_root(settings) == replace(settings, gear_root=tmp_path / name)


def test_a_root_that_cannot_be_recorded_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GearError, match="record GEAR_ROOT"):
        save_root(tmp_path / "missing", tmp_path / "root")
