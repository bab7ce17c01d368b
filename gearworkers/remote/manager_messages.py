"""Headers and JSON messages of the manager's HTTP API, which client and server share."""

from __future__ import annotations

from typing import Annotated

import msgspec

NODE_HEADER = "Gear-Node"
VERSION_HEADER = "Gear-Version"
MAX_DIGESTS = 10_000
"""Digests of one query or pull."""

Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""A digest in lower-case hex."""


class Digests(msgspec.Struct, frozen=True):
    """The digests of a query or a pull."""

    digests: Annotated[list[Hex], msgspec.Meta(max_length=MAX_DIGESTS)]


class Present(msgspec.Struct, frozen=True):
    """The digests that a query has found."""

    present: list[Hex]


class Problem(msgspec.Struct, frozen=True):
    """The body of an error."""

    error: str
