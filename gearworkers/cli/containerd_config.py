"""`gear containerd-config`: containerd's configuration for gearworkers."""

from __future__ import annotations

import subprocess
import tomllib
from typing import Annotated, Any

import typer

from gearworkers.cli.output import EXIT_FAULTS, print_checks
from gearworkers.errors import FailedPrecondition, GearError, NotFound
from gearworkers.layers.index.probe import check_idmapped
from gearworkers.mounts.probe import run_check
from gearworkers.settings import NodeSettings
from gearworkers.util.check import Check
from gearworkers.util.log import command_settings

_DIFFER_TYPE = "io.containerd.differ.v1"
_TIMEOUT_S = 10.0
_NAME = "containerd"
NOT_CONFIGURED = "not configured"


def command(
    cri: Annotated[
        bool,
        typer.Option(
            "--cri", help="Print the configuration for Kubernetes' CRI. Default: for Docker, ctr and nerdctl."
        ),
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Check the running containerd instead.")] = False,
) -> None:
    """Print the configuration that the running containerd needs to use gearworkers.

    Add the text to containerd's config.toml, and restart containerd. Exit 1 if --check finds a fault.
    """
    from gearworkers.containerd import config  # these modules need gRPC, and no other command does
    from gearworkers.containerd.client import connected

    settings = command_settings()
    socket = settings.effective_containerd_socket
    if socket is None:
        raise FailedPrecondition("GEAR_CONTAINERD_SOCKET is off: the gateway does not serve containerd")
    if check:
        checks = containerd_checks(settings)
        print_checks(checks)
        if any(not one.ok for one in checks):
            raise typer.Exit(EXIT_FAULTS)
        return
    with connected(settings.containerd_address) as client:
        version = config.Version.parse(client.version())
    remap_ids = _idmapped_check(settings).ok
    print(config.snippet(version, socket, settings.gear_root, cri=cri, remap_ids=remap_ids), end="")


def containerd_checks(settings: NodeSettings) -> list[Check]:
    """Check the running containerd: version, both plugins, user namespaces, the order of differs, unpack_config."""
    from gearworkers.containerd import config
    from gearworkers.containerd.client import connected

    try:
        with connected(settings.containerd_address) as client:
            text = client.version()
            version = config.Version.parse(text)
            config.require_supported(version)
            checks = [Check(_NAME, True, False, text)]
            for type, id in ((config.SNAPSHOTTER_TYPE, config.SNAPSHOTTER), (_DIFFER_TYPE, config.DIFFER)):
                checks.append(_plugin_check(client, type, id))
            if checks[1].ok:
                capabilities = client.plugin(config.SNAPSHOTTER_TYPE, config.SNAPSHOTTER).capabilities
                checks.append(remap_check(_idmapped_check(settings), config.REMAP_IDS in capabilities))
    except GearError as exc:
        return [Check(_NAME, False, False, str(exc), "start containerd, or set CONTAINERD_ADDRESS")]
    return [*checks, *_config_checks(_config_dump(), version)]


def remap_check(idmapped: Check, is_claimed: bool) -> Check:
    """Check that containerd expects mounts that map ids only if this host can make them.

    Args:
        idmapped: Whether it can.
        is_claimed: Whether containerd's configuration has the capability.
    """
    name = f"{_NAME} user namespaces"
    if idmapped.ok and is_claimed:
        return Check(name, True, False, "mounts map the ids")
    if idmapped.ok:
        advice = "run `gear containerd-config` for the capability"
        return Check(name, False, False, "containerd changes the owners of all files itself, which is slow", advice)
    if is_claimed:
        advice = f"remove the capability from containerd's configuration, or {idmapped.advice}"
        return Check(name, False, False, f"containers in one cannot start: {idmapped.found}", advice)
    return Check(name, True, False, f"containerd changes the owners of all files itself: {idmapped.found}")


def _idmapped_check(settings: NodeSettings) -> Check:
    root = settings.gear_root
    while not root.exists():
        root = root.parent
    return run_check(check_idmapped, root)


def _plugin_check(client: Any, type: str, id: str) -> Check:
    name = f"{_NAME} plugin {id}"
    try:
        plugin = client.plugin(type, id)
    except NotFound:
        return Check(name, False, False, NOT_CONFIGURED, "run `gear containerd-config`")
    if plugin.init_err.message:
        return Check(name, False, False, plugin.init_err.message, "read containerd's log")
    return Check(name, True, False, "ok")


def _config_dump() -> dict[str, Any] | None:
    """Return containerd's configuration file with its defaults.

    It is empty if it cannot be read, and None without the program `containerd`, as in a container of docker-compose.
    """
    try:
        done = subprocess.run(["containerd", "config", "dump"], capture_output=True, timeout=_TIMEOUT_S, check=False)
        return tomllib.loads(done.stdout.decode(errors="replace"))
    except FileNotFoundError:
        return None
    except (OSError, subprocess.TimeoutExpired, tomllib.TOMLDecodeError):
        return {}


def _config_checks(dump: dict[str, Any] | None, version: tuple[int, int]) -> list[Check]:
    """Check the order of the differs, and that the transfer service uses ours for our snapshotter only."""
    from gearworkers.containerd import config

    name, advice = f"{_NAME} configuration", "compare it with the output of `gear containerd-config`"
    if dump is None:
        return [Check(name, True, False, "not checked: no containerd program here", advice)]
    if not dump:
        return [Check(name, False, False, "cannot be read", advice)]
    plugins = dump.get("plugins", {})
    order = plugins.get("io.containerd.service.v1.diff-service", {}).get("default", [])
    checks = [_order_check(order, version)]
    if version >= (2, 0):
        unpacks = plugins.get("io.containerd.transfer.v1.local", {}).get("unpack_config") or []
        pairs = {(entry.get("snapshotter"), entry.get("differ")) for entry in unpacks}
        is_listed = (config.SNAPSHOTTER, config.DIFFER) in pairs
        found = "lists gear with gear-diff" if is_listed else "does not list gear with gear-diff"
        advice = "" if is_listed else "run `gear containerd-config`"
        checks.append(Check(f"{_NAME} unpack_config", is_listed, False, found, advice))
    return checks


def _order_check(order: list[str], version: tuple[int, int]) -> Check:
    from gearworkers.containerd import config

    name, found = f"{_NAME} differs", ", ".join(order) or "default"
    if order[:1] != [config.DIFFER]:
        return Check(name, False, False, f"{found}: {config.DIFFER} is not first", "run `gear containerd-config`")
    affected = "other snapshotters" if version < (2, 0) else "Docker and nerdctl"
    return Check(name, True, False, found, f"while the gateway is down, {affected} cannot unpack images either")
