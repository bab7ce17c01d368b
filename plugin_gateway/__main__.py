"""``python -m plugin_gateway``: start the gateway."""

from __future__ import annotations

import gearworkers.util.lean_structlog  # noqa: F401

# isort: split
import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import uvloop

from gearworkers.errors import GearError
from gearworkers.settings import LOG_LEVELS, Settings
from gearworkers.util.log import configure_logging, warn_of_unknown_variables
from plugin_gateway.dispatch.dispatcher import Dispatcher
from plugin_gateway.engines import Engines
from plugin_gateway.gateway import Gateway
from plugin_gateway.graphdriver.driver import GearDriver
from plugin_gateway.metrics import GatewayMetrics

_HELP = """Answer the calls of Docker (graphdriver plugin) and containerd (snapshotter, differ), each on a Unix socket.
Environment variables: GEAR_ROOT, GEAR_RUN_DIR, GEAR_PLUGIN_SOCKET, GEAR_CONTAINERD_SOCKET, CONTAINERD_ADDRESS,
GEAR_BROKER_URL, GEAR_REMOTE and its credentials, GEAR_NODE, GEAR_METRICS_LISTEN, GEAR_STREAM_IDLE_S,
GEAR_PROFILE_WINDOW_S, GEAR_XINO, GEAR_LOG_LEVEL, GEAR_LOG_FORMAT (console or json).
docs/reference.md lists all variables."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM; return the exit status, 1 with one line on stderr after an error."""
    options = _parser().parse_args(arguments)
    try:
        settings = Settings.from_environ()
        if options.log_level:
            settings = replace(settings, log=replace(settings.log, level=options.log_level))
        configure_logging(settings.log)
        warn_of_unknown_variables()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings))
    except GearError as exc:
        print(f"plugin_gateway: {exc}", file=sys.stderr)
        return 1
    return 0


async def _serve(settings: Settings) -> None:
    metrics = GatewayMetrics()
    engines, dispatcher = Engines(exclusive=True), Dispatcher(settings, metrics)
    containerd = None
    if (path := settings.effective_containerd_socket) is not None:
        from plugin_gateway.containerd.door import ContainerdDoor  # gRPC takes memory, also in the pool's processes

        containerd = ContainerdDoor(path, settings, engines, dispatcher, metrics)
    await Gateway(settings, GearDriver(settings, engines), metrics, dispatcher, containerd).serve()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "plugin_gateway", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, help="Log level, instead of GEAR_LOG_LEVEL.")
    parser.add_argument("--version", action="version", version=f"gearworkers {_version()}")
    return parser


def _version() -> str:
    try:
        return version("gearworkers")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
