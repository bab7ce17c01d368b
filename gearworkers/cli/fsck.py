"""`gear fsck`: check the store, and repair it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from gearworkers.cli.node_engine import open_engine
from gearworkers.cli.output import EXIT_FAULTS, console, counted
from gearworkers.errors import Unavailable
from gearworkers.lazyfs.client import request_prefetch
from gearworkers.settings import Settings
from gearworkers.util.log import command_settings


def command(
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Also read every byte and compare its SHA-256.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged objects and fetch removed and missing ones again.")
    ] = False,
) -> None:
    """Check every object and every layer. Exit 1, with a line for each, if there are faults."""
    settings = command_settings()
    incomplete: set[str] = set()
    faults = 0
    for fault in open_engine(settings).faults(read_data=read_data, repair=repair, on_incomplete=incomplete.add):
        faults += 1
        console.print(fault, markup=False)
    if incomplete:
        console.print(_prefetch(settings, sorted(incomplete)), markup=False)
        console.print(
            "Containers that have opened a damaged object keep using it: stop and start them "
            "(`docker restart` is not enough)."
        )
    console.print(counted(faults, "fault"))
    if faults:
        raise typer.Exit(EXIT_FAULTS)


def _prefetch(settings: Settings, layers: Sequence[str]) -> str:
    """Request the missing objects of the layers; return a line for the user."""
    try:
        objects = request_prefetch(settings.lazyfs_socket, layers)
    except Unavailable as exc:
        return f"{exc}: it fetches each missing object when a program opens the file."
    return f"Fetching {counted(objects, 'object')}; `gear status` lists those that cannot be fetched."
