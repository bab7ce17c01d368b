"""The units in packaging/systemd, started by a real systemd."""

from __future__ import annotations

from pathlib import Path

from tests.support.dockerd import NO_NETWORK
from tests.support.machine import HOME, Machine, booted
from tests.support.processes import wait_until
from tests.support.tiny import tiny_tar

MANAGER_HEALTH_CHECK = (
    f"{HOME}/.venv/bin/python",
    "-c",
    "import urllib.request as u; u.urlopen('http://127.0.0.1:2019/healthz')",
)
PARTS = ("gear-redis", "gear-gateway", "gear-workers", "gear-lazyfs")
MORE_STARTS_THAN_SYSTEMD_ALLOWS = 6
"""systemd's default limit is five starts in ten seconds."""


def test_systemd_starts_restarts_and_stops_all_services_around_dockerd(disk: Path) -> None:
    with booted(disk / "machine") as machine:
        machine.run("systemctl", "start", "gear-manager")
        assert machine.run("docker", "info", "--format", "{{.Driver}}") == "gear"
        machine.run("docker", "import", "-", "tiny", stdin=tiny_tar())
        machine.run("docker", "run", "-d", "--name=running", "--stop-timeout=3", *NO_NETWORK, "tiny", "sleep", "1000")
        for _ in range(MORE_STARTS_THAN_SYSTEMD_ALLOWS):
            machine.run("systemctl", "kill", "--signal=KILL", "gear-gateway")
            wait_until(lambda: is_active(machine, "gear-gateway"), "the gateway is active")
        wait_until(lambda: machine.call(*MANAGER_HEALTH_CHECK).returncode == 0, "the manager", found=machine.journal)
        assert machine.run("docker", "exec", "running", "echo", "still runs") == "still runs"
        assert machine.run("docker", "run", "--rm", *NO_NETWORK, "tiny", "echo", "starts") == "starts"
        machine.run("systemctl", "stop", "gear.target")
        assert not any(is_active(machine, part) for part in PARTS), "stopping the target waits for the services"
        machine.run("systemctl", "restart", "docker")
        assert all(is_active(machine, part) for part in PARTS), "docker.service starts the target"
        machine.run("docker", "start", "running")  # ignores SIGTERM
        machine.power_off()
        stopped = machine.stopped_units()
        first = len(stopped) - stopped[::-1].index("docker.service")
        assert {"gear-lazyfs.service", "gear-gateway.service"} <= set(stopped[first:]), (
            "they stop after docker.service, since containers need them"
        )


def is_active(machine: Machine, unit: str) -> bool:
    """Return whether the unit is active."""
    return machine.call("systemctl", "is-active", unit).stdout == b"active\n"
