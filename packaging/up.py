"""Run the Procfile in the foreground until SIGTERM, SIGINT or SIGHUP; a part that ends is started again.

Every setting is said in the parts' environment. No part outlives this process, whatever ends it.
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

CHECKOUT = Path(__file__).resolve().parent.parent
GRACE_S = 60
"""Seconds to finish work in progress; then the process is killed."""
_FIRST_DELAY_S = 0.5
_MOST_DELAY_S = 30.0
_LONG_RUN_S = 60.0
"""Seconds after which a process that ends restarts without the delays of earlier restarts."""
_READ_BYTES = 1 << 16
_MOST_LINES = 10_000
_STDOUT_FD = 1
_FLUSH_S = 1.0

Say = Callable[[str, bytes], None]
"""Writes a line of a part: its name, the text."""


class _Output:
    """Standard output, for a Printer: takes lines at once, whoever reads them and however slowly.

    Lines are lost that a full disk has no room for, and those beyond _MOST_LINES that wait for a reader.

    Args:
        gone: Called, in another thread, when nobody reads any more.
    """

    def __init__(self, gone: Callable[[], object]) -> None:
        self._gone = gone
        self._line = ""
        self._lines: queue.Queue[str] = queue.Queue(_MOST_LINES)
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
        """Give lines in flight a moment."""
        self.flush()  # nothing: the end
        self._thread.join(_FLUSH_S)

    def _write_all(self) -> None:
        while line := self._lines.get():
            data = line.encode()
            try:
                while data:
                    data = data[os.write(_STDOUT_FD, data) :]
            except OSError as exc:
                if exc.errno in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a terminal that was closed
                    self._gone()
                    return


async def run(commands: Mapping[str, str]) -> bool:
    """Keep the shell commands running until a signal comes or the output's reader ends; return whether a signal came.

    Returns when all have ended: by SIGTERM to each command's own process, by SIGKILL to its session after GRACE_S.
    """
    loop = asyncio.get_running_loop()
    stop, signalled = asyncio.Event(), asyncio.Event()

    def heed() -> None:
        signalled.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            loop.add_signal_handler(number, heed)
    output = _Output(lambda: loop.call_soon_threadsafe(stop.set))
    say = _sayer(output, list(commands))
    await asyncio.gather(*(_keep(name, command, say, stop) for name, command in commands.items()))
    output.close()
    return signalled.is_set()


def _sayer(output: _Output, names: list[str]) -> Say:
    printer = Printer(output, width=max(map(len, names)))
    colours = dict(zip(names, get_colours(), strict=False))

    def say(name: str, text: bytes) -> None:
        printer.write(Message("line", text, datetime.now(), name, colours[name]))

    return say


async def _keep(name: str, command: str, say: Say, stop: asyncio.Event) -> None:
    """Run *command* again and again, the later the sooner it ends, until *stop*."""
    loop = asyncio.get_running_loop()
    delay_s = _FIRST_DELAY_S
    while not stop.is_set():
        begun_s = loop.time()
        try:
            code = await _run_once(name, command, say, stop)
            how = f"has ended ({f'exit status {code}' if code >= 0 else f'signal {-code}'})"
        except OSError as exc:
            how = f"cannot be started ({exc})"
        if stop.is_set():
            return
        if loop.time() - begun_s > _LONG_RUN_S:
            delay_s = _FIRST_DELAY_S
        say(name, f"{how}; the next start is in {delay_s:g} s".encode())
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), delay_s)
        delay_s = min(2 * delay_s, _MOST_DELAY_S)


async def _run_once(name: str, command: str, say: Say, stop: asyncio.Event) -> int:
    """Run *command* until it ends, or *stop* ends it; its exit status, or minus the signal that ended it."""
    read_fd, write_fd = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "TERM", "sh", "-c", command),
        stdin=subprocess.DEVNULL,
        stdout=write_fd,
        stderr=write_fd,
        start_new_session=True,
    )
    os.close(write_fd)
    relaying = asyncio.create_task(_relay(read_fd, lambda line: say(name, line)))
    ended, stopping = asyncio.create_task(process.wait()), asyncio.create_task(stop.wait())
    await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    with suppress(ProcessLookupError):  # it has just ended
        if not ended.done():
            process.terminate()
            await asyncio.wait((ended,), timeout=GRACE_S)
        if not ended.done():
            say(name, b"has not ended in time: SIGKILL")
            os.killpg(process.pid, signal.SIGKILL)
    code = await ended
    await asyncio.wait((relaying,), timeout=_FLUSH_S)  # longer if it has left something behind that still writes
    return code


async def _relay(read_fd: int, say_line: Callable[[bytes], None]) -> None:
    """Print the pipe's lines until its last writer closes it."""
    reader = asyncio.StreamReader()
    with os.fdopen(read_fd, "rb") as pipe:
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        rest = b""
        while data := await reader.read(_READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                say_line(line)
            if len(rest) > _READ_BYTES:
                say_line(rest)
                rest = b""
        say_line(rest)


def _environment(settings: Settings) -> dict[str, str]:
    """Environment that makes the Procfile's processes agree with *settings*."""
    venv_bin = str(Path(sys.executable).parent)
    return {
        "PATH": os.pathsep.join([venv_bin, os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "GEAR_ROOT": str(settings.gear_root),
        "GEAR_RUN_DIR": str(settings.run_dir),
        "GEAR_PLUGIN_SOCKET": str(settings.plugin_socket),
        "GEAR_BROKER_URL": settings.effective_broker_url,
        "GEAR_NODE": settings.node,
    }


def _run_alone(settings: Settings) -> bool:
    """Run all parts, but Redis if GEAR_BROKER_URL names another broker; as `run`.

    Raises:
        FailedPrecondition: A stack of this GEAR_ROOT or GEAR_RUN_DIR runs; nothing was touched.
    """
    commands = dict(parse_procfile((CHECKOUT / "Procfile").read_text()).processes)
    if settings.broker_url:
        del commands["redis"]
    with (
        sole_process(settings.gear_root / "up.lock", "a stack of this GEAR_ROOT"),
        sole_process(settings.run_dir / "up.lock", "a stack of this GEAR_RUN_DIR"),
    ):
        with sole_process(settings.gateway_lock, "a gateway of this GEAR_ROOT"):
            pass  # it may have been started otherwise
        os.chdir(CHECKOUT)
        os.environ.update(_environment(settings))
        return asyncio.run(run(commands))


def main() -> None:
    """Run until a signal ends it; a refusal is one line on stderr and exit status 1."""
    try:
        is_signalled = _run_alone(Settings.from_environ())
    except (GearError, OSError) as exc:
        sys.exit(f"make up: {exc}")
    if not is_signalled:
        sys.exit("make up: nobody reads its output any more, so all parts were ended")


if __name__ == "__main__":
    main()
