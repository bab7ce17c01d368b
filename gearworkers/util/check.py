"""The result of a check of the kernel or of a part of the node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    needed: bool
    """Whether gearworkers cannot work without the feature. Other features only improve performance."""
    found: str
    """The finding, or the problem."""
    advice: str = ""
    """How to solve the problem; empty if *ok* is true."""
