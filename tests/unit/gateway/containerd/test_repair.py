"""The repair of containerd's snapshots at the gateway's start loses no data."""

from __future__ import annotations

from pathlib import Path

import pytest

from gearworkers.engine.engine import Engine
from gearworkers.errors import FailedPrecondition
from gearworkers.settings import Settings
from plugin_gateway.containerd.snapshots import Snapshots


def test_layers_are_kept_when_the_table_is_lost(tmp_path: Path) -> None:
    engine = Engine.of(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test"))
    engine.prepare()
    snapshots = Snapshots(engine)
    snapshots.open()
    (mount,) = snapshots.prepare("test/1/key", "", {})
    (Path(mount.source) / "file").write_text("written by a container")
    snapshots.close()
    for path in (tmp_path / "gear").glob("snapshots.sqlite*"):
        path.rename(tmp_path / path.name)
    with pytest.raises(FailedPrecondition, match=r"snapshots\.sqlite is missing, but 1 layers"):
        snapshots.open()
    for path in tmp_path.glob("snapshots.sqlite*"):
        path.rename(tmp_path / "gear" / path.name)
    snapshots.open()
    assert (Path(snapshots.mounts("test/1/key")[0].source) / "file").read_text() == "written by a container"
    snapshots.remove("test/1/key")
    snapshots.close()
    engine.close()
