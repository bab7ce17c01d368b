"""`gear status`: the contents of the store and the state of the node's processes."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

from gearworkers.cas.store import ObjectStore
from gearworkers.cli.node_engine import open_engine
from gearworkers.cli.output import console
from gearworkers.cli.plugin_call import call_plugin
from gearworkers.layers.pins import Pins
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import read_status
from gearworkers.settings import NodeSettings
from gearworkers.util.log import command_settings

STATUS_TIMEOUT_S = 60.0
"""Longest wait for the gateway's status: counting a million stored objects takes seconds."""


def command() -> None:
    """Show the contents of the store, pending work, the state of the gateway, fetch counters and pins."""
    settings = command_settings()
    stored = gateway_status(settings) or [*open_engine(settings).status(), ("Gateway", "not running")]
    for key, value in (*stored, *_lazyfs_status(settings), *_pinned(settings)):
        console.print(f"{key + ':':<20} {value}", markup=False)


def gateway_status(settings: NodeSettings, timeout_s: float = STATUS_TIMEOUT_S) -> list[tuple[str, str]] | None:
    """Return the running gateway's answer to GraphDriver.Status; None if no gateway answers."""
    try:
        answer = call_plugin(settings.effective_plugin_socket, "GraphDriver.Status", timeout_s)
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return [(key, value) for key, value in answer.get("Status") or []]


def _lazyfs_status(settings: NodeSettings) -> Iterator[tuple[str, str]]:
    found = read_status(settings.lazyfs_socket)
    if found is None:
        yield "Lazy Files", "not served: `gear lazyfs` does not run"
        return
    yield "Lazy Files", f"{found.incomplete_layers} incomplete layers, {found.arriving} objects arriving"
    yield (
        "Fetched",
        f"{found.fetched_objects} objects, {found.received_bytes} bytes received, {found.reused_bytes} found in "
        f"other objects, {found.corrupt} corrupt",
    )
    yield (
        "Profiles",
        f"{found.profiles_found} found, {found.profiles_absent} absent; {found.prefetched} objects and chunks, "
        f"{found.prefetched_bytes} bytes prefetched; {found.on_demand} requests on demand",
    )
    for digest, reason in found.failures.items():
        yield f"Failed {digest}", reason


def _pinned(settings: NodeSettings) -> Iterator[tuple[str, str]]:
    store = ObjectStore(settings.gear_public_cache_path)
    for pin in Pins(settings, LayerStore(settings, store), store).all():
        yield "Pinned", f"{pin.name} ({pin.image})"
