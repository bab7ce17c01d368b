"""`gear profile`: start-up profiles as an administrator sees and adds to them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gearworkers.cas.store import ObjectStore
from gearworkers.cli.docker_api import container_layer, image_layer
from gearworkers.errors import InvalidInput, NotFound, Unavailable, from_os_error
from gearworkers.layers.store import MERGED, LayerStore
from gearworkers.mounts.overlay import is_mounted
from gearworkers.profiles import document
from gearworkers.profiles.resolve import profile_name, top_image_layer
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from gearworkers.util.log import command_settings
from gearworkers.util.syscalls import watch_opens

_OR_LAYER = "or the id of a layer of the driver, where no dockerd runs."
Image = Annotated[str, typer.Argument(help=f"As Docker knows it; {_OR_LAYER}")]
Container = Annotated[str, typer.Argument(help=f"One that runs, as Docker knows it; {_OR_LAYER}")]

app = typer.Typer(help="What containers of an image open while they start.", no_args_is_help=True)
_out = Console(soft_wrap=True, highlight=False)


@app.command()
def show(image: Image) -> None:
    """List the profile of an image, in the order of first access."""
    settings = command_settings()
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    id = _layer(settings, image, image_layer, f"{image} is not here; pull it first")
    remote = open_remote(settings)
    try:
        name = profile_name(layers, top_image_layer(layers, id))
        data = remote.document(name)
    finally:
        remote.close()
    if data is None:
        raise NotFound(f"{name}: no container of this image was recorded yet")
    found = document.unpack(data)
    table = Table("object", "bytes", "read", box=None)
    for opened in found.objects:
        table.add_row(opened.digest, str(opened.size_bytes), _read(opened))
    _out.print(table)
    _out.print(f"{name}: {len(found.objects)} objects")


@app.command()
def record(
    container: Container,
    seconds: Annotated[float, typer.Option(help="So long; Ctrl-C ends it earlier.", min=1.0)] = 30.0,
) -> None:
    """Add to the profile what a running container opens from now on."""
    from gearworkers.profiles.recorder import record as recorded  # of use to no other command

    settings = replace(command_settings(), profile_window_s=seconds)
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    id = layers.get(_layer(settings, container, container_layer, f"{container}: dockerd has no such container")).id
    merged = settings.gear_containers_path / id / MERGED
    if not is_mounted(merged):
        raise InvalidInput(f"{container}: it is no container that runs")
    stop_fd, end_fd = os.pipe()
    signal.signal(signal.SIGINT, lambda *_: _close_once(end_fd))
    try:
        group_fd = watch_opens(merged)
    except OSError as exc:
        raise from_os_error(exc, f"watch {merged}") from exc
    found = recorded(settings, top_image_layer(layers, id), merged, group_fd, stop_fd, extend=True)
    _out.print(f"{len(found.objects)} objects were opened")


def _read(opened: document.OpenedObject) -> str:
    """How many bytes a start reads of it, as far as that is known."""
    return str(sum(size_bytes for _, size_bytes in opened.ranges)) if opened.ranges else ""


def _layer(settings: Settings, name: str, ask: Callable[[Settings, str], str | None], missing: str) -> str:
    """The id of the layer that *ask* learns from dockerd; where no dockerd runs, *name* is the id.

    Raises:
        NotFound: dockerd has none; *missing* says so.
        FailedPrecondition: dockerd's images lie elsewhere.
    """
    try:
        layer = ask(settings, name)
    except Unavailable:
        return name
    if layer is None:
        raise NotFound(missing)
    return layer


def _close_once(fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(fd)
