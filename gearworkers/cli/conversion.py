"""Carry out a conversion, with a progress bar per layer on a terminal and a line per layer elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NamedTuple, Protocol

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from gearworkers.cli.image_names import plain_name
from gearworkers.cli.local_source import opened_source
from gearworkers.cli.record_start import record_start
from gearworkers.errors import InvalidInput
from gearworkers.images.convert_local import convert_locally
from gearworkers.images.gear_manifest import ConversionReport
from gearworkers.images.manifest import Platform
from gearworkers.images.plan import ConversionPlan, plan_conversion
from gearworkers.images.source import is_local
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings

PlatformOption = Annotated[
    str,
    typer.Option(
        help="Platform to convert from a multi-platform image: OS/ARCHITECTURE[/VARIANT]. Default: this host's."
    ),
]
AllPlatformsOption = Annotated[bool, typer.Option("--all-platforms", help="Convert all platforms.")]
LocalOption = Annotated[
    bool,
    typer.Option(
        "--local",
        help="Convert in processes of this host instead of workers. "
        "Paths and images of this host's daemons are always converted so.",
    ),
]
AgainOption = Annotated[bool, typer.Option("--again", help="Also convert layers that are already converted.")]
ProcessesOption = Annotated[int, typer.Option(min=1, help="Layers to convert at the same time on this host.")]
RecordOption = Annotated[
    float,
    typer.Option(
        "--record",
        metavar="SECONDS",
        min=0,
        help="Then run the image with `docker` for up to this time, so that its first start is recorded and the files "
        "that it opens are prefetched on all nodes. 0: do not run it.",
    ),
]
PROCESSES = os.cpu_count() or 1
"""The default of ProcessesOption."""
_SHOWN_DIGITS = 12


class ConversionOptions(NamedTuple):
    """The options that `gear convert` and `gear index` have in common."""

    platform: str
    all_platforms: bool
    local: bool
    again: bool
    processes: int


def carry_out(settings: Settings, source: str, target: str, options: ConversionOptions) -> ConversionReport:
    """Convert *source* to *target*, or index it if *target* is empty; show the progress.

    Raises:
        InvalidInput: The options exclude each other, or a name is malformed.
        GearError: As `plan_conversion`, `convert_locally` and `convert_on_workers`.
    """
    if options.all_platforms and options.platform:
        raise InvalidInput("--platform and --all-platforms exclude each other; give one of them")
    wanted = Platform.parse(options.platform) if options.platform else None
    open_remote(settings).close()  # fails before any other step if no remote is set
    with opened_source(settings, source) as opened:
        plan = plan_conversion(
            settings.registry,
            opened,
            target,
            wanted,
            all_platforms=options.all_platforms,
            again=options.again,
            name=plain_name(source),
        )
        with _progress_display(plan) as display:
            if options.local or is_local(opened):
                return convert_locally(settings, plan, options.processes, display.layer_read)
            from gearworkers.workers.conversion import convert_on_workers  # imports Celery, which --local does not need

            return convert_on_workers(settings, plan, display.layer_read, display.note)


def print_objects(report: ConversionReport) -> None:
    """Print how many objects the remote has received, and how many it had."""
    shared, shared_bytes = report.objects - report.new_objects, report.object_bytes - report.new_bytes
    print(f"New objects     {report.new_objects}, {decimal(report.new_bytes)}")
    print(f"Already stored  {shared}, {decimal(shared_bytes)}")


def record_and_print(settings: Settings, name: str, seconds: float) -> None:
    """Record a start of up to *seconds* if that is not 0, and print the number of objects; errors as `record_start`."""
    if seconds:
        print(f"Recorded start  {record_start(settings, name, seconds)} objects")


def short_digest(digest: str) -> str:
    """Return the first digits of a digest."""
    return digest.removeprefix("sha256:")[:_SHOWN_DIGITS]


class _Display(Protocol):
    def layer_read(self, digest: str, read_bytes: int) -> None:
        """Show that *read_bytes* of the layer have been read so far."""

    def note(self, line: str) -> None:
        """Show a line about a delay or a retry."""


@contextmanager
def _progress_display(plan: ConversionPlan) -> Iterator[_Display]:
    """Yield the display of progress on stderr: bars on a terminal, else lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(plan)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        yield _Bars(plan, progress)


class _Bars:
    """Shows a bar for each layer and one for their sum."""

    def __init__(self, plan: ConversionPlan, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {
            job.digest: progress.add_task(short_digest(job.digest), total=job.size_bytes) for job in plan.jobs()
        }
        self._read: dict[str, int] = {}
        self._total = progress.add_task("total", total=sum(job.size_bytes for job in plan.jobs()))

    def layer_read(self, digest: str, read_bytes: int) -> None:
        self._read[digest] = read_bytes
        self._progress.update(self._bars[digest], completed=read_bytes)
        self._progress.update(self._total, completed=sum(self._read.values()))

    def note(self, line: str) -> None:
        self._progress.console.print(line, markup=False)


class _Lines:
    """Prints a line when a layer has been read to its end."""

    def __init__(self, plan: ConversionPlan) -> None:
        self._sizes = {job.digest: job.size_bytes for job in plan.jobs()}
        self._read = dict.fromkeys(self._sizes, 0)

    def layer_read(self, digest: str, read_bytes: int) -> None:
        was_complete = self._read[digest] == self._sizes[digest]
        self._read[digest] = read_bytes
        if read_bytes == self._sizes[digest] and not was_complete:
            read, total = decimal(sum(self._read.values())), decimal(sum(self._sizes.values()))
            self.note(f"layer {short_digest(digest)} read, {decimal(self._sizes[digest])}; {read} of {total}")

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
