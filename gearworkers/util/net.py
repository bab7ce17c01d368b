"""Hosts and ports in references, URLs and settings."""

from __future__ import annotations

import ipaddress

_MAX_PORT = 65535


def host_name(host: str) -> str:
    """Return *host* without its port and without the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(name: str) -> bool:
    """Return whether only this machine can reach *name*: ``localhost`` or a loopback address, without a port."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def parse_host_port(text: str) -> tuple[str, int]:
    """Return the host and the port of ``HOST:PORT``, ``:PORT`` or ``PORT``.

    The host has no brackets around an IPv6 address; it is empty if *text* names none.

    Raises:
        ValueError: The part behind the last colon is not a port.
    """
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > _MAX_PORT:
        raise ValueError(f"{text}: HOST:PORT is needed")
    return host.strip("[]"), int(port)
