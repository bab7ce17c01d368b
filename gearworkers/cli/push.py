"""`gear push`: push pending objects to the remote."""

from __future__ import annotations

import typer

from gearworkers.cli.node_engine import open_engine
from gearworkers.cli.output import EXIT_FAULTS, console
from gearworkers.util.log import command_settings


def command() -> None:
    """Push pending objects to GEAR_REMOTE now. Exit 1, with a line for each, if objects cannot be pushed."""
    report = open_engine(command_settings()).push_pending()
    for digest, reason in report.refused.items():
        console.print(f"not pushed: object {digest.hex()}: {reason}", markup=False)
    console.print(f"pushed {report.pushed_objects} objects, {len(report.refused)} could not be pushed")
    if report.refused:
        raise typer.Exit(EXIT_FAULTS)
