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
from gearworkers.cli.image_names import NamespaceOption, find_container, find_image, in_namespace, names_daemon
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
            metavar="IMAGE",
            help="Name or id of a pulled image, docker:NAME or containerd:NAME; without a daemon, the id of a layer.",
        ),
    ],
    namespace: NamespaceOption = "",
) -> None:
    """List the start-up profile of an image in the order of first access."""
    settings, image = in_namespace(command_settings(), image, namespace)
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    id = _layer_id(settings, image, lambda settings, name: find_image(settings, name).top_layer)
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
            help="Name or id of a running container, docker:NAME or containerd:NAME; without a daemon, the id of its "
            "layer.",
        ),
    ],
    seconds: Annotated[float, typer.Option(help="Length of the recording. Ctrl-C ends it earlier.", min=1.0)] = 30.0,
    namespace: NamespaceOption = "",
) -> None:
    """Add the files that a running container opens from now on to the profile of its image."""
    from gearworkers.profiles.recorder import record as record_opens  # only this command needs it

    settings, container = in_namespace(command_settings(), container, namespace)
    settings = replace(settings, profile_window_s=seconds)
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    id = layers.get(_layer_id(settings, container, find_container)).id
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


def _layer_id(settings: NodeSettings, name: str, find: Callable[[NodeSettings, str], str]) -> str:
    """Return the id of the layer that *find* returns; *name* itself where no daemon runs.

    Raises:
        GearError: As `find_image`.
    """
    try:
        return find(settings, name)
    except Unavailable:
        if names_daemon(name):
            raise
        return name


def _close_once(fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(fd)
