"""`gear convert`: convert an image, with a progress bar per layer on a terminal and a line per layer elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from gearworkers.cli.image_names import NamespaceOption, in_namespace, plain_name
from gearworkers.cli.local_source import opened_source
from gearworkers.errors import InvalidInput
from gearworkers.images.convert_local import convert_locally
from gearworkers.images.gear_manifest import ConversionReport
from gearworkers.images.manifest import Platform
from gearworkers.images.plan import ConversionPlan, plan_conversion
from gearworkers.images.source import is_local
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from gearworkers.util.log import command_settings

_SHOWN_DIGITS = 12


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Image to convert: [HOST/]NAME[:TAG][@DIGEST] in a registry, docker:NAME, containerd:NAME, "
            "oci:PATH[:TAG] or docker-archive:PATH[:TAG].",
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="Name of the Gear image: [HOST/]NAME[:TAG]. It must differ from SOURCE."),
    ],
    platform: Annotated[
        str,
        typer.Option(
            help="Platform to convert from a multi-platform image: OS/ARCHITECTURE[/VARIANT]. Default: this host's."
        ),
    ] = "",
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="Convert all platforms.")] = False,
    local: Annotated[
        bool,
        typer.Option(
            "--local",
            help="Convert in processes of this host instead of workers. "
            "Paths and images of this host's daemons are always converted so.",
        ),
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Also convert layers that are already converted.")] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Layers to convert at the same time on this host.")
    ] = os.cpu_count() or 1,
    namespace: NamespaceOption = "",
) -> None:
    """Convert an image to a Gear image: file contents go to GEAR_REMOTE, the rest to TARGET's registry.

    Workers of the queue `convert` do the work unless --local is given. A layer that was converted before is not
    converted again.
    """
    if all_platforms and platform:
        raise InvalidInput("--platform and --all-platforms exclude each other; give one of them")
    settings, source = in_namespace(command_settings(), source, namespace)
    wanted = Platform.parse(platform) if platform else None
    open_remote(settings).close()  # fails before any other step if no remote is set
    with opened_source(settings, source) as opened:
        name = plain_name(source)
        plan = plan_conversion(
            settings.registry, opened, target, wanted, all_platforms=all_platforms, again=again, name=name
        )
        report = _convert(settings, plan, processes if local or is_local(opened) else 0)
    _print(report)


def _convert(settings: Settings, plan: ConversionPlan, processes: int) -> ConversionReport:
    """Carry out the plan in *processes* of this host; on workers if that is 0."""
    with _progress_display(plan) as display:
        if processes:
            return convert_locally(settings, plan, processes, display.layer_read)
        from gearworkers.workers.conversion import convert_on_workers  # imports Celery, which --local does not need

        return convert_on_workers(settings, plan, display.layer_read, display.note)


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
            job.digest: progress.add_task(_short(job.digest), total=job.size_bytes) for job in plan.jobs()
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
            self.note(f"layer {_short(digest)} read, {decimal(self._sizes[digest])}; {read} of {total}")

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _print(report: ConversionReport) -> None:
    before, after = decimal(report.bytes_before), decimal(report.bytes_after)
    shared = report.objects - report.new_objects
    shared_bytes = report.object_bytes - report.new_bytes
    kind = "Gear image" if report.private_layers < report.layers else "Image     "
    print(f"{kind}      {report.target}")
    print(f"Digest          {report.digest}")
    print(f"Layers          {report.layers} ({report.reused_layers} already converted)")
    if report.private_layers:
        print(f"Private layers  {report.private_layers} (not converted)")
    print(f"Size of layers  {before} before, {after} after")
    print(f"New objects     {report.new_objects}, {decimal(report.new_bytes)}")
    print(f"Already stored  {shared}, {decimal(shared_bytes)}")


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_SHOWN_DIGITS]
