"""`gear manager`: run the manager."""

from __future__ import annotations

from gearworkers.util.log import command_settings


def command() -> None:
    """Run the manager, which keeps objects for all nodes and serves them over HTTP on GEAR_MANAGER_LISTEN.

    Runs until SIGTERM.
    """
    from gearworkers.manager.server import serve  # only this command needs it

    serve(command_settings())
