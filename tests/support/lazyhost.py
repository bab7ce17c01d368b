"""A host that runs a Gear image with a real dockerd, and the remote with the image's contents.

The image has two layers: a Debian root file system and an application. Its contents are in a directory, which
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

# Each has a suffix of its own, so that none is another's companion.
SMALL = {f"app/small.{number}": b"%d " % number * 200 for number in range(40)}
LARGE = {f"app/large{number}": random.Random(number).randbytes(6 << 20) for number in range(3)}
FILES = SMALL | LARGE
HISTORY = ({"created_by": "debootstrap"}, {"created_by": "ENV a=b", "empty_layer": True}, {"created_by": "COPY app"})


@dataclass
class LazyHost:
    """A stack with its dockerd, and the manager behind a link."""

    stack: Stack
    dockerd: Dockerd
    manager: Daemon
    link: Link
    image: str
    """Name of the Gear image."""
    tars: list[bytes]
    """Tars of the image's layers."""
    store: Path
    """Directory that the manager serves; usable as a remote itself."""
    url: str
    """URL of the manager through the link."""
    manager_port: int

    def reset(self) -> None:
        """Start all processes and remove all images and objects."""
        self.link.reset()
        self.start_manager()
        self.use_remote(self.url)
        self.stack.start()
        if not self.dockerd.answers():
            self.dockerd.start()
        self.dockerd.remove_everything()
        self.stack.stop("lazyfs")  # drops the kernel's cache of its mount too
        self.stack.gear("gc")  # only now: the rest of a large file may arrive after its image is removed
        for link in (self.stack.root / "arrivals").glob("*/*"):
            link.unlink()  # the server would remove it some seconds later
        shutil.rmtree(self.stack.root / "nfs" / "objects", ignore_errors=True)
        self.stack.start("lazyfs")
        assert self.object_count() == 0, self.stack.gear("status").stdout

    def pull(self) -> None:
        """Pull the image."""
        self.dockerd.docker("pull", self.image)

    def start(self, *options: str) -> str:
        """Start a container of the image that sleeps; return its id."""
        return self.dockerd.run(self.image, "sleep", "100000", options=("-d", *options))

    def object_count(self) -> int:
        """Return the number of objects in the host's store."""
        return sum(1 for path in (self.stack.root / "public").glob("*/*") if path.is_file())

    def object_bytes(self) -> int:
        """Return the size of all objects in the host's store."""
        return sum(path.stat().st_size for path in (self.stack.root / "public").glob("*/*"))

    def has(self, digest: bytes) -> bool:
        """Return whether the host's store has the object."""
        return ObjectStore(self.stack.root / "public").has(digest)

    def metrics(self) -> str:
        """Return the metrics of the lazy file server."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.stack.lazyfs_socket))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()

    def restart_lazyfs(self) -> None:
        """Stop and start the lazy file server."""
        self.stack.stop("lazyfs")
        self.stack.start("lazyfs")

    def use_remote(self, remote: str) -> None:
        """Make the lazy file server fetch from *remote*; restart it if that changes its remote."""
        if self.stack.settings["GEAR_REMOTE"] != remote:
            self.stack.set(GEAR_REMOTE=remote)
            self.restart_lazyfs()

    def start_manager(self) -> None:
        """Start the manager unless it runs; return when it listens."""
        if not self.manager.is_running():
            self.manager.start()
        self.manager.wait_until(self._manager_listens, "the manager's port")

    def blob(self, digest: bytes) -> Path:
        """Return the path of a blob in the remote."""
        name = digest.hex()
        return self.store / "objects" / name[:2] / name

    def _manager_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.manager_port)) == 0


@contextmanager
def lazy_host(directory: Path, registry: Registry) -> Iterator[LazyHost]:
    """Run a new host and manager, and push the image; yield the host."""
    store, port = directory / "remote", free_port()
    store.mkdir(parents=True)
    image, tars = _convert_image(registry, str(store), directory)
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


def _convert_image(registry: Registry, remote: str, work: Path) -> tuple[str, list[bytes]]:
    """Convert the image to a Gear image in the registry, contents in *remote*; return its name and layers' tars."""
    source = Image((rootfs.debian().read_bytes(), tar_of(FILES.items())), compression="", history=HISTORY)
    archive = work / "image.tar"
    archive.write_bytes(source.saved("app:1"))
    settings = replace(Settings(), gear_root=work / "gear", remote=RemoteSettings(url=remote))
    target = f"{registry.host}/app:gear"
    plan = plan_conversion(settings.registry, f"docker-archive:{archive}", target)
    convert_locally(settings, plan, 2, lambda *_: None)
    archive.unlink()
    return target, pull(Repository.of(settings.registry, Reference.parse(target)), "gear").tars
