"""``--storage-opt``: dockerd's, said once, at its start, and kept for a gateway that is started while it runs; and a
container's, said when it is made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from gearworkers.errors import GearError, InvalidInput, from_os_error
from gearworkers.settings import Settings
from gearworkers.util.writing import replace_file

_OPTIONS = ("gear.root", "gear.broker")
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?(?:([kmgtp])i?)?b?", re.ASCII | re.IGNORECASE)
_MOST_BYTES = (1 << 63) - 1
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


def container_size(opts: Mapping[str, str] | None) -> int | None:
    """The bytes that ``docker run --storage-opt size=…`` names, 0 for no limit; None if it names none.

    Raises:
        InvalidInput: An option is unknown, or the size is no size.

    Source: as Docker's overlay2 takes it: docker/go-units, RAMInBytes.
    """
    size = None
    for key, value in (opts or {}).items():
        if key.lower() != "size":
            raise InvalidInput(f"--storage-opt {key}={value}: unknown option {key}; known is size=…")
        size = _bytes(value)
    return size


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    size = int(float(found[1]) * (1 << 10 * (1 + "kmgtp".index(found[2].lower()) if found[2] else 0))) if found else -1
    if not 0 <= size <= _MOST_BYTES:
        raise InvalidInput(f"--storage-opt size={text}: a number of bytes is needed, such as 512M or 10G")
    return size


def save(run_dir: Path, opts: Sequence[str]) -> None:
    """Keep the options of the dockerd that has started, until it is followed by another or a reboot; by one rename.

    Raises:
        GearError: They cannot be kept.
    """
    try:
        replace_file(run_dir / _FILE, msgspec.json.encode(list(opts)), sync=False)  # not for after a reboot
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
