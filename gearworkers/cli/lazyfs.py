"""`gear lazyfs`: run the lazy file server."""

from __future__ import annotations

from gearworkers.util.log import command_settings


def command() -> None:
    """Run the lazy file server, which fetches files of Gear images when containers open them. Runs until SIGTERM."""
    from gearworkers.lazyfs.server import open_sources, serve  # only this command needs it

    settings = command_settings()
    serve(settings, open_sources(settings))
