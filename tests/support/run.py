"""`python -m tests.support.run [ARGUMENT…]`: run all tests in four pytest processes in parallel.

Each process has its own sandbox. The tests mostly wait, so running them in parallel saves time even on few cores.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

END_TO_END = "tests/e2e"
OWN_DOCKERD = ("tests/e2e/test_applications.py", "tests/e2e/test_systemd.py")
"""End-to-end tests that share their dockerd with no other test."""
ON_CONTAINERD = (
    "tests/e2e/test_containerd.py",
    "tests/e2e/test_containerd_crashes.py",
    "tests/e2e/test_containerd_gear_images.py",
    "tests/e2e/test_cri.py",
    "tests/e2e/test_unmodified_images.py",
)
FAULTS = "tests/faults"


def parts() -> list[list[str]]:
    """Return the pytest arguments of each process; all take about the same time."""
    rest = {str(path.parent) for path in Path("tests").rglob("test_*.py")} - {END_TO_END, FAULTS}
    others = [f"--ignore={path}" for path in (*OWN_DOCKERD, *ON_CONTAINERD)]
    return [[END_TO_END, *others], sorted(rest), [FAULTS, *OWN_DOCKERD], list(ON_CONTAINERD)]


def main(arguments: list[str]) -> int:
    """Run all parts in parallel, print their outputs one after the other, and return the highest exit code."""
    with tempfile.TemporaryDirectory(prefix="gear-tests-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        outputs = [Path(name) / f"output-{number}" for number in range(1, len(parts()))]
        files = [None, *(stack.enter_context(path.open("wb")) for path in outputs)]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "pytest", "--in-memory", *part, *arguments],
                stdout=file,
                stderr=file and subprocess.STDOUT,
            )
            for part, file in zip(parts(), files, strict=True)
        ]

        def forward(number: int, _: FrameType | None) -> None:
            for process in running:
                process.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, forward)
        codes = [process.wait() for process in running]
        sys.stdout.flush()
        for path in outputs:
            sys.stdout.buffer.write(path.read_bytes())
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
