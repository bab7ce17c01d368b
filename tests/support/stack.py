"""The processes of the Procfile, each worker by itself; a test can stop and kill each of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gearworkers.lazyfs.client import LazyStatus, read_status
from tests.support import sandbox
from tests.support.processes import PATIENCE_S, Daemon, listens, wait_until

CHECKOUT = Path(__file__).resolve().parent.parent.parent
PLUGINS = Path("/run/docker/plugins")
WORKERS = ("import", "push", "convert")
START_ORDER = ("redis", "gateway", "lazyfs", "import", "push")
"""The daemons that run by default; tests that need others start them."""


@dataclass
class Stack:
    """Redis, gateway, lazy file server and workers with their own root, run directory and plugin socket.

    Args:
        directory: Contains GEAR_ROOT (`gear`) and the logs.
        name: The plugin's name, for dockerd's `--storage-driver`.
        settings: Further GEAR_… variables.
    """

    directory: Path
    name: str = "gear"
    settings: dict[str, str] = field(default_factory=dict)
    daemons: dict[str, Daemon] = field(init=False)
    make_up: Daemon = field(init=False)

    def __post_init__(self) -> None:
        for path in (self.directory, self.root / "redis", self.run_dir, PLUGINS):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.daemons = {name: self._daemon(name, command) for name, command in _commands().items()}
        command = [sys.executable, str(CHECKOUT / "packaging" / "up.py")]
        self.make_up = Daemon(command, self.directory / "up.log", self.environ(), CHECKOUT)

    @property
    def root(self) -> Path:
        """GEAR_ROOT."""
        return self.directory / "gear"

    @property
    def run_dir(self) -> Path:
        """GEAR_RUN_DIR; on the sandbox's tmpfs, with a short path."""
        return Path("/run/docker/private") / self.name

    @property
    def plugin_socket(self) -> Path:
        """GEAR_PLUGIN_SOCKET."""
        return PLUGINS / f"{self.name}.sock"

    @property
    def containerd_socket(self) -> Path:
        """Where the gateway answers containerd."""
        return self.run_dir / "containerd.sock"

    @property
    def node(self) -> str:
        """GEAR_NODE."""
        return f"{self.name}-node"

    @property
    def redis_socket(self) -> Path:
        """The Unix socket of Redis."""
        return self.run_dir / "redis.sock"

    @property
    def lazyfs_socket(self) -> Path:
        """The Unix socket of the lazy file server."""
        return self.run_dir / "lazyfs.sock"

    def lazy_status(self) -> LazyStatus:
        """Return the status of the lazy file server."""
        status = read_status(self.lazyfs_socket)
        assert status is not None, self.daemons["lazyfs"].log_tail()
        return status

    def gear(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a `gear` command on this stack; return the completed process, even if it failed."""
        command = [str(Path(sys.executable).with_name("gear")), *arguments]
        return subprocess.run(command, env=self.environ(), capture_output=True, text=True, timeout=240)

    def set(self, **settings: str) -> None:
        """Set variables for daemons and commands that start from now on."""
        self.settings |= settings
        for daemon in (*self.daemons.values(), self.make_up):
            daemon.environ = self.environ()

    def environ(self) -> dict[str, str]:
        """Return the environment of the stack's processes and `gear` commands."""
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(sandbox.scratch()),
            "GEAR_ROOT": str(self.root),
            "GEAR_RUN_DIR": str(self.run_dir),
            "GEAR_PLUGIN_SOCKET": str(self.plugin_socket),
            "GEAR_BROKER_URL": "",
            "GEAR_NODE": self.node,
            **self.settings,
        }

    def _daemon(self, name: str, command: str) -> Daemon:
        return Daemon(["/bin/sh", "-c", command], self.directory / f"{name}.log", self.environ(), CHECKOUT)

    def start(self, *names: str) -> None:
        """Start these daemons (default: START_ORDER); return when all are ready."""
        for name in names or START_ORDER:
            if not self.daemons[name].is_running():
                self.daemons[name].start()
        for name in names or START_ORDER:
            self._wait_until_ready(name)

    def up(self) -> None:
        """Start all daemons by `make up`; return when they are ready. `make_up.stop()` stops them."""
        self.make_up.start()
        self.make_up.wait_until(self._is_up, "the stack")

    def _is_up(self) -> bool:
        sockets = self.redis_socket.exists() and self.plugin_socket.exists() and listens(self.plugin_socket)
        return sockets and self.make_up.log_count(b" ready.") >= len(WORKERS)

    def stop(self, *names: str) -> None:
        """Stop these daemons with SIGTERM (default: all, in reverse order)."""
        others = [name for name in self.daemons if name not in START_ORDER]
        for name in names or [*others, *reversed(START_ORDER)]:
            self.daemons[name].stop()

    def kill(self, name: str) -> None:
        """Kill a daemon's whole session, such as a Celery worker with its children."""
        daemon = self.daemons[name]
        if daemon.is_running():
            os.killpg(daemon.pid, signal.SIGKILL)
        daemon.kill()

    @contextmanager
    def away(self, how: str) -> Iterator[None]:
        """Keep the gateway away in the context.

        Args:
            how: ``stopped``: its sockets are absent; ``killed``: nobody listens on them; ``hanging``: it does not
                answer.
        """
        gateway = self.daemons["gateway"]
        if how == "hanging":
            os.kill(gateway.pid, signal.SIGSTOP)
        else:
            {"stopped": gateway.stop, "killed": gateway.kill}[how]()
        try:
            yield
        finally:
            if how == "hanging":
                os.kill(gateway.pid, signal.SIGCONT)
            self.start("gateway")

    def is_running(self, name: str) -> bool:
        """Return whether the daemon runs."""
        return self.daemons[name].is_running()

    def _wait_until_ready(self, name: str) -> None:
        daemon = self.daemons[name]
        if name == "redis":
            daemon.wait_until(lambda: listens(self.redis_socket), "Redis's socket")
        elif name == "gateway":
            daemon.wait_until(lambda: listens(self.plugin_socket), "the plugin's socket")
        elif name == "lazyfs":
            daemon.wait_until(lambda: listens(self.lazyfs_socket), "the lazy file server's socket")
        else:
            daemon.wait_until(lambda: daemon.log_count(b" ready.") > 0, f"the {name} worker")

    def logs(self) -> str:
        """Return the end of every daemon's log."""
        return "\n".join(f"--- {name}\n{daemon.log_tail()}" for name, daemon in self.daemons.items())

    def check_log(self, name: str) -> str:
        """Check that the log of a process shows no bug; return the log."""
        log = self.daemons[name].log.read_text(errors="replace")
        for bad in ("exited prematurely", "a bug", "Traceback"):
            assert bad not in log, f"{name}: {self.daemons[name].log_tail()}"
        return log

    def wait_until_idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Return when staging is empty: no import is in progress, and none was left unfinished."""
        wait_until(lambda: not self.staged(), "staging is empty", timeout_s, lambda: str(self.staged()))

    def recorders(self) -> list[int]:
        """Return the pids of the processes that record the start of a container."""
        root = f"GEAR_ROOT={self.root}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_recorder = b"gearworkers.profiles.recorder" in (process / "cmdline").read_bytes().split(b"\0")
                if is_recorder and root in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:
                continue  # the process has ended
        return found

    def staged(self) -> list[str]:
        """Return up to 50 paths below staging."""
        build = self.root / "build"
        return sorted(str(path.relative_to(build)) for path in build.rglob("*"))[:50] if build.exists() else []


def _commands() -> dict[str, str]:
    """Return the commands of the Procfile by name, and a command for each worker."""
    lines = (CHECKOUT / "Procfile").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.strip() and not line.startswith("#"))
    found = {name.strip(): command.strip() for name, command in pairs}
    workers = found.pop("workers").removesuffix(" ".join(WORKERS))
    return found | {name: workers + name for name in WORKERS}
