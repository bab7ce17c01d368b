"""The units in packaging/systemd, started by a real systemd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.dockerd import NO_NETWORK
from tests.support.images import Image
from tests.support.machine import CONTAINERD_CONFIG, HOME, UNITS, Machine, booted
from tests.support.processes import wait_until
from tests.support.tiny import tiny_tar

MANAGER_HEALTH_CHECK = (
    f"{HOME}/.venv/bin/python",
    "-c",
    "import urllib.request as u; u.urlopen('http://127.0.0.1:2019/healthz')",
)
GEAR = f"{HOME}/.venv/bin/gear"
PARTS = ("gear-redis", "gear-gateway", "gear-workers", "gear-lazyfs")
MORE_STARTS_THAN_SYSTEMD_ALLOWS = 6
"""systemd's default limit is five starts in ten seconds."""
LIST_SNAPSHOTS = ("ctr", "snapshots", "--snapshotter=gear", "ls")
CONTAINERD_IMAGE = "docker.io/library/tiny:1"
EXIT_CODE = 37
EXIT = ("sh", "-c", f"exit {EXIT_CODE}")
SLEEP_UNTIL_SIGTERM = ("sh", "-c", "trap exit TERM; sleep 1000 & wait")


@pytest.fixture(scope="module")
def machine(disk: Path) -> Iterator[Machine]:
    """A booted machine with one image in dockerd and one in containerd. The last test powers the machine off."""
    with booted(disk / "machine") as machine:
        machine.run("docker", "import", "-", "tiny", stdin=tiny_tar())
        archive = Image([tiny_tar()]).saved(CONTAINERD_IMAGE)
        machine.run("ctr", "images", "import", "--snapshotter=gear", "-", stdin=archive)
        yield machine


def test_systemd_restarts_all_services_around_dockerd(machine: Machine) -> None:
    assert machine.run("docker", "info", "--format", "{{.Driver}}") == "gear"
    running = machine.run("docker", "run", "-d", *NO_NETWORK, "tiny", *SLEEP_UNTIL_SIGTERM)
    for _ in range(MORE_STARTS_THAN_SYSTEMD_ALLOWS):
        kill_gateway(machine)
    wait_until(lambda: is_active(machine, "gear-gateway"), "the gateway is active")
    assert machine.run("docker", "exec", running, "echo", "still runs") == "still runs"
    assert machine.run("docker", "run", "--rm", *NO_NETWORK, "tiny", "echo", "starts") == "starts"
    machine.run("systemctl", "stop", "gear.target")
    assert not any(is_active(machine, part) for part in PARTS), "stopping the target waits for the services"
    assert runs_in(machine, running, namespace="moby"), "containers run while the services are stopped"
    machine.run("systemctl", "kill", "--signal=KILL", "docker")  # its orderly stop waits 20 s for the gateway
    wait_until(machine.is_up, "dockerd is started again", found=machine.journal)
    assert all(is_active(machine, part) for part in PARTS), "docker.service starts the target"


def test_systemd_restarts_all_services_around_containerd(machine: Machine) -> None:
    printed = machine.run(GEAR, "containerd-config")
    assert printed == (machine.directory / CONTAINERD_CONFIG).read_text().strip()
    machine.run(GEAR, "containerd-config", "--check")
    machine.run(*ctr_run("-d", "--null-io"), CONTAINERD_IMAGE, "running", *SLEEP_UNTIL_SIGTERM)
    kill_gateway(machine)
    assert runs_in(machine, "running"), "the gateway was killed"
    wait_until(lambda: machine.call(*LIST_SNAPSHOTS).returncode == 0, "containerd calls the gateway again")
    assert starts(machine, "new")
    machine.run("systemctl", "stop", "gear.target")
    assert runs_in(machine, "running"), "the services are stopped"
    machine.run("systemctl", "restart", "containerd")
    assert all(is_active(machine, part) for part in PARTS), "containerd.service starts the target"
    assert starts(machine, "another")
    assert runs_in(machine, "running"), "containerd was restarted"


def test_systemd_runs_the_manager(machine: Machine) -> None:
    machine.run("systemctl", "start", "gear-manager")
    wait_until(lambda: machine.call(*MANAGER_HEALTH_CHECK).returncode == 0, "the manager", found=machine.journal)


def test_systemd_stops_the_services_after_dockerd_and_containerd(machine: Machine) -> None:
    """Both daemons take longer to stop than the services: dockerd waits for a container that ignores SIGTERM."""
    slow = machine.directory / UNITS / "containerd.service.d" / "slow.conf"
    slow.parent.mkdir()
    slow.write_text("[Service]\nExecStop=/usr/bin/sleep 3\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("docker", "run", "-d", "--stop-timeout=3", *NO_NETWORK, "tiny", "sleep", "1000")
    machine.run(*ctr_run("-d", "--null-io"), CONTAINERD_IMAGE, "last", *SLEEP_UNTIL_SIGTERM)
    machine.power_off()
    stopped = machine.stopped_units()
    for daemon in ("docker.service", "containerd.service"):
        first = len(stopped) - stopped[::-1].index(daemon)
        assert {"gear-lazyfs.service", "gear-gateway.service"} <= set(stopped[first:]), (
            f"they stop after {daemon}, since containers need them"
        )


def kill_gateway(machine: Machine) -> None:
    """Kill the gateway, even one that is not ready yet; return when systemd has started another."""
    killed = main_pid(machine, "gear-gateway")
    machine.run("systemctl", "kill", "--signal=KILL", "gear-gateway")
    wait_until(lambda: main_pid(machine, "gear-gateway") not in {"0", killed}, "another gateway")


def main_pid(machine: Machine, unit: str) -> str:
    """Return the id of the unit's main process; 0 if it has none."""
    return machine.run("systemctl", "show", "--property=MainPID", "--value", unit)


def is_active(machine: Machine, unit: str) -> bool:
    """Return whether the unit is active."""
    return machine.call("systemctl", "is-active", unit).stdout == b"active\n"


def ctr_run(*options: str) -> tuple[str, ...]:
    """Return the beginning of a command that runs a container of containerd on gear."""
    return ("ctr", "run", "--snapshotter=gear", *options)


def runs_in(machine: Machine, container: str, namespace: str = "default") -> bool:
    """Return whether a program runs in a running container; Docker's are in the namespace moby.

    Compares its exit code, since `ctr` may lose the output of a short program.
    """
    done = machine.call("ctr", "-n", namespace, "tasks", "exec", "--exec-id=exit", container, *EXIT)
    return done.returncode == EXIT_CODE


def starts(machine: Machine, name: str) -> bool:
    """Return whether a new container of containerd runs a program."""
    return machine.call(*ctr_run("--rm"), CONTAINERD_IMAGE, name, *EXIT).returncode == EXIT_CODE
