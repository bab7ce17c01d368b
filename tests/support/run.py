"""`python -m tests.support.run [ARGUMENT…]`: all tests in three parts beside each other, by pytest.

Each waits more than it computes, and has a sandbox of its own.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

ON_DOCKERDS = "tests/e2e"
APART = ("tests/e2e/test_applications.py", "tests/e2e/test_systemd.py")
"""They share their dockerds with no other test."""
CRASHES = "tests/faults"


def parts() -> list[list[str]]:
    """The arguments of each; none takes much longer than the others."""
    rest = {str(path.parent) for path in Path("tests").rglob("test_*.py")} - {ON_DOCKERDS, CRASHES}
    return [[ON_DOCKERDS, *(f"--ignore={path}" for path in APART)], sorted(rest), [CRASHES, *APART]]


def main(arguments: list[str]) -> int:
    """Run all parts at once, print their output one after the other, and return the worst exit code."""
    with tempfile.TemporaryDirectory(prefix="gear-tests-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        outputs = [Path(name) / f"output-{number}" for number in range(1, len(parts()))]
        files = [None, *(stack.enter_context(path.open("wb")) for path in outputs)]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "pytest", f"--basetemp={name}/{number}", *part, *arguments],
                stdout=file,
                stderr=file and subprocess.STDOUT,
            )
            for number, (part, file) in enumerate(zip(parts(), files, strict=True))
        ]

        def pass_on(number: int, _: FrameType | None) -> None:
            for process in running:
                process.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        codes = [process.wait() for process in running]
        sys.stdout.flush()
        for path in outputs:
            sys.stdout.buffer.write(path.read_bytes())
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
