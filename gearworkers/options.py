"""dockerd's ``--storage-opt``: said once, at its start, and kept for a gateway that is started while it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from gearworkers.errors import GearError, InvalidInput, from_os_error
from gearworkers.settings import Settings

_OPTIONS = ("gear.root", "gear.broker")
_FILE = "dockerd-options.json"


def with_options(settings: Settings, opts: Sequence[str]) -> Settings:
    """*settings* with dockerd's ``--storage-opt`` applied.

    Raises:
        InvalidInput: An option is unknown or has no value.
    """
    for option in opts:
        key, _, value = option.partition("=")
        if key not in _OPTIONS or not value:
            raise InvalidInput(f"storage option {option!r}: known are {', '.join(f'{name}=…' for name in _OPTIONS)}")
        if key == "gear.broker":
            settings = replace(settings, broker_url=value)
        elif not os.path.isabs(value):
            raise InvalidInput(f"storage option {option!r}: an absolute path is needed")
        else:
            settings = replace(settings, gear_root=Path(value))
    return settings


def save(run_dir: Path, opts: Sequence[str]) -> None:
    """Keep the options of the dockerd that has started, until it is followed by another or a reboot; by one rename.

    Raises:
        GearError: They cannot be kept.
    """
    try:
        temporary = run_dir / f"{_FILE}.new"
        temporary.write_bytes(msgspec.json.encode(list(opts)))
        temporary.rename(run_dir / _FILE)
    except OSError as exc:
        raise from_os_error(exc, f"keep dockerd's options in {run_dir}") from exc


def saved(run_dir: Path) -> list[str]:
    """What was saved last; none if nothing was.

    Raises:
        GearError: The file is damaged.
    """
    try:
        return msgspec.json.decode((run_dir / _FILE).read_bytes(), type=list[str])
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as exc:
        raise GearError(f"{run_dir / _FILE} is damaged ({exc}); remove it and restart dockerd") from exc
