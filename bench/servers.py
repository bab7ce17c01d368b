"""A registry and a manager, behind a network of 100 Mbit/s and 20 ms or on loopback.

The slow network is a veth pair to a network namespace, with tc's token bucket on both ends. A forwarder in front of
each server delays every byte by half of the round trip (this kernel has no netem). The counters of the veth device give
the received bytes, headers included. The set-up does not reproduce TCP's slow start, for either side.
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
class ServerData:
    """The data of both servers on disk; changed only while no server runs."""

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
        """Push images NAME:VERSION unchanged, and converted as gear/NAME:VERSION."""
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
        """The registry's part of an image name."""
        return f"{self.host}:{_REGISTRY_PORT}"

    @property
    def manager(self) -> str:
        """GEAR_REMOTE."""
        return f"http://{self.host}:{_MANAGER_PORT}"

    def received_bytes(self) -> int:
        """Return the bytes received from both servers since the device was made."""
        lines = Path("/proc/self/net/dev").read_text().splitlines()
        fields = next(line for line in lines if line.strip().startswith(f"{self.link}:"))
        return int(fields.partition(":")[2].split()[0])


@contextmanager
def near(data: ServerData) -> Iterator[Servers]:
    """Run the servers on loopback, without a limit."""
    with ExitStack() as running:
        _serve(data, (), running)
        yield _wait_until_ready(Servers(_LOOPBACK, "lo"))


@contextmanager
def far(data: ServerData, rate: str = RATE) -> Iterator[Servers]:
    """Run the servers behind the slow network, with this rate as tc writes it."""
    with ExitStack() as running:
        inside = _namespace(running, rate)
        _serve(data, inside, running)
        for port in (_REGISTRY_PORT, _MANAGER_PORT):
            command = ["--to", f"{_LOOPBACK}:{port}", "--listen", f"{_FAR}:{port}"]
            delay = ["--delay-ms", str(ROUND_TRIP_S / 2 * 1000)]
            _start([*inside, sys.executable, "-m", "tests.support.delay", *command, *delay], data, "delay", running)
        yield _wait_until_ready(Servers(_FAR, _LINK))


def _namespace(running: ExitStack, rate: str) -> tuple[str, ...]:
    """Make a network namespace and the link to it; return the prefix for commands that run in it."""
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
        _run(*prefix, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", rate, "burst", "64kb", "limit", "1mb")
    _run(*inside, "ip", "link", "set", "lo", "up")
    return inside


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _serve(data: ServerData, inside: Sequence[str], running: ExitStack) -> None:
    registry = Registry(data.registry, _REGISTRY_PORT)
    _start([*inside, *registry.daemon.command], data, "registry", running)
    gear = [sys.executable, "-c", "from gearworkers.cli.main import main; main()", "manager"]
    _start([*inside, *gear], data, "manager", running)


def _start(command: Sequence[str], data: ServerData, name: str, running: ExitStack) -> None:
    environ = {"GEAR_MANAGER_STORE": str(data.objects), "GEAR_MANAGER_LISTEN": f"{_LOOPBACK}:{_MANAGER_PORT}"}
    daemon = Daemon(command, data.directory / f"{name}.log", {**os.environ, **environ}, CHECKOUT)
    daemon.start()
    running.callback(daemon.stop)


def _wait_until_ready(servers: Servers) -> Servers:
    """Return *servers* when both answer."""
    for url in (f"http://{servers.registry}/v2/", f"{servers.manager}/metrics"):
        wait_until(lambda url=url: _answers(url), url, 60.0)  # type: ignore[misc]
    return servers


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return bool(page.status == 200)
    except OSError:
        return False
