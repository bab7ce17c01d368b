"""`gear fsck`: check the store, and repair it."""

from __future__ import annotations

from typing import Annotated

import typer

from gearworkers.cli.node_engine import open_engine
from gearworkers.cli.output import EXIT_FAULTS, console
from gearworkers.lazyfs.client import order_prefetch
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
        ordered = order_prefetch(settings.lazyfs_socket, sorted(incomplete))
        console.print(f"{ordered} objects are being fetched; `gear status` lists those that cannot be fetched.")
        console.print(
            "Containers that have opened a damaged object keep using it: stop and start them "
            "(`docker restart` is not enough)."
        )
    console.print(f"{faults} faults")
    if faults:
        raise typer.Exit(EXIT_FAULTS)
