"""Calls to the gateway over its plugin socket, as dockerd makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gearworkers.util.unix_http import UnixHTTPConnection


def call_plugin(plugin_socket: Path, method: str, timeout_s: float) -> dict[str, Any]:
    """Call *method*, such as "GraphDriver.Status", without arguments; return its answer.

    Raises:
        OSError: No process listens on the socket, or the gateway does not answer in time.
        HTTPException: The answer is not HTTP, or ends early.
        ValueError: The answer is not JSON.

    Source: Docker plugin API, "Plugin activation" and "Graphdriver plugins".
    """
    connection = UnixHTTPConnection(plugin_socket, timeout_s)
    try:
        connection.request("POST", f"/{method}", body=b"{}")
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer
    finally:
        connection.close()
