"""`gear convert`: convert an image to a Gear image."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from gearworkers.cli import conversion
from gearworkers.cli.image_names import NamespaceOption, in_namespace
from gearworkers.images.gear_manifest import ConversionReport
from gearworkers.util.log import command_settings


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
    platform: conversion.PlatformOption = "",
    all_platforms: conversion.AllPlatformsOption = False,
    local: conversion.LocalOption = False,
    again: conversion.AgainOption = False,
    processes: conversion.ProcessesOption = conversion.PROCESSES,
    record: conversion.RecordOption = 0.0,
    namespace: NamespaceOption = "",
) -> None:
    """Convert an image to a Gear image: file contents go to GEAR_REMOTE, the rest to TARGET's registry.

    Workers of the queue `convert` do the work unless --local is given. A layer that was converted before is not
    converted again.
    """
    options = conversion.ConversionOptions(platform, all_platforms, local, again, processes)
    settings, source = in_namespace(command_settings(), source, namespace)
    _print(conversion.carry_out(settings, source, target, options))
    conversion.record_and_print(settings, target, record)


def _print(report: ConversionReport) -> None:
    before, after = decimal(report.bytes_before), decimal(report.bytes_after)
    kind = "Gear image" if report.private_layers < report.layers else "Image     "
    print(f"{kind}      {report.target}")
    print(f"Digest          {report.digest}")
    print(f"Layers          {report.layers} ({report.reused_layers} already converted)")
    if report.private_layers:
        print(f"Private layers  {report.private_layers} (not converted)")
    print(f"Size of layers  {before} before, {after} after")
    conversion.print_objects(report)
