"""`gear index`: let nodes start an image before it has arrived, under its own name and digest."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from gearworkers.cli import conversion
from gearworkers.cli.image_names import DOCKER, NamespaceOption, in_namespace, plain_name
from gearworkers.errors import InvalidInput
from gearworkers.images.gear_manifest import ConversionReport
from gearworkers.images.layer_records import MAX_INDEX_BYTES
from gearworkers.images.source import DOCKER_ARCHIVE
from gearworkers.util.log import command_settings


def command(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="Image to index: [HOST/]NAME[:TAG][@DIGEST] in a registry, containerd:NAME or oci:PATH[:TAG].",
        ),
    ],
    platform: conversion.PlatformOption = "",
    all_platforms: conversion.AllPlatformsOption = False,
    local: conversion.LocalOption = False,
    again: conversion.AgainOption = False,
    processes: conversion.ProcessesOption = conversion.PROCESSES,
    record: conversion.RecordOption = 0.0,
    namespace: NamespaceOption = "",
) -> None:
    """Index an image: store its file contents, and an index of each layer, in GEAR_REMOTE.

    Nothing is pushed to a registry. Afterwards, any node with this remote starts the image under its own name before it
    has arrived, if its containerd uses gearworkers. Workers of the queue `convert` do the work unless --local is given.
    A layer that was indexed or converted before is not read again.
    """
    if image.startswith((DOCKER, DOCKER_ARCHIVE)):
        raise InvalidInput(
            f"{image}: its layers have other digests than in a registry, so no node would find the indexes; "
            "give the image's name in a registry"
        )
    options = conversion.ConversionOptions(platform, all_platforms, local, again, processes)
    settings, image = in_namespace(command_settings(), image, namespace)
    _print(plain_name(image), conversion.carry_out(settings, image, "", options))
    conversion.record_and_print(settings, plain_name(image), record)


def _print(name: str, report: ConversionReport) -> None:
    indexed = [layer for layer in report.converted if not layer.private and layer.size_bytes <= MAX_INDEX_BYTES]
    too_large = report.layers - report.private_layers - len(indexed)
    print(f"Image           {name}")
    print(f"Digest          {report.digest}")
    print(f"Layers          {report.layers} ({report.reused_layers} already indexed)")
    if report.private_layers:
        print(f"Private layers  {report.private_layers} (not indexed)")
    if too_large:
        print(f"Too large       {too_large} (not indexed: an index may have {decimal(MAX_INDEX_BYTES)})")
    for layer in indexed:
        print(f"Index           {conversion.short_digest(layer.source_digest)}: {decimal(layer.size_bytes)}")
    print(f"All indexes     {decimal(sum(layer.size_bytes for layer in indexed))}")
    conversion.print_objects(report)
