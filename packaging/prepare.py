"""Make this checkout runnable: Debian packages and the virtual environment. Idempotent; quick when done.

Runs under the system's python3 (3.11 or newer) with the standard library alone. Installs only missing packages and
removes none. `policy-rc.d` keeps the packages' services from starting while apt runs. An installed Docker stays as it
is, from Debian or from elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
VENV = CHECKOUT / ".venv"
STAMP = VENV / "gearworkers-setup.sha256"
POLICY = Path("/usr/sbin/policy-rc.d")
POLICY_TEXT = "#!/bin/sh\n# Written by gearworkers' setup while it installs packages; safe to delete.\nexit 101\n"

PACKAGES = (
    "redis-server",
    "docker-registry",
    "debootstrap",
    "libarchive-tools",
    "iproute2",
    "procps",
    "e2fsprogs",
    "xfsprogs",
    "btrfs-progs",
    "openssl",
    "curl",
    "pigz",  # containerd and dockerd decompress with it if it is installed
    "isal",  # newer versions of containerd prefer it to pigz
    "systemd",  # for systemd-analyze; it comes without systemd-sysv, so it does not become the machine's init
    "systemd-container",  # systemd-nspawn, which boots the units in a test
)
FIRST_DOCKER = (20, 10)
LAST_DOCKER = 27
"""Later releases have no graphdriver plugins."""
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
"""Searched after PATH: the PATH of a user other than root may lack them, and dockerd may be in one of them."""
BUSYBOX = VENV / "bin" / "busybox"
COMPILER_PACKAGES = ("gcc", "libc6-dev")
"""Needed to compile pyxattr, which comes only as source."""


def main() -> None:
    """Install missing packages and build .venv."""
    if sys.version_info < (3, 11):  # noqa: UP036  the machine's python3 may be older
        sys.exit(f"Python 3.11 or newer is needed, not {sys.version.split()[0]}; run `make setup PYTHON=python3.11`")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))
    install_packages(missing_packages())
    if not is_venv_current():
        build_venv()
    if is_installed("busybox") and not BUSYBOX.exists():
        unpack_busybox()
    warn_about_docker()


def missing_packages() -> list[str]:
    """Return the missing Debian packages; those that build .venv only if .venv must be built."""
    needed = [*PACKAGES, *docker_packages()]
    if not is_installed("busybox"):  # it conflicts with busybox-static
        needed.append("busybox-static")
    if not is_venv_current():
        needed += build_packages()
    installed = installed_packages(needed)
    return [name for name in needed if name not in installed]


def installed_packages(names: list[str]) -> set[str]:
    """Return those of the Debian packages *names* that are installed."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *names]
    lines = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    return {line.split()[0] for line in lines.splitlines() if line.endswith(" installed")}


def is_installed(name: str) -> bool:
    """Return whether the Debian package is installed."""
    return bool(installed_packages([name]))


def docker_packages() -> list[str]:
    """Return the Debian packages for the missing parts of Docker: dockerd, client, BuildKit and Compose."""
    lacks_daemon, lacks_client = which("dockerd") is None, which("docker") is None
    lacks_compose = which("docker-compose") is None and not has_docker_command("compose")
    needed = ["docker-compose"] if lacks_compose else []
    if debian_release() < 13:  # docker.io contains the client, which has BuildKit built in
        return [*needed, "docker.io"] if lacks_daemon or lacks_client else needed
    lacks_buildx = not has_docker_command("buildx")
    lacks = {"docker.io": lacks_daemon, "docker-cli": lacks_client, "docker-buildx": lacks_buildx}
    return [*needed, *(name for name, is_missing in lacks.items() if is_missing)]


def which(name: str) -> str | None:
    """Return the path of a program; None if it is not installed."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}")


def has_docker_command(name: str) -> bool:
    """Return whether Docker's client has the command *name*, built in or as a plugin of the system or the user."""
    if (docker := which("docker")) is None:
        return False
    command = [docker, name, "version"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def warn_about_docker() -> None:
    """Warn if the installed dockerd cannot use the gear driver; parts that need no dockerd still work."""
    if (dockerd := which("dockerd")) is None:
        return
    output = subprocess.run([dockerd, "--version"], stdout=subprocess.PIPE, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", output)
    if version and FIRST_DOCKER <= (int(version[1]), int(version[2])) < (LAST_DOCKER + 1, 0):
        return
    print(
        f"note: {dockerd} ({output.strip()}) cannot use the gear driver. Docker {LAST_DOCKER + 1} and later use "
        f"gearworkers through containerd; `make test` needs {'.'.join(map(str, FIRST_DOCKER))} to {LAST_DOCKER}. "
        "Set-up does not change the installed one.",
        file=sys.stderr,
    )


def build_packages() -> list[str]:
    """Return the packages that this Python needs to make a virtual environment and to compile extensions for it."""
    needed = []
    if importlib.util.find_spec("ensurepip") is None:
        needed.append("python3-venv")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        needed.append("libpython3-dev")
    if shutil.which("cc") is None:
        needed += COMPILER_PACKAGES
    return needed


def debian_release() -> int:
    """Return Debian's major release; unstable counts as the newest."""
    lines = Path("/etc/os-release").read_text().splitlines()
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    return int(fields.get("VERSION_ID", '"99"').strip('"').split(".")[0])


def install_packages(names: list[str]) -> None:
    """Install packages without removing any; exit with advice on failure."""
    if not names:
        return
    if os.geteuid() != 0:
        sys.exit(f"Debian packages are missing; run as root: apt-get install {' '.join(names)}")
    print(f"installing {' '.join(names)}", flush=True)
    with deferred_signals(), no_service_starts():
        apt_get("install", "-y", "--no-install-recommends", "--no-remove", *names)


def apt_get(*arguments: str, cwd: Path | None = None) -> None:
    """Run apt-get; if it fails, update the package lists and retry once. Exit with the failed command.

    apt-get runs in its own session, so Ctrl-C does not interrupt dpkg.
    """
    run = partial(
        subprocess.run,
        cwd=cwd,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    command = ["apt-get", "-q", *arguments]
    if run(command, stderr=subprocess.DEVNULL).returncode != 0:
        for retry in (["apt-get", "-q", "update"], command):
            if run(retry).returncode != 0:
                sys.exit(f"{' '.join(retry)} failed; if it must remove packages, run it yourself")


def unpack_busybox() -> None:
    """Put a static busybox into .venv for the tests' images; the package conflicts with the installed busybox."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        apt_get("download", "-o", "APT::Sandbox::User=root", "busybox-static", cwd=directory)
        (package,) = directory.glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, directory], check=True)
        (program,) = (path for path in directory.rglob("bin/busybox") if not path.parent.is_symlink())
        shutil.copy2(program, BUSYBOX)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP to the end: an interrupted dpkg must be repaired by hand."""
    received: list[int] = []

    def defer(number: int, _frame: object) -> None:
        print("finishing apt-get first", flush=True)
        received.append(number)

    before = {number: signal.signal(number, defer) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        sys.exit("interrupted")


@contextmanager
def no_service_starts() -> Iterator[None]:
    """Keep packages from starting their services.

    Crash: SIGKILL leaves the policy-rc.d written here, which the next set-up removes.
    """
    if POLICY.exists() and POLICY.read_text() != POLICY_TEXT:
        yield
        return
    POLICY.write_text(POLICY_TEXT)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def current_stamp() -> str:
    """Return a hash of the virtual environment's inputs."""
    inputs = [Path(sys.executable).resolve().as_posix().encode(), CHECKOUT.as_posix().encode()]
    inputs += [(CHECKOUT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join(inputs)).hexdigest()


def is_venv_current() -> bool:
    """Return whether .venv was built from these requirements, this interpreter and this checkout."""
    return STAMP.exists() and STAMP.read_text() == current_stamp()


def build_venv() -> None:
    """Make .venv and install this checkout into it, editable, with dependencies at the versions in constraints.txt."""
    print("building .venv", flush=True)
    if VENV.exists() and not shutil.which(str(VENV / "bin" / "python")):
        shutil.rmtree(VENV)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--use-pep517"]
    subprocess.run([*pip, "-c", "constraints.txt", "-e", ".[dev]"], cwd=CHECKOUT, check=True)
    STAMP.write_text(current_stamp())


if __name__ == "__main__":
    main()
