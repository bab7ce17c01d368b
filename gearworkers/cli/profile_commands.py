"""`gear profile`: show and extend the start-up profiles of images."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import typer
from rich.table import Table

from gearworkers.cas.store import ObjectStore
from gearworkers.cli.docker_api import container_layer, image_layer
from gearworkers.cli.output import console
from gearworkers.errors import InvalidInput, NotFound, Unavailable, from_os_error
from gearworkers.layers.store import MERGED, LayerStore
from gearworkers.mounts.overlay import is_mounted
from gearworkers.profiles import document
from gearworkers.profiles.resolve import profile_name, top_image_layer
from gearworkers.remote.factory import open_remote
from gearworkers.settings import NodeSettings
from gearworkers.util.log import command_settings
from gearworkers.util.syscalls import watch_opens

app = typer.Typer(
    help="Show and extend start-up profiles: the files that containers of an image open while they start.",
    no_args_is_help=True,
)


@app.command()
def show(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE", help="Name or id of a pulled image; without a dockerd, the driver's id of a layer."
        ),
    ],
) -> None:
    """List the start-up profile of an image in the order of first access."""
    settings = command_settings()
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    id = _layer_id(settings, image, image_layer, f"{image} is not on this node; pull it first")
    remote = open_remote(settings)
    try:
        name = profile_name(layers, top_image_layer(layers, id))
        data = remote.document(name)
    finally:
        remote.close()
    if data is None:
        raise NotFound(
            f"{name}: no start of this image has been recorded; start a container, or run `gear profile record`"
        )
    profile = document.unpack(data)
    table = Table("object", "bytes", "read", box=None)
    for opened in profile.objects:
        table.add_row(opened.digest, str(opened.size_bytes), _read_bytes(opened))
    console.print(table)
    console.print(f"{name}: {len(profile.objects)} objects")


@app.command()
def record(
    container: Annotated[
        str,
        typer.Argument(
            metavar="CONTAINER",
            help="Name or id of a running container; without a dockerd, the driver's id of its layer.",
        ),
    ],
    seconds: Annotated[float, typer.Option(help="Length of the recording. Ctrl-C ends it earlier.", min=1.0)] = 30.0,
) -> None:
    """Add the files that a running container opens from now on to the profile of its image."""
    from gearworkers.profiles.recorder import record as record_opens  # only this command needs it

    settings = replace(command_settings(), profile_window_s=seconds)
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    id = layers.get(_layer_id(settings, container, container_layer, f"dockerd has no container {container}")).id
    merged = settings.gear_containers_path / id / MERGED
    if not is_mounted(merged):
        raise InvalidInput(f"container {container} does not run; start it first")
    stop_fd, end_fd = os.pipe()
    signal.signal(signal.SIGINT, lambda *_: _close_once(end_fd))
    try:
        group_fd = watch_opens(merged)
    except OSError as exc:
        raise from_os_error(exc, f"watch {merged}") from exc
    profile = record_opens(settings, top_image_layer(layers, id), merged, group_fd, stop_fd, extend=True)
    console.print(f"{len(profile.objects)} objects were opened")


def _read_bytes(opened: document.OpenedObject) -> str:
    """Return the number of bytes of an object that a start reads; empty if the profile has no ranges for it."""
    return str(sum(size_bytes for _, size_bytes in opened.ranges)) if opened.ranges else ""


def _layer_id(
    settings: NodeSettings, name: str, ask_dockerd: Callable[[NodeSettings, str], str | None], not_found: str
) -> str:
    """Return the id of the layer that dockerd has for *name*; *name* itself where no dockerd runs.

    Raises:
        NotFound: dockerd has none; the message is *not_found*.
        FailedPrecondition: dockerd stores the image or container outside of this GEAR_ROOT.
    """
    try:
        layer = ask_dockerd(settings, name)
    except Unavailable:
        return name
    if layer is None:
        raise NotFound(not_found)
    return layer


def _close_once(fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(fd)
