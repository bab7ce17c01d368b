"""`gear gc`: remove unreferenced objects."""

from __future__ import annotations

from gearworkers.cli.node_engine import open_engine
from gearworkers.cli.output import console
from gearworkers.util.log import command_settings


def command() -> None:
    """Remove unreferenced objects now. The gateway does so within a minute after an image is removed."""
    report = open_engine(command_settings()).collect_garbage()
    console.print(
        f"removed {report.removed_objects} objects, {report.removed_bytes} bytes; "
        f"kept {report.kept_objects} objects, {report.kept_bytes} bytes"
    )
