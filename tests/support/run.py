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

HALVES = (("tests/e2e",), ("tests", "--ignore=tests/e2e"))


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
                for at, half in enumerate(HALVES)
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
