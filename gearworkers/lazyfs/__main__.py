"""``python -m gearworkers.lazyfs``: as `gear lazyfs`, without the memory of the modules of other commands."""

from __future__ import annotations

import gearworkers.util.lean_structlog  # noqa: F401

# isort: split
import sys

from gearworkers.errors import GearError
from gearworkers.lazyfs.server import open_sources, serve
from gearworkers.util.log import command_settings


def main() -> int:
    """Run the lazy file server until SIGTERM; return the exit status, 1 with one line on stderr after an error."""
    try:
        settings = command_settings()
        serve(settings, open_sources(settings))
    except (GearError, OSError) as exc:
        print(f"gearworkers.lazyfs: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
