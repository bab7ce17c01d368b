"""`python -m tests.support.run [ARGUMENT…]`: all tests, one half beside the other, by pytest.

Either waits more than it computes, and each has a sandbox of its own.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

FIRST = ("tests/e2e", "tests/faults")
ALONE = "tests/e2e/test_applications.py"
"""Of the first by its place; it shares its dockerds with no other, and the second half ends before otherwise."""


def halves() -> tuple[list[str], list[str]]:
    """The arguments of both, which take alike long."""
    second = sorted({str(path.parent) for path in Path("tests").rglob("test_*.py")} - set(FIRST))
    return [*FIRST, f"--ignore={ALONE}"], [*second, ALONE]


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
