"""Sources of `gear convert` that are in this host's dockerd or containerd: they become paths of this host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from gearworkers.cli.containerd_images import Containerd
from gearworkers.cli.docker_api import Dockerd
from gearworkers.cli.image_names import CONTAINERD, DOCKER, plain_name
from gearworkers.errors import NotFound
from gearworkers.images.source import DOCKER_ARCHIVE
from gearworkers.images.upload import unnamed_file
from gearworkers.settings import Settings


@contextmanager
def opened_source(settings: Settings, name: str) -> Iterator[str]:
    """Yield the name of an image as `open_source` takes it in any process of this host, while the context lasts.

    The image ``docker:NAME`` is saved to an unnamed file, which this process keeps open. The image ``containerd:NAME``
    is read from containerd's content directory. Any other name is yielded as it is.

    Raises:
        NotFound: The daemon does not have the image.
        Unavailable: The daemon does not answer.
        GearError: The file cannot be written.

    Crash: leaves no file.
    """
    if name.startswith(DOCKER):
        with unnamed_file("an image of dockerd", settings.gear_converting_path) as file:
            Dockerd(settings).save(plain_name(name), file)
            yield f"{DOCKER_ARCHIVE}/proc/{os.getpid()}/fd/{file.fileno()}"
    elif name.startswith(CONTAINERD):
        containerd = Containerd(settings)
        found = containerd.stored(plain_name(name))
        if found is None:
            raise NotFound(f"{containerd} does not have {plain_name(name)}")
        yield found.source
    else:
        yield name
