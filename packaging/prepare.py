"""Make this checkout runnable: Debian packages and the virtual environment. Idempotent; quick when done.

Runs under the machine's own python3 (3.11 or newer) with the standard library alone. Packages are installed only
when missing, and no service that they bring is started: `policy-rc.d` forbids it while apt runs. No package is ever
removed, and a Docker that is there is taken as it is, whoever packaged it.
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
    "systemd",  # for systemd-analyze; it comes without systemd-sysv, so it does not become the machine's init
    "systemd-container",  # systemd-nspawn, which boots the units in a test
)
FIRST_DOCKER = (20, 10)
LAST_DOCKER = 27
"""Later ones have no graphdriver plugins."""
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where dockerd may be, too, when a user other than root looks."""
BUSYBOX = VENV / "bin" / "busybox"
COMPILER_PACKAGES = ("gcc", "libc6-dev")
"""pyxattr comes as source alone."""


def main() -> None:
    """Install missing packages and build .venv."""
    if sys.version_info < (3, 11):  # noqa: UP036  the machine's python3 may be older
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: set PYTHON=…")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))
    install_packages(missing_packages())
    if not is_venv_current():
        build_venv()
    if is_installed("busybox") and not BUSYBOX.exists():
        unpack_busybox()
    note_docker()


def missing_packages() -> list[str]:
    """The Debian packages that are wanted and not installed; those for .venv only while there is none."""
    wanted = [*PACKAGES, *docker_packages()]
    if not is_installed("busybox"):  # the two exclude each other
        wanted.append("busybox-static")
    if not is_venv_current():
        wanted += packages_to_build_with()
    installed = installed_of(wanted)
    return [name for name in wanted if name not in installed]


def installed_of(names: list[str]) -> set[str]:
    """Those of the Debian packages that are installed."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *names]
    lines = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    return {line.split()[0] for line in lines.splitlines() if line.endswith(" installed")}


def is_installed(name: str) -> bool:
    """Whether the Debian package is installed."""
    return bool(installed_of([name]))


def docker_packages() -> list[str]:
    """Debian packages for the missing parts of dockerd, its client, BuildKit and Compose."""
    lacks_daemon, lacks_client = which("dockerd") is None, which("docker") is None
    lacks_compose = which("docker-compose") is None and not has_plugin("compose")
    wanted = ["docker-compose"] if lacks_compose else []
    if debian_release() < 13:  # docker.io holds the client, which has BuildKit built in
        return [*wanted, "docker.io"] if lacks_daemon or lacks_client else wanted
    lacking = {"docker.io": lacks_daemon, "docker-cli": lacks_client, "docker-buildx": not has_plugin("buildx")}
    return [*wanted, *(name for name, lacks in lacking.items() if lacks)]


def which(name: str) -> str | None:
    """The program's path; None if there is none."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}")


def has_plugin(name: str) -> bool:
    """Whether Docker's client has the command, which may be a plugin of the user's."""
    if (docker := which("docker")) is None:
        return False
    command = [docker, name, "version"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def note_docker() -> None:
    """Say so if gearworkers does not work with the machine's dockerd; the parts that need none still do."""
    if (dockerd := which("dockerd")) is None:
        return
    told = subprocess.run([dockerd, "--version"], stdout=subprocess.PIPE, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", told)
    if version and FIRST_DOCKER <= (int(version[1]), int(version[2])) < (LAST_DOCKER + 1, 0):
        return
    print(
        f"note: {dockerd} ({told.strip()}) cannot use the gear driver. `make demo`, `make test` and a node need Docker "
        f"{'.'.join(map(str, FIRST_DOCKER))} to {LAST_DOCKER}; set-up does not change the installed one.",
        file=sys.stderr,
    )


def packages_to_build_with() -> list[str]:
    """Packages that this Python needs to make a virtual environment and to compile into it."""
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
    """Install *names* unless that would remove another package; on failure exit with advice."""
    if not names:
        return
    if os.geteuid() != 0:
        sys.exit(f"missing Debian packages, run as root: apt-get install {' '.join(names)}")
    print(f"installing {' '.join(names)}", flush=True)
    with signals_put_off(), no_service_starts():
        apt_get("install", "-y", "--no-install-recommends", "--no-remove", *names)


def apt_get(*arguments: str, place: Path | None = None) -> None:
    """Run apt-get in the directory *place*, again after an update if it fails; exits with the command that failed.

    In a session of its own, where no Ctrl-C meets dpkg at work.
    """
    run = partial(
        subprocess.run,
        cwd=place,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    command = ["apt-get", "-q", *arguments]
    if run(command, stderr=subprocess.DEVNULL).returncode != 0:
        for needed in (["apt-get", "-q", "update"], command):
            if run(needed).returncode != 0:
                sys.exit(f"{' '.join(needed)} failed; if it must remove packages, set-up leaves that to you")


def unpack_busybox() -> None:
    """Put a static busybox, of which the tests' images are made, where it does not conflict with the machine's own."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        apt_get("download", "-o", "APT::Sandbox::User=root", "busybox-static", place=place)
        (package,) = place.glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, place], check=True)
        (program,) = (path for path in place.rglob("bin/busybox") if not path.parent.is_symlink())
        shutil.copy2(program, BUSYBOX)


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
    """The inputs of the virtual environment."""
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
