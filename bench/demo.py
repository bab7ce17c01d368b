"""`make demo`: run the same steps on real images, on gearworkers and then on overlay2, and show a table of both."""

from __future__ import annotations

import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

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


@dataclass
class Outcome:
    """The results of one side."""

    seconds: dict[str, float] = field(default_factory=dict)
    stored_bytes: int = 0
    shared_files: int | None = None

    def step(self, name: str, work: Callable[[], str]) -> str:
        """Run one step and record its time; return its output."""
        begin = time.perf_counter()
        output = work()
        self.seconds[name] = time.perf_counter() - begin
        return output


def run_steps(side: Side) -> Outcome:
    """Import, run, build, run the built image, import a second image that shares most files, run it."""
    outcome, docker = Outcome(), side.dockerd.docker
    outcome.step("import a Debian", lambda: docker("import", str(rootfs.debian()), "first"))
    outcome.step("run a container", lambda: side.dockerd.run("first", "git", "--version"))
    outcome.step("build 4 steps on it", lambda: docker("build", "-t", "built", "-", stdin=_STEPS))
    output = outcome.step("run the built image", lambda: side.dockerd.run("built"))
    assert output == "done", output
    outcome.step("import a second Debian", lambda: docker("import", str(rootfs.debian_variant()), "second"))
    outcome.step("run the second", lambda: side.dockerd.run("second", "cat", "/etc/debian_version"))
    outcome.stored_bytes = side.stored_bytes()
    if side.stack is not None:
        outcome.shared_files = shared_objects(side.stack.root)
    return outcome


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


def show(ours: Outcome, peer: Outcome) -> None:
    """Print the table: seconds of each step, logical and stored bytes, shared files."""
    table = Table("", "gearworkers", "overlay2", title="the same steps, the same dockerd, the same disk")
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
    outcomes = []
    with fresh_disk() as disk:
        for driver in ("gear", "overlay2"):
            print(f"running the steps on {driver}", flush=True)
            with running(disk, driver) as side:
                outcomes.append(run_steps(side))
    show(*outcomes)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
