"""The name of a remote in messages."""

from __future__ import annotations


def remote_name(url: str) -> str:
    """Return a GEAR_REMOTE as messages show it: without user and password."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url.rstrip("/") or url
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")
