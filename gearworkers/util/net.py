"""Hosts as they stand in references, URLs and settings."""

from __future__ import annotations

import ipaddress


def host_name(host: str) -> str:
    """*host* without its port and without the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(name: str) -> bool:
    """Whether *name*, without a port, is ``localhost`` or a loopback address: only this machine can reach it."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
