"""What dockerd and containerd have in common for `gear`: images and containers whose layers are in GEAR_ROOT."""

from __future__ import annotations

from typing import Protocol

import msgspec


class LocalImage(msgspec.Struct, frozen=True):
    """An image in this node's GEAR_ROOT."""

    id: str
    """``sha256:…``, as the daemon names the image."""
    is_gear: bool
    top_layer: str
    """The engine's id of the topmost layer; empty for an image without layers."""


class Daemon(Protocol):
    """One daemon that has images and containers; its str names it in messages.

    The methods raise:
        Unavailable: The daemon does not answer.
        FailedPrecondition: It has the image or container, but not in this GEAR_ROOT.
        InvalidInput: It rejects the name.
    """

    def image(self, name: str) -> LocalImage | None:
        """Return the image that the daemon knows by *name* or by an id; None if it has none."""

    def container_layer(self, name: str) -> str | None:
        """Return the engine's id of the layer of the container *name*, a name or an id; None if there is none."""
