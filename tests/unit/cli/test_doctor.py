"""Checks of `gear doctor`: FUSE, lazy file server, Redis, gateway and Docker."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.cli import doctor
from gearworkers.cli.status import STATUS_TIMEOUT_S, gateway_status
from gearworkers.lazyfs.fuse_probe import check_features, check_fuse
from gearworkers.lazyfs.fuse_protocol import InitFlag
from gearworkers.settings import Settings
from tests.support.gateways import run_gateway
from tests.support.lazynode import gear_tar, lazy_node
from tests.support.processes import Daemon, listens


def test_the_fuse_check_leaves_nothing_mounted(tmp_path_factory: pytest.TempPathFactory) -> None:
    def mounted() -> list[str]:
        """Return the FUSE mounts, without those of concurrent tests."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if " - fuse" in line and str(tmp_path_factory.getbasetemp().parent) not in line]

    before = mounted()
    check = check_fuse()
    assert check.ok, check
    assert "unanswered requests are sent again" in check.found
    assert mounted() == before


def test_the_fuse_check_gives_advice_for_a_missing_and_for_an_old_fuse() -> None:
    check = check_fuse(Path("/dev/no-fuse"))
    assert not check.ok
    assert not check.needed
    assert "/dev/no-fuse" in check.found
    assert "6.9" in check_features(InitFlag.PASSTHROUGH).advice


@pytest.mark.slow
def test_the_lazy_file_server_check_reports_a_stopped_server_and_failed_fetches(tmp_path: Path) -> None:
    assert "does not run" in doctor.lazyfs_check(replace(Settings(), run_dir=tmp_path)).found
    with lazy_node(tmp_path) as node:
        node.apply(gear_tar({"file": b"missing in the remote"}), "image")
        assert doctor.lazyfs_check(node.settings).found == "runs, 1 incomplete layers"
        with pytest.raises(OSError, match="Input/output"):
            (node.run("c1") / "file").read_bytes()
        assert doctor.lazyfs_check(node.settings).found == "1 objects could not be fetched"


def test_the_redis_check_hides_the_password_of_the_url() -> None:
    check = doctor.redis_check(replace(Settings(), broker_url="redis://user:secret@127.0.0.1:1/0"))
    assert not check.ok and "127.0.0.1:1" in check.advice
    assert "secret" not in f"{check.found} {check.advice}"


def test_the_redis_check_reports_a_server_that_refuses_writes(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    options = {"port": "0", "unixsocket": str(path), "dir": str(tmp_path), "min-replicas-to-write": "1"}
    command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
    server = Daemon(command, tmp_path / "log", os.environ)
    server.start()
    try:
        server.wait_until(lambda: listens(path), "Redis's socket")
        check = doctor.redis_check(replace(Settings(), run_dir=tmp_path))
    finally:
        server.stop()
    assert not check.ok and check.found.startswith("refuses tasks (NOREPLICAS")


def test_the_status_command_waits_for_a_slow_gateway(tmp_path: Path) -> None:
    def count() -> list[tuple[str, str]]:
        time.sleep(0.5)
        return [("Objects", "1000000")]

    settings = Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", plugin_socket="off")
    running = run_gateway(settings, lambda claimed: None)
    running.driver.status = count  # type: ignore[method-assign]
    try:
        assert gateway_status(settings, timeout_s=0.1) is None
        found = gateway_status(settings)
    finally:
        running.stop()
    assert found is not None and ("Objects", "1000000") in found
    assert STATUS_TIMEOUT_S >= 60


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
def test_the_docker_check_names_the_problem_of_a_version(version: str, ok: bool, words: str) -> None:
    check = doctor.docker_version_check(version, *map(int, version.split(".")))
    assert check.ok == ok and words in f"{check.found}; {check.advice}"


@pytest.mark.parametrize(("snapshotter", "ok"), [("gear", True), ("overlayfs", False)])
def test_the_docker_check_names_the_snapshotter_of_containerds_image_store(snapshotter: str, ok: bool) -> None:
    check = doctor.docker_snapshotter_check("28.5.2", snapshotter)
    assert check.ok == ok and snapshotter in check.found
