"""`gear doctor` about Gear images: what is there, what is wrong, what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers import doctor
from gearworkers.mounts.lazy import trial
from gearworkers.mounts.lazy.protocol import InitFlag
from gearworkers.mounts.lazy.trial import check_fuse
from gearworkers.settings import Settings
from tests.support.lazynode import gear_tar, lazy_node


def test_fuse_is_tried_and_nothing_stays_mounted() -> None:
    before = Path("/proc/self/mountinfo").read_text()
    check = check_fuse()
    assert check.ok, check
    assert "unanswered requests come again" in check.found
    assert Path("/proc/self/mountinfo").read_text() == before


def test_a_host_without_fuse_or_with_an_old_one_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_fuse(Path("/dev/no-fuse"))
    assert not check.ok
    assert not check.needed
    assert "/dev/no-fuse" in check.found
    monkeypatch.setattr(trial, "_agreed", lambda _: InitFlag.PASSTHROUGH)
    assert "6.9" in check_fuse().advice


def test_a_lazy_file_server_that_is_down_or_cannot_fetch_is_told(tmp_path: Path) -> None:
    assert "does not run" in doctor._lazy_files(replace(Settings(), run_dir=tmp_path)).found
    with lazy_node(tmp_path) as node:
        node.apply(gear_tar({"file": b"nowhere"}), "image")
        assert doctor._lazy_files(node.settings).found == "runs, 1 incomplete layers"
        with pytest.raises(OSError, match="Input/output"):
            (node.run("c1") / "file").read_bytes()
        assert doctor._lazy_files(node.settings).found == "1 objects could not be fetched"
