"""Set-up installs missing packages and removes none; with the real apt and dpkg, on a root directory of the test."""

from __future__ import annotations

import hashlib
import runpy
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gearworkers.cli import doctor

PREPARE = Path(__file__).resolve().parents[3] / "packaging" / "prepare.py"
DOCKER_CE = ("docker-ce", "docker-ce-cli", "containerd.io")
SUCCEEDS = "exit 0"
FAILS = "exit 1"


@dataclass(frozen=True)
class Machine:
    """The root directory that apt and dpkg manage during a test. Set-up searches `programs` for Docker's programs."""

    root: Path

    @property
    def programs(self) -> Path:
        return self.root / "programs"

    def offer(self, name: str, *, conflicts: str = "", program: str = "") -> Path:
        """Add a package to the archive of *root*; return its file. *program* is the path of a file in it."""
        made = self.root / "archive" / name
        (made / "DEBIAN").mkdir(parents=True)
        if program:
            (made / "bin").mkdir()
            (made / program).write_text(name)
        control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: tests\nDescription: test\n"
        control += f"Conflicts: {conflicts}\n" if conflicts else ""
        (made / "DEBIAN" / "control").write_text(control)
        package = made.with_name(f"{name}.deb")
        subprocess.run(["dpkg-deb", "-b", made, package], check=True, stdout=subprocess.DEVNULL)
        digest = hashlib.sha256(package.read_bytes()).hexdigest()
        with (self.root / "archive" / "Packages").open("a") as index:
            index.write(f"{control}Filename: ./{package.name}\nSize: {package.stat().st_size}\nSHA256: {digest}\n\n")
        return package

    def install(self, package: Path) -> None:
        """Install the package."""
        subprocess.run(["dpkg", f"--root={self.root}", "-i", package], check=True, stdout=subprocess.DEVNULL)

    def installed(self) -> set[str]:
        command = ["dpkg-query", f"--root={self.root}", "-W", "-f", "${Package} ${db:Status-Abbrev}\n"]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        return {line.split()[0] for line in lines if line.split()[1] == "ii"}

    def add_program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    for name in ("dpkg/updates", "dpkg/info", "apt/lists/partial"):
        (tmp_path / "var/lib" / name).mkdir(parents=True)
    for name in ("var/cache/apt/archives/partial", "var/log", "archive", "programs", "none"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("var/lib/dpkg/status", "archive/Packages"):
        (tmp_path / name).touch()
    (tmp_path / "sources").write_text(f"deb [trusted=yes] copy:{tmp_path}/archive ./\n")
    (tmp_path / "apt.conf").write_text(
        f"""
        Dir::State "{tmp_path}/var/lib/apt";
        Dir::State::status "{tmp_path}/var/lib/dpkg/status";
        Dir::Cache "{tmp_path}/var/cache/apt";
        Dir::Log "{tmp_path}/var/log";
        Dir::Etc::sourcelist "{tmp_path}/sources";
        Dir::Etc::sourceparts "{tmp_path}/none";
        Dir::Etc::parts "{tmp_path}/none";
        Dir::Etc::main "{tmp_path}/none";
        DPkg::Options {{ "--root={tmp_path}"; }};
        APT::Sandbox::User "root";
        """
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setenv("DPKG_ADMINDIR", str(tmp_path / "var/lib/dpkg"))
    return machine


@pytest.fixture
def prepare(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names in the script, which searches only `Machine.programs`."""
    names = runpy.run_path(str(PREPARE))
    names["main"].__globals__.update(
        POLICY=machine.root / "policy-rc.d", SYSTEM_PATH=str(machine.programs), debian_release=lambda: 12
    )
    return names


def test_an_installation_that_would_remove_packages_is_rejected(
    machine: Machine, prepare: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    for name in DOCKER_CE:
        machine.install(machine.offer(name))
    machine.offer("docker.io", conflicts=", ".join(DOCKER_CE))
    machine.offer("curl")
    with pytest.raises(SystemExit, match=r"install.*docker\.io failed; if it must remove packages"):
        prepare["install_packages"](["curl", "docker.io"])
    assert machine.installed() == set(DOCKER_CE)
    assert "remove is disabled" in capfd.readouterr().err
    prepare["install_packages"](["curl"])
    assert machine.installed() == {*DOCKER_CE, "curl"}


@pytest.mark.parametrize(
    ("release", "programs", "missing"),
    [
        (12, {}, {"docker.io", "docker-compose"}),
        (12, {"dockerd": SUCCEEDS, "docker": SUCCEEDS}, set()),
        (12, {"dockerd": SUCCEEDS, "docker": FAILS, "docker-compose": SUCCEEDS}, set()),
        (13, {}, {"docker.io", "docker-cli", "docker-buildx", "docker-compose"}),
        (13, {"dockerd": SUCCEEDS, "docker": SUCCEEDS}, set()),
        (13, {"dockerd": SUCCEEDS, "docker": FAILS}, {"docker-buildx", "docker-compose"}),
        (13, {"dockerd": SUCCEEDS}, {"docker-cli", "docker-buildx", "docker-compose"}),
    ],
)
def test_only_the_missing_parts_of_docker_are_installed(
    machine: Machine,
    prepare: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    release: int,
    programs: dict[str, str],
    missing: set[str],
) -> None:
    for name, script in programs.items():
        machine.add_program(name, script)
    monkeypatch.setenv("PATH", "")
    prepare["main"].__globals__["debian_release"] = lambda: release
    assert set(prepare["docker_packages"]()) == missing


@pytest.mark.parametrize(
    ("version", "is_reported"), [("19.03.15", True), ("20.10.24+dfsg1", False), ("27.5.1", False), ("28.0.0", True)]
)
def test_a_docker_version_that_cannot_use_the_driver_is_reported(
    machine: Machine,
    prepare: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    version: str,
    is_reported: bool,
) -> None:
    machine.add_program("dockerd", f"echo Docker version {version}, build 1")
    monkeypatch.setenv("PATH", "")
    prepare["warn_about_docker"]()
    assert (f"{version}, build 1) cannot use the gear driver" in capfd.readouterr().err) == is_reported


def test_set_up_and_doctor_accept_the_same_docker_versions(prepare: dict[str, Any]) -> None:
    assert (prepare["FIRST_DOCKER"], prepare["LAST_DOCKER"]) == (doctor.FIRST_DOCKER, doctor.LAST_DOCKER)


def test_an_installed_busybox_is_kept_and_a_static_busybox_is_unpacked(
    machine: Machine, prepare: dict[str, Any]
) -> None:
    machine.install(machine.offer("busybox", program="bin/busybox"))
    machine.offer("busybox-static", conflicts="busybox", program="bin/busybox")
    unpacked = machine.root / "unpacked"
    prepare["main"].__globals__["BUSYBOX"] = unpacked
    assert "busybox-static" not in prepare["missing_packages"]()
    prepare["unpack_busybox"]()
    assert (unpacked.read_text(), machine.installed()) == ("busybox-static", {"busybox"})
