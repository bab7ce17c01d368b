"""`python -m tests.support.run [ARGUMENT…]`: all tests, those on a real dockerd beside the rest, by pytest.

Either half waits more than it computes, and each has a sandbox of its own.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

ON_DOCKERDS = "tests/e2e"
WITH_THE_REST = (f"{ON_DOCKERDS}/test_applications.py",)
"""Tests on a real dockerd that share it with no others: the rest alone would end long before."""


def halves() -> tuple[list[str], list[str]]:
    """The arguments of both."""
    rest = sorted({str(path.parent) for path in Path("tests").rglob("test_*.py")} - {ON_DOCKERDS})
    return [ON_DOCKERDS, *(f"--ignore={path}" for path in WITH_THE_REST)], [*rest, *WITH_THE_REST]


def main(arguments: list[str]) -> int:
    """Run both halves, the output of the second behind that of the first; the worse exit code."""
    with tempfile.TemporaryDirectory(prefix="gear-tests-", ignore_cleanup_errors=True) as name:
        output = Path(name) / "output"
        with output.open("wb") as file:
            first, second = (
                subprocess.Popen(
                    [sys.executable, "-m", "pytest", f"--basetemp={name}/{at}", *half, *arguments],
                    stdout=file if at else None,
                    stderr=subprocess.STDOUT if at else None,
                )
                for at, half in enumerate(halves())
            )

            def pass_on(number: int, _: FrameType | None) -> None:
                for process in (first, second):
                    process.send_signal(number)

            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, pass_on)
            codes = first.wait(), second.wait()
        sys.stdout.flush()
        sys.stdout.buffer.write(output.read_bytes())
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
