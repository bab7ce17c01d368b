"""Run the processes of the Procfile in the foreground until SIGTERM, SIGINT or SIGHUP; restart processes that end.

The processes get every setting in their environment. All of them end with this process, even if it is killed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from honcho.colour import get_colours
from honcho.environ import parse_procfile
from honcho.printer import Message, Printer

from gearworkers.errors import GearError
from gearworkers.settings import Settings
from gearworkers.util.locks import sole_process
from gearworkers.util.writing import write_all

CHECKOUT = Path(__file__).resolve().parent.parent
GRACE_S = 60
"""Time after SIGTERM to finish work in progress; then the process is killed."""
_MIN_DELAY_S = 0.5
_MAX_DELAY_S = 30.0
_LONG_RUN_S = 60.0
"""A process that ran longer than this restarts after the minimum delay."""
_READ_BYTES = 1 << 16
_MAX_BUFFERED_LINES = 10_000
_STDOUT_FD = 1
_FLUSH_S = 1.0

PrintLine = Callable[[str, bytes], None]
"""Prints a line: the name of the process, the text."""


class _Output:
    """Standard output for a Printer; a slow reader does not block the writers.

    Drops lines while the disk is full, and lines beyond _MAX_BUFFERED_LINES that the reader has not taken.

    Args:
        on_closed: Called in another thread when the reader has closed the output.
    """

    def __init__(self, on_closed: Callable[[], object]) -> None:
        self._on_closed = on_closed
        self._line = ""
        self._lines: queue.Queue[str] = queue.Queue(_MAX_BUFFERED_LINES)
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        self._line += text

    def flush(self) -> None:
        """Flush the written lines."""
        with suppress(queue.Full):
            self._lines.put_nowait(self._line)
        self._line = ""

    def isatty(self) -> bool:
        return os.isatty(_STDOUT_FD)

    def close(self) -> None:
        """Write the buffered lines, for at most _FLUSH_S."""
        self.flush()  # an empty line ends the thread
        self._thread.join(_FLUSH_S)

    def _write_all(self) -> None:
        while line := self._lines.get():
            try:
                write_all(_STDOUT_FD, line.encode())
            except OSError as exc:
                if exc.errno in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a closed terminal
                    self._on_closed()
                    return


async def run(commands: Mapping[str, str]) -> bool:
    """Keep shell commands running until a signal arrives or the output is closed; return whether a signal arrived.

    All commands have ended on return. Each gets SIGTERM, and its whole session SIGKILL after GRACE_S.
    """
    loop = asyncio.get_running_loop()
    stop, signalled = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        signalled.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            loop.add_signal_handler(number, on_signal)
    output = _Output(lambda: loop.call_soon_threadsafe(stop.set))
    print_line = _line_printer(output, list(commands))
    await asyncio.gather(*(_keep_running(name, command, print_line, stop) for name, command in commands.items()))
    output.close()
    return signalled.is_set()


def _line_printer(output: _Output, names: list[str]) -> PrintLine:
    printer = Printer(output, width=max(map(len, names)))
    colours = dict(zip(names, get_colours(), strict=False))

    def print_line(name: str, text: bytes) -> None:
        printer.write(Message("line", text, datetime.now(), name, colours[name]))

    return print_line


async def _keep_running(name: str, command: str, print_line: PrintLine, stop: asyncio.Event) -> None:
    """Restart *command* whenever it ends, until *stop*; double the delay after each short run."""
    loop = asyncio.get_running_loop()
    delay_s = _MIN_DELAY_S
    while not stop.is_set():
        started_s = loop.time()
        try:
            code = await _run_once(name, command, print_line, stop)
            reason = f"has ended ({f'exit status {code}' if code >= 0 else f'signal {-code}'})"
        except OSError as exc:
            reason = f"cannot be started ({exc})"
        if stop.is_set():
            return
        if loop.time() - started_s > _LONG_RUN_S:
            delay_s = _MIN_DELAY_S
        print_line(name, f"{reason}; the next start is in {delay_s:g} s".encode())
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), delay_s)
        delay_s = min(2 * delay_s, _MAX_DELAY_S)


async def _run_once(name: str, command: str, print_line: PrintLine, stop: asyncio.Event) -> int:
    """Run *command* until it ends or *stop* ends it; return its exit status, or minus the signal that ended it."""
    read_fd, write_fd = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "TERM", "sh", "-c", command),
        stdin=subprocess.DEVNULL,
        stdout=write_fd,
        stderr=write_fd,
        start_new_session=True,
    )
    os.close(write_fd)
    relaying = asyncio.create_task(_relay(read_fd, lambda line: print_line(name, line)))
    ended, stopping = asyncio.create_task(process.wait()), asyncio.create_task(stop.wait())
    await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    with suppress(ProcessLookupError):  # it has just ended
        if not ended.done():
            process.terminate()
            await asyncio.wait((ended,), timeout=GRACE_S)
        if not ended.done():
            print_line(name, b"has not ended in time: SIGKILL")
            os.killpg(process.pid, signal.SIGKILL)
    code = await ended
    await asyncio.wait((relaying,), timeout=_FLUSH_S)  # a child left behind may hold the pipe open
    return code


async def _relay(read_fd: int, print_line: Callable[[bytes], None]) -> None:
    """Print the pipe's lines until its last writer closes it."""
    reader = asyncio.StreamReader()
    with os.fdopen(read_fd, "rb") as pipe:
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        rest = b""
        while data := await reader.read(_READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                print_line(line)
            if len(rest) > _READ_BYTES:
                print_line(rest)
                rest = b""
        print_line(rest)


def _environment(settings: Settings) -> dict[str, str]:
    """Return the environment that gives *settings* to the processes of the Procfile."""
    venv_bin = str(Path(sys.executable).parent)
    return {
        "PATH": os.pathsep.join([venv_bin, os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "GEAR_ROOT": str(settings.gear_root),
        "GEAR_RUN_DIR": str(settings.run_dir),
        "GEAR_PLUGIN_SOCKET": settings.plugin_socket,
        "GEAR_BROKER_URL": settings.effective_broker_url,
        "GEAR_NODE": settings.node,
    }


def _run_alone(settings: Settings) -> bool:
    """Run all processes, without Redis if GEAR_BROKER_URL names another broker; return the result of `run`.

    Raises:
        FailedPrecondition: A stack of this GEAR_ROOT or GEAR_RUN_DIR is already running; nothing was changed.
    """
    commands = dict(parse_procfile((CHECKOUT / "Procfile").read_text()).processes)
    if settings.broker_url:
        del commands["redis"]
    with (
        sole_process(settings.gear_root / "up.lock", "a stack of this GEAR_ROOT"),
        sole_process(settings.run_dir / "up.lock", "a stack of this GEAR_RUN_DIR"),
    ):
        with sole_process(settings.gateway_lock, "a gateway of this GEAR_ROOT"):
            pass  # a gateway may run without `make up`
        os.chdir(CHECKOUT)
        os.environ.update(_environment(settings))
        return asyncio.run(run(commands))


def main() -> None:
    """Run until a signal arrives; print an error as one line on stderr and exit with status 1."""
    try:
        is_signalled = _run_alone(Settings.from_environ())
    except (GearError, OSError) as exc:
        sys.exit(f"make up: {exc}")
    if not is_signalled:
        sys.exit("make up: the reader closed the output; all processes have ended")


if __name__ == "__main__":
    main()
