"""`gear doctor` about Gear images and the gateway: what is there, what is wrong, what to do."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.cli import doctor
from gearworkers.lazyfs import fuse_probe
from gearworkers.lazyfs.fuse_probe import check_fuse
from gearworkers.lazyfs.fuse_protocol import InitFlag
from gearworkers.settings import Settings
from tests.support.gateways import run_gateway
from tests.support.lazynode import gear_tar, lazy_node
from tests.support.processes import Daemon, listens


def test_fuse_is_tried_and_nothing_stays_mounted(tmp_path_factory: pytest.TempPathFactory) -> None:
    def mounted() -> list[str]:
        """But for what tests that run beside this one mount, each in a directory of its own."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if " - fuse" in line and str(tmp_path_factory.getbasetemp().parent) not in line]

    before = mounted()
    check = check_fuse()
    assert check.ok, check
    assert "unanswered requests are sent again" in check.found
    assert mounted() == before


def test_a_host_without_fuse_or_with_an_old_one_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_fuse(Path("/dev/no-fuse"))
    assert not check.ok
    assert not check.needed
    assert "/dev/no-fuse" in check.found
    monkeypatch.setattr(fuse_probe, "common_features", lambda _: InitFlag.PASSTHROUGH)
    assert "6.9" in check_fuse().advice


def test_a_lazy_file_server_that_is_down_or_cannot_fetch_is_told(tmp_path: Path) -> None:
    assert "does not run" in doctor._lazy_files(replace(Settings(), run_dir=tmp_path)).found
    with lazy_node(tmp_path) as node:
        node.apply(gear_tar({"file": b"nowhere"}), "image")
        assert doctor._lazy_files(node.settings).found == "runs, 1 incomplete layers"
        with pytest.raises(OSError, match="Input/output"):
            (node.run("c1") / "file").read_bytes()
        assert doctor._lazy_files(node.settings).found == "1 objects could not be fetched"


def test_a_broker_that_does_not_answer_is_told_without_its_password() -> None:
    check = doctor._redis(replace(Settings(), broker_url="redis://user:secret@127.0.0.1:1/0"))
    assert not check.ok and "127.0.0.1:1" in check.advice
    assert "secret" not in f"{check.found} {check.advice}"


def test_a_broker_that_refuses_tasks_is_told(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    options = {"port": "0", "unixsocket": str(path), "dir": str(tmp_path), "min-replicas-to-write": "1"}
    command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
    server = Daemon(command, tmp_path / "log", os.environ)
    server.start()
    try:
        server.wait_until(lambda: listens(path), "Redis's socket")
        check = doctor._redis(replace(Settings(), run_dir=tmp_path))
    finally:
        server.stop()
    assert not check.ok and check.found.startswith("refuses tasks (NOREPLICAS")


def test_a_gateway_that_counts_for_long_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> list[tuple[str, str]]:
        time.sleep(0.5)
        return [("Objects", "1000000")]

    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.1)
    settings = Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", plugin_socket=tmp_path / "gear.sock")
    running = run_gateway(settings, lambda claimed: None)
    running.driver.status = count  # type: ignore[method-assign]
    try:
        told = doctor.gateway_status(settings)
    finally:
        running.stop()
    assert told is not None and ("Objects", "1000000") in told


@pytest.mark.parametrize(
    ("version", "ok", "words"),
    [
        ("19.3", False, "older"),
        ("20.10", True, ""),
        ("26.1", True, ""),
        ("27.5", True, "DOCKERD_DEPRECATED_GRAPHDRIVER_PLUGINS=1"),
        ("28.0", False, "has no graphdriver plugins"),
    ],
)
def test_what_is_wrong_with_a_docker_is_told(version: str, ok: bool, words: str) -> None:
    check = doctor._docker_version(version, *map(int, version.split(".")))
    assert check.ok == ok and words in f"{check.found}; {check.advice}"
