"""`--record` of `gear convert` and `gear index`: run the new image once, so that its first start is recorded.

Docker pulls the image, which starts lazily, and the gateway records what it opens, as on any node. The container is
removed after a bounded time, which ends the recording.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import closing, suppress

from gearworkers.cas.store import ObjectStore
from gearworkers.cli.docker_api import Dockerd
from gearworkers.errors import FailedPrecondition, Unavailable
from gearworkers.layers.store import LayerStore
from gearworkers.profiles import document
from gearworkers.profiles.resolve import profile_name
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings

_STORE_TIMEOUT_S = 60.0
_POLL_S = 0.2


def record_start(settings: Settings, name: str, seconds: float) -> int:
    """Run an image once with `docker` unless a start of it was recorded before; return the number of recorded objects.

    Args:
        settings: With the remote, GEAR_ROOT and DOCKER_HOST.
        name: The image's name in a registry.
        seconds: How long the container may run.

    Raises:
        FailedPrecondition: There is no `docker`, it refuses, or all files of the image are on this node already.
        Unavailable: The recording was not stored in time.

    Crash: may leave the container.
    """
    _docker("pull", "--quiet", name)
    image = Dockerd(settings).image(name)
    if image is None:
        raise FailedPrecondition(f"dockerd has removed {name}")
    layers = LayerStore(settings, ObjectStore(settings.gear_public_cache_path))
    profile = profile_name(layers, image.top_layer)
    with closing(open_remote(settings)) as remote:
        data = remote.document(profile)
        if data is None:
            if layers.is_complete(image.top_layer):
                raise FailedPrecondition(
                    f"all files of {name} are on this node, so its start cannot be recorded here; use another node, or "
                    "`gear profile record` with a running container"
                )
            _run(name, seconds)
            deadline_s = time.monotonic() + _STORE_TIMEOUT_S
            while (data := remote.document(profile)) is None:
                if time.monotonic() > deadline_s:
                    raise Unavailable(f"the start of {name} was not recorded; see the gateway's log")
                time.sleep(_POLL_S)
    return len(document.unpack(data).objects)


def _run(name: str, seconds: float) -> None:
    """Run a container for some seconds, or until it exits, and remove it."""
    container = _docker("run", "--detach", name)
    try:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(["docker", "wait", container], capture_output=True, timeout=seconds)
    finally:
        _docker("rm", "--force", "--volumes", container)


def _docker(*arguments: str) -> str:
    """Run `docker` and return its output.

    Raises:
        FailedPrecondition: It is not installed, or it fails.
    """
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    except FileNotFoundError as exc:
        raise FailedPrecondition("--record needs the program `docker` on this host") from exc
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise FailedPrecondition(f"docker {' '.join(arguments)}: {lines[-1]}")
    return done.stdout.strip()
