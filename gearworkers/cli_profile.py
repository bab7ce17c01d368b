"""`gear profile`: start-up profiles as an administrator sees and adds to them."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gearworkers.errors import InvalidInput, NotFound, from_os_error
from gearworkers.layers.startup import image_of, profile_name
from gearworkers.layers.store import MERGED, LayerStore
from gearworkers.mounts.overlay import is_mounted
from gearworkers.mounts.sys import watch_opens
from gearworkers.objects import profile
from gearworkers.objects.remotes.opening import open_remote
from gearworkers.objects.store import ObjectStore
from gearworkers.settings import Settings

_LAYER_HELP = "A layer's id, or the path that `docker inspect -f '{{.GraphDriver.Data.MergedDir}}' NAME` prints."
Layer = Annotated[str, typer.Argument(help=_LAYER_HELP)]

app = typer.Typer(help="What containers of an image open while they start.", no_args_is_help=True)
_out = Console(soft_wrap=True, highlight=False)


@app.command()
def show(layer: Layer) -> None:
    """List the profile of an image, or of a container's image, in the order of first access."""
    settings = Settings.from_environ()
    layers, id = _layer(settings, layer)
    remote = open_remote(settings)
    try:
        name = profile_name(layers, image_of(layers, id))
        data = remote.document(name)
    finally:
        remote.close()
    if data is None:
        raise NotFound(f"{name}: no container of this image was recorded yet")
    found = profile.unpack(data)
    table = Table("object", "bytes", "read", box=None)
    for opened in found.objects:
        table.add_row(opened.digest, str(opened.size_bytes), _read(opened))
    _out.print(table)
    _out.print(f"{name}: {len(found.objects)} objects")


@app.command()
def record(
    layer: Layer, seconds: Annotated[float, typer.Option(help="So long; Ctrl-C ends it earlier.", min=1.0)] = 30.0
) -> None:
    """Add to the profile what a running container opens from now on."""
    from gearworkers.services.recorder import record as recorded  # of use to no other command

    settings = replace(Settings.from_environ(), profile_window_s=seconds)
    layers, id = _layer(settings, layer)
    merged = settings.gear_containers_path / id / MERGED
    if not is_mounted(merged):
        raise InvalidInput(f"layer {id}: no container that runs has it")
    stop_fd, end_fd = os.pipe()
    signal.signal(signal.SIGINT, lambda *_: _close_once(end_fd))
    try:
        group_fd = watch_opens(merged)
    except OSError as exc:
        raise from_os_error(exc, f"watch {merged}") from exc
    found = recorded(settings, image_of(layers, id), merged, group_fd, stop_fd, again=True)
    _out.print(f"{len(found.objects)} objects were opened")


def _read(opened: profile.Opened) -> str:
    """How many bytes a start reads of it, as far as that is known."""
    return str(sum(size_bytes for _, size_bytes in opened.ranges)) if opened.ranges else ""


def _layer(settings: Settings, named: str) -> tuple[LayerStore, str]:
    """The layer of that id or path.

    Raises:
        InvalidInput: The path is not below GEAR_ROOT.
        NotFound: There is no such layer.
    """
    id = named
    if "/" in named:
        parents = (settings.gear_containers_path, settings.gear_images_path)
        found = [Path(named).relative_to(parent).parts for parent in parents if Path(named).is_relative_to(parent)]
        if not found or not found[0]:
            raise InvalidInput(f"{named}: it is not the path of a layer below {settings.gear_root}")
        id = found[0][0]
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    layers.get(id)
    return layers, id


def _close_once(fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(fd)
