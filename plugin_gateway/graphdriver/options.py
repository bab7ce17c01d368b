"""``--storage-opt`` of dockerd and of containers.

dockerd sends its options once, when it starts. They are saved for a gateway that restarts while dockerd runs. The
options of a container come with the call that creates it.
"""

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
_MAX_BYTES = (1 << 63) - 1
_FILE = "dockerd-options.json"


def with_options(settings: Settings, opts: Sequence[str]) -> Settings:
    """Return *settings* with dockerd's ``--storage-opt`` applied.

    Raises:
        InvalidInput: An option is unknown or has no value.
    """
    for option in opts:
        key, _, value = option.partition("=")
        if key not in _OPTIONS or not value:
            known = ", ".join(f"{name}=…" for name in _OPTIONS)
            raise InvalidInput(f"storage option {option!r}: expected {known}")
        if key == "gear.broker":
            settings = replace(settings, broker_url=value)
        elif not os.path.isabs(value):
            raise InvalidInput(f"storage option {option!r}: expected an absolute path")
        else:
            settings = replace(settings, gear_root=Path(value))
    return settings


def container_size(opts: Mapping[str, str] | None) -> int | None:
    """Return the size limit of ``docker run --storage-opt size=…`` in bytes; 0 for no limit, None without the option.

    Raises:
        InvalidInput: An option is unknown, or the size is malformed.

    Source: docker/go-units, RAMInBytes, which Docker's overlay2 uses.
    """
    size = None
    for key, value in (opts or {}).items():
        if key.lower() != "size":
            raise InvalidInput(f"--storage-opt {key}={value}: unknown option {key}; expected size=…")
        size = _bytes(value)
    return size


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    size = int(float(found[1]) * (1 << 10 * (1 + "kmgtp".index(found[2].lower()) if found[2] else 0))) if found else -1
    if not 0 <= size <= _MAX_BYTES:
        raise InvalidInput(f"--storage-opt size={text}: expected a number of bytes, such as 512M or 10G")
    return size


def save(run_dir: Path, opts: Sequence[str]) -> None:
    """Save the options of a new dockerd, until the next dockerd starts or a reboot; atomic.

    Raises:
        GearError: The file system refuses.
    """
    try:
        replace_file(run_dir / _FILE, msgspec.json.encode(list(opts)), sync=False)  # not needed after a reboot
    except OSError as exc:
        raise from_os_error(exc, f"save dockerd's options in {run_dir}") from exc


def load(run_dir: Path) -> list[str]:
    """Return the options that were saved last; an empty list if there are none.

    Raises:
        GearError: The file is damaged.
    """
    try:
        return msgspec.json.decode((run_dir / _FILE).read_bytes(), type=list[str])
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as exc:
        raise GearError(f"{run_dir / _FILE} is damaged ({exc}); remove it and restart dockerd") from exc
