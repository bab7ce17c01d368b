"""`gear convert`: a conversion as a user sees it, with a bar a layer on a terminal and a line a layer elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from gearworkers.images.convert import Plan, Report, plan_conversion
from gearworkers.images.convert_local import convert_here
from gearworkers.images.manifest import Platform
from gearworkers.images.source import is_local
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings

_SHOWN_DIGITS = 12


class _Watcher(Protocol):
    def told(self, digest: str, read_bytes: int) -> None:
        """So many bytes of a layer have been read so far."""

    def noted(self, line: str) -> None:
        """Something goes on, but not as it should."""


def convert_image(
    settings: Settings,
    source: str,
    target: str,
    platform: Platform | None,
    *,
    all_platforms: bool,
    again: bool,
    processes: int,
    local: bool,
) -> None:
    """Convert *source* and print what it came to; progress goes to stderr.

    Raises:
        GearError: What kept it from being done. What is done stays done.
    """
    open_remote(settings).close()  # without a remote nothing is begun
    plan = plan_conversion(settings.registry, source, target, platform, all_platforms=all_platforms, again=again)
    with _watcher(plan) as watcher:
        if local or is_local(source):
            report = convert_here(settings, plan, processes, watcher.told)
        else:
            from gearworkers.workers.conversion import convert_on_workers  # Celery, which `--local` does without

            report = convert_on_workers(settings, plan, watcher.told, watcher.noted)
    _print(report)


@contextmanager
def _watcher(plan: Plan) -> Iterator[_Watcher]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(plan)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        yield _Bars(plan, progress)


class _Bars:
    """A bar for each layer and one for all."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {
            job.digest: progress.add_task(_short(job.digest), total=job.size_bytes) for job in plan.jobs()
        }
        self._read: dict[str, int] = {}
        self._total = progress.add_task("total", total=_total_bytes(plan))

    def told(self, digest: str, read_bytes: int) -> None:
        self._read[digest] = read_bytes
        self._progress.update(self._bars[digest], completed=read_bytes)
        self._progress.update(self._total, completed=sum(self._read.values()))

    def noted(self, line: str) -> None:
        self._progress.console.print(line, markup=False)


class _Lines:
    """A line when a layer has been read."""

    def __init__(self, plan: Plan) -> None:
        self._sizes = {job.digest: job.size_bytes for job in plan.jobs()}
        self._read = dict.fromkeys(self._sizes, 0)

    def told(self, digest: str, read_bytes: int) -> None:
        was_whole = self._read[digest] == self._sizes[digest]
        self._read[digest] = read_bytes
        if read_bytes == self._sizes[digest] and not was_whole:
            read, total = decimal(sum(self._read.values())), decimal(sum(self._sizes.values()))
            self.noted(f"layer {_short(digest)} read, {decimal(self._sizes[digest])}; {read} of {total}")

    def noted(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _print(report: Report) -> None:
    before, after = decimal(report.bytes_before), decimal(report.bytes_after)
    shared = report.objects - report.new_objects
    shared_bytes = report.object_bytes - report.new_bytes
    kind = "Gear image" if report.private_layers < report.layers else "Image     "
    print(f"{kind}      {report.target}")
    print(f"Digest          {report.digest}")
    print(f"Layers          {report.layers}, {report.reused_layers} of them converted before")
    if report.private_layers:
        print(f"Private layers  {report.private_layers}, which keep their contents")
    print(f"Layers' bytes   {before} before, {after} after")
    print(f"New objects     {report.new_objects}, {decimal(report.new_bytes)}")
    print(f"Shared objects  {shared}, {decimal(shared_bytes)}")


def _total_bytes(plan: Plan) -> int:
    return sum(job.size_bytes for job in plan.jobs())


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_SHOWN_DIGITS]
