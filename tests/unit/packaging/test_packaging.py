"""Docker Compose, systemd and `make up` accept their files, and all start the same processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gearworkers.http_service.limits import SHUTDOWN_S
from gearworkers.settings import documented

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture
def variables() -> set[str]:
    """Return the names of all settings, without systemd's own variable."""
    return {setting.name for setting in documented()} - {"NOTIFY_SOCKET"}


def procfile() -> dict[str, str]:
    """Return the commands in the Procfile by name."""
    lines = (CHECKOUT / "Procfile").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.slow
def test_docker_compose_starts_the_processes_of_the_procfile() -> None:
    compose = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    command = [*compose, "-f", str(CHECKOUT / "docker-compose.yml"), "--profile", "manager"]
    done = subprocess.run([*command, "config", "--services"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = procfile()
    workers = commands.pop("workers").split()[-3:]
    assert set(done.stdout.split()) == {*commands, *workers, "manager"}, (
        "the manager is not part of a node, and is in a profile of its own"
    )


def test_docker_compose_passes_on_every_setting(variables: set[str]) -> None:
    passed = set(re.findall(r"^ +([A-Z_]+): ", (CHECKOUT / "docker-compose.yml").read_text(), re.MULTILINE))
    read_by_compose = {"DOCKER_HOST", "DOCKER_CONFIG"}  # docker-compose itself reads them
    assert variables - passed == read_by_compose


def test_docker_compose_and_make_up_give_calls_the_same_time_to_finish() -> None:
    (grace,) = re.findall(r"^GRACE_S = (\d+)$", (CHECKOUT / "packaging" / "up.py").read_text(), re.MULTILINE)
    assert f"\n  stop_grace_period: {grace}s" in (CHECKOUT / "docker-compose.yml").read_text()


@pytest.mark.parametrize("name", ["gateway", "workers", "lazyfs"])
def test_systemd_starts_the_commands_of_the_procfile(name: str) -> None:
    unit = (CHECKOUT / "packaging" / "systemd" / f"gear-{name}.service").read_text()
    started = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert started.split()[1:] == procfile()[name].removeprefix("exec ").split()[1:]


def test_the_systemd_unit_gives_the_manager_time_to_finish() -> None:
    unit = (CHECKOUT / "packaging" / "systemd" / "gear-manager.service").read_text()
    (seconds,) = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("TimeoutStopSec=")]
    assert int(seconds) > SHUTDOWN_S
    assert "ExecStart=/opt/gearworkers/.venv/bin/gear manager\n" in unit


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    units = tmp_path / "units"
    units.mkdir()
    for unit in (CHECKOUT / "packaging" / "systemd").glob("gear*"):
        (units / unit.name).write_text(unit.read_text().replace("/opt/gearworkers", str(CHECKOUT)))
    done = subprocess.run(["systemd-analyze", "verify", *units.iterdir()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("root", ["relative", "/proc/none"])
def test_make_up_reports_an_unusable_root_in_one_line(root: str) -> None:
    command = [sys.executable, str(CHECKOUT / "packaging" / "up.py")]
    done = subprocess.run(command, env={**os.environ, "GEAR_ROOT": root}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("make up: ") and root in done.stderr and done.stderr.count("\n") == 1


def test_redis_persists_tasks_and_never_evicts_them() -> None:
    lines = (CHECKOUT / "packaging" / "redis.conf").read_text().splitlines()
    assert "appendonly yes" in lines
    assert "maxmemory-policy noeviction" in lines
