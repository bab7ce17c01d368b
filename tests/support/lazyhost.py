"""A host that runs Gear images with a real dockerd, and the remote it gets their contents from.

The image is a Debian root file system and a layer of an application above it. Its contents lie in a directory, which
`gear manager` serves; the host reaches the manager through a `Link`.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.images.convert_local import convert_locally
from gearworkers.images.plan import plan_conversion
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import RemoteSettings, Settings
from tests.support import rootfs
from tests.support.dockerd import Dockerd
from tests.support.images import Image, pull, tar_of
from tests.support.link import Link, linked
from tests.support.ports import free_port
from tests.support.processes import Daemon
from tests.support.registry import Registry
from tests.support.stack import Stack

SMALL = {f"app/small{number}": b"%d " % number * 200 for number in range(40)}
LARGE = {f"app/large{number}": random.Random(number).randbytes(6 << 20) for number in range(3)}
FILES = SMALL | LARGE
HISTORY = ({"created_by": "debootstrap"}, {"created_by": "ENV a=b", "empty_layer": True}, {"created_by": "COPY app"})


@dataclass
class LazyHost:
    """A stack and its dockerd, with nothing in them."""

    stack: Stack
    dockerd: Dockerd
    manager: Daemon
    link: Link
    image: str
    """The Gear image's name."""
    tars: list[bytes]
    """Of its layers."""
    store: Path
    """What the manager serves; a remote of its own right."""
    url: str
    """Of the manager, through the link."""
    manager_port: int

    def empty(self) -> None:
        """Have everything run, and nothing stored."""
        self.link.heal()
        self.start_manager()
        self.use_remote(self.url)
        self.stack.start()
        if not self.dockerd.answers():
            self.dockerd.start()
        self.dockerd.remove_everything()
        self.stack.stop("lazyfs")  # nobody looks into its mount: what the kernel knows of it goes too
        self.stack.gear("gc")  # only now: the rest of a large file may come after its image has gone
        for link in (self.stack.root / "arrivals").glob("*/*"):
            link.unlink()  # the server does, some seconds later
        shutil.rmtree(self.stack.root / "nfs" / "objects", ignore_errors=True)
        self.stack.start("lazyfs")
        assert self.objects() == 0, self.stack.gear("status").stdout

    def pull(self) -> None:
        """Have the image's layers."""
        self.dockerd.docker("pull", self.image)

    def start(self, *options: str) -> str:
        """A running container of the image, that sleeps."""
        return self.dockerd.run(self.image, "sleep", "100000", options=("-d", *options))

    def objects(self) -> int:
        """How many objects are here."""
        return sum(1 for path in (self.stack.root / "public").glob("*/*") if path.is_file())

    def object_bytes(self) -> int:
        """How many bytes they have."""
        return sum(path.stat().st_size for path in (self.stack.root / "public").glob("*/*"))

    def has(self, digest: bytes) -> bool:
        """Whether the object is here."""
        return ObjectStore(self.stack.root / "public").has(digest)

    def metrics(self) -> str:
        """The lazy file server's."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.stack.lazyfs_socket))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()

    def restart_lazyfs(self) -> None:
        """End it in order and start it."""
        self.stack.stop("lazyfs")
        self.stack.start("lazyfs")

    def use_remote(self, remote: str) -> None:
        """Have the lazy file server, started anew if need be, fetch from there."""
        if self.stack.settings["GEAR_REMOTE"] != remote:
            self.stack.set(GEAR_REMOTE=remote)
            self.restart_lazyfs()

    def start_manager(self) -> None:
        """Unless it runs."""
        if not self.manager.is_running():
            self.manager.start()
        self.manager.wait_until(self._manager_listens, "the manager's port")

    def blob(self, digest: bytes) -> Path:
        """Where the remote keeps this blob."""
        name = digest.hex()
        return self.store / "objects" / name[:2] / name

    def _manager_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.manager_port)) == 0


@contextmanager
def lazy_host(directory: Path, registry: Registry) -> Iterator[LazyHost]:
    """The host, its manager and the image; all of it new."""
    store, port = directory / "remote", free_port()
    store.mkdir(parents=True)
    image, tars = _converted(registry, str(store), directory)
    environ = os.environ | {
        "GEAR_ROOT": str(directory / "manager"),
        "GEAR_MANAGER_LISTEN": f"127.0.0.1:{port}",
        "GEAR_MANAGER_STORE": str(store),
    }
    manager = Daemon([str(Path(sys.executable).with_name("gear")), "manager"], directory / "manager.log", environ)
    with linked(port) as (link, link_port):
        url = f"http://127.0.0.1:{link_port}"
        settings = {
            "GEAR_REMOTE": url,
            "GEAR_REMOTE_TIMEOUT_S": "5",
            "GEAR_FILL_DELAY_S": "2",
            "GEAR_PROFILE_WINDOW_S": "0",
        }
        stack = Stack(directory / "stack", "lazy", settings)
        dockerd = Dockerd("l", directory / "docker", "lazy")
        stack.set(DOCKER_HOST=f"unix://{dockerd.socket}")
        try:
            yield LazyHost(stack, dockerd, manager, link, image, tars, store, url, port)
        finally:
            dockerd.stop()
            stack.stop()
            manager.stop()


def _converted(registry: Registry, remote: str, work: Path) -> tuple[str, list[bytes]]:
    """Make the image a Gear image in the registry, its contents in *remote*; its name and its layers' tars."""
    source = Image((rootfs.debian().read_bytes(), tar_of(FILES.items())), compression="", history=HISTORY)
    archive = work / "image.tar"
    archive.write_bytes(source.saved("app:1"))
    settings = replace(Settings(), gear_root=work / "gear", remote=RemoteSettings(url=remote))
    target = f"{registry.host}/app:gear"
    plan = plan_conversion(settings.registry, f"docker-archive:{archive}", target)
    convert_locally(settings, plan, 2, lambda *_: None)
    archive.unlink()
    return target, pull(Repository.of(settings.registry, Reference.parse(target)), "gear").tars
