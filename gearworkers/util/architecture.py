"""Names of architectures."""

from __future__ import annotations

import os

_GO_NAMES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "loongarch64": "loong64"}


def go_architecture() -> str:
    """Return this host's architecture as Go names it, and so images and containerd do."""
    machine = os.uname().machine
    return _GO_NAMES.get(machine, machine)
