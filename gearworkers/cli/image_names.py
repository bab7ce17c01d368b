"""Names of this node's images and containers, and the daemons that are asked for them.

    name              asks
    docker:NAME       dockerd (`docker_api.Dockerd`)
    containerd:NAME   containerd, in one namespace (`containerd_images.Containerd`)
    NAME              both, dockerd first; with --namespace, containerd alone

A name may be an id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, TypeVar

import typer

from gearworkers.cli.containerd_images import Containerd
from gearworkers.cli.docker_api import Dockerd
from gearworkers.cli.local_images import Daemon, LocalImage
from gearworkers.errors import FailedPrecondition, GearError, InvalidInput, NotFound, Unavailable
from gearworkers.settings import NodeSettings, Settings

DOCKER = "docker:"
CONTAINERD = "containerd:"

NamespaceOption = Annotated[
    str,
    typer.Option(
        "--namespace",
        "-n",
        help="Ask containerd in this namespace: moby for Docker, k8s.io for Kubernetes. Default: CONTAINERD_NAMESPACE.",
    ),
]
_T = TypeVar("_T")


def in_namespace(settings: Settings, name: str, namespace: str) -> tuple[Settings, str]:
    """Return settings and name for the option --namespace, which may be empty.

    Raises:
        InvalidInput: The name is one of dockerd's.
    """
    if not namespace:
        return settings, name
    if name.startswith(DOCKER):
        raise InvalidInput(f"{name}: --namespace is for containerd only")
    return replace(settings, containerd_namespace=namespace), CONTAINERD + name.removeprefix(CONTAINERD)


def plain_name(name: str) -> str:
    """Return the name without the daemon's prefix."""
    return name.removeprefix(DOCKER) if name.startswith(DOCKER) else name.removeprefix(CONTAINERD)


def names_daemon(name: str) -> bool:
    """Whether the name has a daemon's prefix."""
    return name.startswith((DOCKER, CONTAINERD))


def find_image(settings: NodeSettings, name: str) -> LocalImage:
    """Return the image *name* of the first daemon that has it in this GEAR_ROOT.

    Raises:
        NotFound: No daemon that answers has the image.
        Unavailable: No daemon answers.
        FailedPrecondition, InvalidInput: As `Daemon`, if no other daemon has the image.
    """
    return _first(settings, name, lambda daemon, plain: daemon.image(plain))


def find_container(settings: NodeSettings, name: str) -> str:
    """Return the engine's id of the layer of the container *name*; errors as `find_image`."""
    return _first(settings, name, lambda daemon, plain: daemon.container_layer(plain))


def _first(settings: NodeSettings, name: str, ask: Callable[[Daemon, str], _T | None]) -> _T:
    errors: list[GearError] = []
    for daemon in _daemons(settings, name):
        try:
            found = ask(daemon, plain_name(name))
        except (FailedPrecondition, InvalidInput, Unavailable) as exc:
            errors.append(exc)
            continue
        if found is not None:
            return found
        errors.append(NotFound(f"{daemon} does not have it{_hint(name)}"))
    for refusal in (FailedPrecondition, InvalidInput):
        for error in errors:
            if isinstance(error, refusal):
                raise error
    kind: type[GearError] = NotFound if any(isinstance(error, NotFound) for error in errors) else Unavailable
    raise kind(f"{plain_name(name)} is not on this node: {'; '.join(map(str, errors))}")


def _daemons(settings: NodeSettings, name: str) -> list[Daemon]:
    if name.startswith(DOCKER):
        return [Dockerd(settings)]
    containerd: list[Daemon] = [] if settings.effective_containerd_socket is None else [Containerd(settings)]
    return containerd if name.startswith(CONTAINERD) else [Dockerd(settings), *containerd]


def _hint(name: str) -> str:
    """Return a hint for the images of the repository ``docker``, whose short names look like dockerd's."""
    tag = name.removeprefix(DOCKER)
    if not name.startswith(DOCKER) or ":" in tag or "/" in tag:
        return ""
    return f" (the image {name} of Docker Hub is docker.io/library/{name})"
