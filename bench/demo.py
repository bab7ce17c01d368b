"""`make demo`: run the same steps on real images with both front doors, each beside overlayfs, and show the figures."""

from __future__ import annotations

import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from bench.containerd_sides import containerd_sides
from bench.frame import Side, fresh_disk
from tests.support import rootfs, sandbox
from tests.support.dockerd import Dockerd
from tests.support.stack import Stack

RECORD_BYTES = 40
"""Length of a record in a layer's `objects` list: a digest of 32 bytes and a size."""
_STEPS = (
    b"FROM first\n"
    b"RUN mkdir /app && cp -a /usr/lib/git-core /app/git-core\n"
    b"RUN chown -R 1000:1000 /app\n"
    b"RUN rm -r /usr/share/doc && echo done > /app/done\n"
    b'CMD ["cat", "/app/done"]\n'
)
_BUILD = ("build", "--network", "host", "-t", "built", "-")


class Docker(Protocol):
    """A dockerd, whatever its image store."""

    def docker(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run a docker command; return its output."""

    def run(self, image: str, *command: str) -> str:
        """Run a container and remove it; return its output."""


@dataclass
class Outcome:
    """The results of one side."""

    seconds: dict[str, float] = field(default_factory=dict)
    stored_bytes: float = 0
    shared_files: int | None = None

    def step(self, name: str, work: Callable[[], str]) -> str:
        """Run one step and record its time; return its output."""
        begin = time.perf_counter()
        output = work()
        self.seconds[name] = time.perf_counter() - begin
        return output


def run_steps(host: Docker) -> Outcome:
    """Import, run, build, run the built image, import a second image that shares most files, run it."""
    outcome = Outcome()
    outcome.step("import a Debian", lambda: host.docker("import", str(rootfs.debian()), "first"))
    outcome.step("run a container", lambda: host.run("first", "git", "--version"))
    outcome.step("build 4 steps on it", lambda: host.docker(*_BUILD, stdin=_STEPS))
    output = outcome.step("run the built image", lambda: host.run("built"))
    assert output == "done", output
    outcome.step("import a second Debian", lambda: host.docker("import", str(rootfs.debian_variant()), "second"))
    outcome.step("run the second", lambda: host.run("second", "cat", "/etc/debian_version"))
    return outcome


def graphdriver_outcomes(disk: Path) -> list[Outcome]:
    """Run the steps on this host's Docker: gearworkers as graphdriver plugin, then overlay2."""
    outcomes = []
    for driver in ("gear", "overlay2"):
        print(f"Docker, storage driver {driver}", flush=True)
        with running(disk, driver) as side:
            outcome = run_steps(side.dockerd)
            outcome.stored_bytes = side.stored_bytes()
            if side.stack is not None:
                outcome.shared_files = shared_objects(side.stack.root)
            outcomes.append(outcome)
    return outcomes


def containerd_outcomes(disk: Path) -> list[Outcome]:
    """Run the steps on a newer Docker with containerd's image store: snapshotter gear, then overlayfs."""
    outcomes = []
    with containerd_sides(disk, docker=True) as sides:
        for side in sides:
            print(f"containerd, snapshotter {side.snapshotter}", flush=True)
            outcome = run_steps(side.docker)
            outcome.stored_bytes = side.stored_bytes()
            if side.containerd.stack is not None:
                outcome.shared_files = shared_objects(side.containerd.stack.root)
            outcomes.append(outcome)
    return outcomes


def shared_objects(gear_root: Path) -> int:
    """Return the number of objects that more than one layer refers to."""
    seen: set[bytes] = set()
    shared: set[bytes] = set()
    for path in gear_root.glob("images/*/objects"):
        records = path.read_bytes()
        digests = {records[at : at + 32] for at in range(0, len(records), RECORD_BYTES)}
        shared |= seen & digests
        seen |= digests
    return len(shared)


def logical_bytes(*tars: Path) -> int:
    """Return the sum of the sizes of all files in the tars."""
    total = 0
    for path in tars:
        with tarfile.open(path) as tar:
            total += sum(info.size for info in tar if info.isreg())
    return total


@contextmanager
def running(disk: Path, driver: str) -> Iterator[Side]:
    """Run a dockerd with *driver*; for gearworkers also the processes of `make up`."""
    stack = Stack(disk / "stack") if driver == "gear" else None
    side = Side(Dockerd(driver, disk / driver, driver), stack)
    try:
        if stack is not None:
            stack.up()
        side.dockerd.start()
        yield side
    finally:
        side.dockerd.stop()
        if stack is not None:
            stack.make_up.stop()


def show(title: str, peer_name: str, outcomes: list[Outcome]) -> None:
    """Print a table: seconds of each step, logical and stored bytes, shared files."""
    ours, peer = outcomes
    table = Table("", "gearworkers", peer_name, title=title)
    for name, taken_s in ours.seconds.items():
        table.add_row(f"{name}, s", f"{taken_s:.2f}", f"{peer.seconds[name]:.2f}")
    logical = f"{logical_bytes(rootfs.debian(), rootfs.debian_variant()) / 1e6:.0f}"
    table.add_row("logical bytes of the two imports, MB", logical, logical)
    table.add_row("stored bytes, all images, MB", f"{ours.stored_bytes / 1e6:.0f}", f"{peer.stored_bytes / 1e6:.0f}")
    table.add_row("files shared by several layers", str(ours.shared_files), "–")
    Console(width=90).print(table)


def main() -> int:
    """Run the steps in a sandbox, which leaves nothing behind."""
    if not sandbox.is_inside():
        return sandbox.run([sys.executable, "-m", "bench.demo"])
    with fresh_disk() as disk:
        graphdriver, containerd = graphdriver_outcomes(disk), containerd_outcomes(disk)
    show("Docker with a graphdriver plugin", "overlay2", graphdriver)
    show("Docker with containerd's image store", "overlayfs", containerd)
    print("With containerd, stored bytes are those of the layers, without the compressed blobs.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
