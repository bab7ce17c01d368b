"""`gear`: the commands that an administrator runs on a node."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from gearworkers.cli import (
    collect_garbage,
    containerd_config,
    convert,
    doctor,
    fsck,
    index_image,
    inspect_image,
    lazyfs,
    manager,
    pin_image,
    profile_commands,
    push,
    status,
)
from gearworkers.cli.output import EXIT_ERROR
from gearworkers.errors import GearError
from gearworkers.settings import load_environment_file, unknown_variables

app = typer.Typer(
    help="Inspect and maintain the gearworkers store of this node and its images. "
    "Settings come from the environment, such as GEAR_ROOT, GEAR_RUN_DIR and GEAR_REMOTE, and then from "
    "/etc/gearworkers/environment; the reference lists all. "
    "Exit codes: 0 done; 1 faults found (doctor, fsck, push, containerd-config --check); 2 failed, with one line on "
    "stderr.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("doctor", short_help="Check everything that a node needs.")(doctor.command)
app.command("status", short_help="Show stored data, pending work and pins.")(status.command)
app.command("containerd-config", short_help="Print the configuration for containerd.")(containerd_config.command)
app.command("gc", short_help="Remove unreferenced objects now.")(collect_garbage.command)
app.command("fsck", short_help="Check every object and every layer.")(fsck.command)
app.command("push", short_help="Push pending objects to GEAR_REMOTE now.")(push.command)
app.command("convert", short_help="Convert an image to a Gear image.")(convert.command)
app.command("index", short_help="Let nodes start an image before it has arrived.")(index_image.command)
app.command("inspect", short_help="Show how many files of an image are here.")(inspect_image.command)
app.command("pin", short_help="Keep all files of a pulled image.")(pin_image.pin)
app.command("unpin", short_help="Stop keeping an image's files.")(pin_image.unpin)
app.add_typer(profile_commands.app, name="profile", short_help="Show and extend start-up profiles.")
app.command("lazyfs", short_help="Run the lazy file server.")(lazyfs.command)
app.command("manager", short_help="Run the manager.")(manager.command)


def main() -> None:
    """Run `gear`; report an error as one line on stderr and exit with EXIT_ERROR."""
    with _errors_reported():
        if notice := load_environment_file():
            _report(notice)
        for problem in unknown_variables():
            _report(problem)
        app()


@contextmanager
def _errors_reported() -> Iterator[None]:
    try:
        yield
    except GearError as exc:
        sys.exit(_report(str(exc)))
    except OSError as exc:
        is_denied = isinstance(exc, PermissionError) and os.geteuid()
        sys.exit(_report(f"{exc}; run `gear` as root" if is_denied else str(exc)))


def _report(text: str) -> int:
    print(f"gear: {text}", file=sys.stderr)
    return EXIT_ERROR
