"""`gear pin` and `gear unpin`: keep all files of an image on this node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from gearworkers.cli.image_names import NamespaceOption, find_image, in_namespace, plain_name
from gearworkers.cli.image_objects import NodeStore, count_and_size
from gearworkers.cli.output import print_pairs
from gearworkers.layers.pins import Pin
from gearworkers.lazyfs.client import read_status
from gearworkers.settings import Settings
from gearworkers.util.log import command_settings


def pin(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="Name or id of the image, as in `docker images` or `ctr images ls`. "
            "docker:NAME and containerd:NAME ask only that daemon.",
        ),
    ],
    namespace: NamespaceOption = "",
) -> None:
    """Fetch all files of a pulled image in the background, and keep them until `gear unpin`."""
    print_pairs(_pin(*in_namespace(command_settings(), image, namespace)))


def unpin(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Name that was pinned, or the image's id.")],
) -> None:
    """Stop keeping an image's files after it is removed."""
    print_pairs(_unpin(command_settings(), image))


def _pin(settings: Settings, name: str) -> Iterable[tuple[str, str]]:
    """Pin an image; yield the result as pairs of a key and a value.

    Raises:
        GearError: As `find_image`.
    """
    node = NodeStore(settings)
    image = find_image(settings, name)
    name = plain_name(name)
    node.pins.add(Pin(name, image.id), image.top_layer)
    missing = node.missing(node.objects_of(image.top_layer))
    yield "Pinned", name
    yield "Missing", count_and_size(missing)
    if missing and read_status(settings.lazyfs_socket) is None:
        yield "Note", "missing files are fetched as soon as `gear lazyfs` runs"


def _unpin(settings: Settings, name: str) -> Iterable[tuple[str, str]]:
    """Unpin the images with this name or id; yield the result as pairs of a key and a value.

    Raises:
        NotFound: No image of this name is pinned.
    """
    for found in NodeStore(settings).pins.remove(plain_name(name)):
        yield "Unpinned", found.name
