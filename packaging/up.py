"""Run the Procfile in the foreground until SIGTERM or SIGINT: honcho, with every setting said in the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from honcho import command, manager

from gearworkers.errors import GearError
from gearworkers.settings import Settings

CHECKOUT = Path(__file__).resolve().parent.parent
GRACE_S = 60
"""What is under way is finished in; honcho's own 5 s would kill a worker that ends."""


def environment(settings: Settings) -> dict[str, str]:
    """The environment in which the Procfile's processes agree with *settings*."""
    venv_bin = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([venv_bin, os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "GEAR_ROOT": str(settings.gear_root),
        "GEAR_RUN_DIR": str(settings.run_dir),
        "GEAR_PLUGIN_SOCKET": str(settings.plugin_socket),
        "GEAR_BROKER_URL": settings.effective_broker_url,
        "GEAR_NODE": settings.node,
    }


def main() -> None:
    """Make the directories that Redis needs and run honcho; a broker given by GEAR_BROKER_URL is not started.

    What cannot be is one line on stderr, and exit status 1.
    """
    try:
        settings = Settings.from_environ()
        for path in (settings.gear_root, settings.gear_root / "redis", settings.run_dir):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (GearError, OSError) as exc:
        sys.exit(f"make up: {exc}")
    processes = ["gateway", "lazyfs", "import", "push", "convert"]
    if not settings.broker_url:
        processes.insert(0, "redis")
    os.chdir(CHECKOUT)
    os.environ.update(environment(settings))
    manager.KILL_WAIT = GRACE_S
    command.main(["start", *processes])


if __name__ == "__main__":
    main()
