"""The GEAR_ROOT of this node's gateway: dockerd's options may name another one than the environment."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gearworkers.errors import from_os_error
from gearworkers.settings import Settings
from gearworkers.util.writing import replace_file

_FILE = "gear-root"


def save_root(run_dir: Path, root: Path) -> None:
    """Record *root* for the workers of this node, until a reboot empties *run_dir*; atomic.

    Raises:
        GearError: The file system refuses.
    """
    try:
        replace_file(run_dir / _FILE, os.fsencode(root), sync=False)  # the directory does not outlive a reboot
    except OSError as exc:
        raise from_os_error(exc, f"record GEAR_ROOT in {run_dir}") from exc


def with_current_root(settings: Settings) -> Settings:
    """Return *settings* with the GEAR_ROOT of this node's gateway; unchanged if no gateway has run here.

    Raises:
        GearError: The file system refuses.
    """
    try:
        return replace(settings, gear_root=Path(os.fsdecode((settings.run_dir / _FILE).read_bytes())))
    except FileNotFoundError:
        return settings
    except OSError as exc:
        raise from_os_error(exc, f"read the gateway's GEAR_ROOT in {settings.run_dir}") from exc
