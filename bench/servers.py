"""A registry and a manager on another host: behind a network of 100 Mbit/s and 20 ms, or beside us on loopback.

The other host is a network namespace. A veth pair leads to it, with tc's token bucket on both ends; a forwarder before
each server delays every byte by half of the round trip (this kernel has no netem). The number of bytes is read from
the veth's own counters, headers included. TCP's slow start is not there, for either side.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gearworkers.settings import RegistrySettings, RemoteSettings, Settings
from tests.support.appimages import convert, push
from tests.support.processes import Daemon, wait_until
from tests.support.registry import Registry
from tests.support.stack import CHECKOUT

RATE = "100mbit"
ROUND_TRIP_S = 0.020
_NEAR, _FAR = "192.0.2.1", "192.0.2.2"
_LINK = "far"
_REGISTRY_PORT, _MANAGER_PORT = 5000, 2019
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Held:
    """The servers' data on disk, while no server runs."""

    directory: Path

    @property
    def registry(self) -> Path:
        """The registry's directory."""
        return self.directory / "registry"

    @property
    def objects(self) -> Path:
        """The manager's directory."""
        return self.directory / "objects"

    def add(self, names: Sequence[str], *, originals: bool = True, converted: bool = True) -> None:
        """Push images NAME:VERSION as they are, and as gear/NAME:VERSION converted."""
        self.objects.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            remote=RemoteSettings(url=str(self.objects)),
            registry=RegistrySettings(docker_config=self.directory / "docker"),
        )
        server = Registry(self.registry, _REGISTRY_PORT)
        server.start()
        try:
            for name in names:
                if originals:
                    push(settings, name, f"{server.host}/{name}")
                if converted:
                    convert(settings, name, f"{server.host}/gear/{name}")
        finally:
            server.stop()


@dataclass(frozen=True)
class Servers:
    """A running registry and a running manager."""

    host: str
    link: str
    """The network device that leads to them."""

    @property
    def registry(self) -> str:
        """The part of an image's name before the slash."""
        return f"{self.host}:{_REGISTRY_PORT}"

    @property
    def manager(self) -> str:
        """GEAR_REMOTE."""
        return f"http://{self.host}:{_MANAGER_PORT}"

    def received_bytes(self) -> int:
        """Bytes received from them since the device was made."""
        lines = Path("/proc/self/net/dev").read_text().splitlines()
        fields = next(line for line in lines if line.strip().startswith(f"{self.link}:"))
        return int(fields.partition(":")[2].split()[0])


@contextmanager
def near(held: Held) -> Iterator[Servers]:
    """The servers on loopback, as fast as they are."""
    with ExitStack() as running:
        _serve(held, (), running)
        yield _answering(Servers(_LOOPBACK, "lo"))


@contextmanager
def far(held: Held) -> Iterator[Servers]:
    """The servers behind the slow network."""
    with ExitStack() as running:
        inside = _namespace(running)
        _serve(held, inside, running)
        for port in (_REGISTRY_PORT, _MANAGER_PORT):
            command = ["--to", f"{_LOOPBACK}:{port}", "--listen", f"{_FAR}:{port}"]
            delay = ["--delay-ms", str(ROUND_TRIP_S / 2 * 1000)]
            _start([*inside, sys.executable, "-m", "tests.support.delay", *command, *delay], held, "delay", running)
        yield _answering(Servers(_FAR, _LINK))


def _namespace(running: ExitStack) -> tuple[str, ...]:
    """Make the other host and the link to it; return the prefix for commands that run there."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    running.callback(holder.wait)
    running.callback(holder.kill)
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{holder.pid}/ns/net") == own:
        pass
    inside = ("nsenter", f"--net=/proc/{holder.pid}/ns/net")
    peer = f"{_LINK}-peer"
    _run("ip", "link", "add", _LINK, "type", "veth", "peer", "name", peer, "netns", str(holder.pid))
    for prefix, device, address in (((), _LINK, _NEAR), (inside, peer, _FAR)):
        _run(*prefix, "ip", "address", "add", f"{address}/24", "dev", device)
        _run(*prefix, "ip", "link", "set", device, "up")
        _run(*prefix, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", RATE, "burst", "64kb", "limit", "1mb")
    _run(*inside, "ip", "link", "set", "lo", "up")
    return inside


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _serve(held: Held, inside: Sequence[str], running: ExitStack) -> None:
    registry = Registry(held.registry, _REGISTRY_PORT)
    _start([*inside, *registry.daemon.command], held, "registry", running)
    gear = [sys.executable, "-c", "from gearworkers.cli.main import main; main()", "manager"]
    _start([*inside, *gear], held, "manager", running)


def _start(command: Sequence[str], held: Held, name: str, running: ExitStack) -> None:
    environ = {"GEAR_MANAGER_STORE": str(held.objects), "GEAR_MANAGER_LISTEN": f"{_LOOPBACK}:{_MANAGER_PORT}"}
    daemon = Daemon(command, held.directory / f"{name}.log", {**os.environ, **environ}, CHECKOUT)
    daemon.start()
    running.callback(daemon.stop)


def _answering(servers: Servers) -> Servers:
    """When both answer."""
    for url in (f"http://{servers.registry}/v2/", f"{servers.manager}/metrics"):
        wait_until(lambda url=url: _answers(url), url, 60.0)  # type: ignore[misc]
    return servers


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return bool(page.status == 200)
    except OSError:
        return False
