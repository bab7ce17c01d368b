"""The files that start gearworkers elsewhere are what their readers accept and name the same processes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gearworkers.services.manager.server import FINISHING_S

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def procfile() -> dict[str, str]:
    """The Procfile's processes."""
    lines = (CHECKOUT / "Procfile").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_docker_compose_accepts_its_file_and_it_has_the_procfiles_processes() -> None:
    assert shutil.which("docker-compose"), "run `make setup`"
    command = ["docker-compose", "-f", str(CHECKOUT / "docker-compose.yml"), "--profile", "manager"]
    done = subprocess.run([*command, "config", "--services"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {*procfile(), "manager"}, "a manager is no part of a node, and has a profile"


@pytest.mark.parametrize("name", ["gateway", "import", "push", "lazyfs", "convert"])
def test_systemd_starts_what_the_procfile_starts(name: str) -> None:
    unit = (CHECKOUT / "packaging" / "systemd" / f"gear-{name}.service").read_text()
    started = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    words = procfile()[name].removeprefix("exec ").removeprefix("nice ").split()
    assert started.split()[1:] == [word.replace("$GEAR_NODE", "${GEAR_NODE}") for word in words[1:]]


def test_the_managers_unit_gives_it_time_to_finish() -> None:
    unit = (CHECKOUT / "packaging" / "systemd" / "gear-manager.service").read_text()
    (seconds,) = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("TimeoutStopSec=")]
    assert int(seconds) > FINISHING_S
    assert "ExecStart=/opt/gearworkers/.venv/bin/gear manager\n" in unit


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    units = tmp_path / "units"
    units.mkdir()
    for unit in (CHECKOUT / "packaging" / "systemd").glob("gear*"):
        (units / unit.name).write_text(unit.read_text().replace("/opt/gearworkers", str(CHECKOUT)))
    done = subprocess.run(["systemd-analyze", "verify", *units.iterdir()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_redis_keeps_what_it_was_given() -> None:
    lines = (CHECKOUT / "packaging" / "redis.conf").read_text().splitlines()
    assert "appendonly yes" in lines
    assert "maxmemory-policy noeviction" in lines
