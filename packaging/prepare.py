"""Make this checkout runnable: Debian packages and the virtual environment. Idempotent; quick when done.

Runs under the machine's own python3 (3.11 or newer) with the standard library alone. Packages are installed only
when missing, and no service that they bring is started: `policy-rc.d` forbids it while apt runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
VENV = CHECKOUT / ".venv"
STAMP = VENV / "gearworkers-setup.sha256"
POLICY = Path("/usr/sbin/policy-rc.d")
POLICY_TEXT = "#!/bin/sh\n# Written by gearworkers' setup while it installs packages; safe to delete.\nexit 101\n"

PACKAGES = (
    "redis-server",
    "docker.io",
    "docker-registry",
    "docker-compose",
    "debootstrap",
    "libarchive-tools",
    "iproute2",
    "procps",
    "e2fsprogs",
    "xfsprogs",
    "busybox-static",
    "openssl",
    "curl",
    "systemd",  # for systemd-analyze; it comes without systemd-sysv, so it does not become the machine's init
    "systemd-container",  # systemd-nspawn, which boots the units in a test
)
PACKAGES_SINCE_13 = ("docker-cli", "docker-buildx")
"""Debian 12's docker.io holds the client, which has BuildKit built in."""
COMPILER_PACKAGES = ("gcc", "libc6-dev")
"""pyxattr comes as source alone."""


def main() -> None:
    """Install what is missing and build .venv."""
    if sys.version_info < (3, 11):  # noqa: UP036  the machine's python3 may be older
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: set PYTHON=…")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))
    install_packages(missing_packages())
    if not is_venv_current():
        build_venv()


def missing_packages() -> list[str]:
    """The Debian packages that are wanted and not installed; those for .venv only while there is none."""
    wanted = list(PACKAGES)
    if debian_release() >= 13:
        wanted += PACKAGES_SINCE_13
    if not is_venv_current():
        wanted += packages_to_build_with()
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted]
    lines = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    installed = {line.split()[0] for line in lines.splitlines() if line.endswith(" installed")}
    return [name for name in wanted if name not in installed]


def packages_to_build_with() -> list[str]:
    """What this Python lacks to make a virtual environment and to compile into it."""
    wanted = []
    if importlib.util.find_spec("ensurepip") is None:
        wanted.append("python3-venv")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        wanted.append("libpython3-dev")
    if shutil.which("cc") is None:
        wanted += COMPILER_PACKAGES
    return wanted


def debian_release() -> int:
    """Debian's major release; unstable counts as the newest."""
    lines = Path("/etc/os-release").read_text().splitlines()
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    return int(fields.get("VERSION_ID", '"99"').strip('"').split(".")[0])


def install_packages(names: list[str]) -> None:
    """apt-get install *names*; exits with what to do if that is not possible."""
    if not names:
        return
    if os.geteuid() != 0:
        sys.exit(f"missing Debian packages, run as root: apt-get install {' '.join(names)}")
    print(f"installing {' '.join(names)}", flush=True)
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *names]
    with signals_put_off(), no_service_starts():
        if apt_get(command, environ, stderr=subprocess.DEVNULL) != 0:
            for needed in (["apt-get", "update", "-q"], command):
                if apt_get(needed, environ) != 0:
                    sys.exit(f"{' '.join(needed)} failed")


def apt_get(command: list[str], environ: dict[str, str], stderr: int | None = None) -> int:
    """Run *command* in a session of its own, where no Ctrl-C meets dpkg at work; its exit code."""
    done = subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
    return done.returncode


@contextmanager
def signals_put_off() -> Iterator[None]:
    """Heed SIGINT, SIGTERM and SIGHUP at the end only: a dpkg that is broken off has to be repaired by hand."""
    came: list[int] = []

    def put_off(number: int, _frame: object) -> None:
        print("finishing apt-get first", flush=True)
        came.append(number)

    before = {number: signal.signal(number, put_off) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        sys.exit("interrupted")


@contextmanager
def no_service_starts() -> Iterator[None]:
    """Keep packages from starting their services.

    Crash: a SIGKILL leaves our policy-rc.d, which the next set-up removes.
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


def wanted_stamp() -> str:
    """What the virtual environment was made from."""
    made_from = [Path(sys.executable).resolve().as_posix().encode(), CHECKOUT.as_posix().encode()]
    made_from += [(CHECKOUT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join(made_from)).hexdigest()


def is_venv_current() -> bool:
    """Whether .venv was built from the present pyproject.toml, constraints.txt, interpreter and place."""
    return STAMP.exists() and STAMP.read_text() == wanted_stamp()


def build_venv() -> None:
    """Make .venv and install this checkout into it, editable, at the versions of constraints.txt."""
    print("building .venv", flush=True)
    if VENV.exists() and not shutil.which(str(VENV / "bin" / "python")):
        shutil.rmtree(VENV)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--use-pep517"]
    subprocess.run([*pip, "-c", "constraints.txt", "-e", ".[dev]"], cwd=CHECKOUT, check=True)
    STAMP.write_text(wanted_stamp())


if __name__ == "__main__":
    main()
