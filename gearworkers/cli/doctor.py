"""`gear doctor`: check everything that a node needs.

The kernel and the file system are checked by `mounts.probe`; this module checks the processes of the node, the remote
and Docker.
"""

from __future__ import annotations

import http.client
import re
from dataclasses import replace

import typer

from gearworkers.cli import containerd_config
from gearworkers.cli.docker_api import Dockerd
from gearworkers.cli.mount_namespaces import mount_namespace_check
from gearworkers.cli.output import EXIT_FAULTS, counted, print_checks
from gearworkers.cli.plugin_call import call_plugin
from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import GearError
from gearworkers.layers.index.probe import check_index
from gearworkers.lazyfs.client import read_status
from gearworkers.lazyfs.fuse_probe import check_fuse
from gearworkers.mounts.probe import probe
from gearworkers.remote.factory import open_remote
from gearworkers.remote.name import remote_name
from gearworkers.settings import NodeSettings, Settings
from gearworkers.util.check import Check
from gearworkers.util.log import command_settings

FIRST_DOCKER = (20, 10)
LAST_DOCKER = 27
"""Docker 28 has no graphdriver plugins; 27 has them behind an environment variable."""

_USE_GEAR = 'set "storage-driver": "gear" in its configuration'
_TIMEOUT_S = 3.0
_REMOTE_TIMEOUT_S = 10.0


def command() -> None:
    """Check kernel, file system, Redis, workers, gateway, lazy file server, remote and Docker, one line each.

    Exit 1 if a required part is missing.
    """
    checks = diagnose(command_settings())
    print_checks(checks)
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(EXIT_FAULTS)


def diagnose(settings: Settings) -> list[Check]:
    """Check everything that a node needs; change nothing."""
    root = settings.gear_root
    while not root.exists():
        root = root.parent
    return [
        *probe(root, check_index),
        check_fuse(),
        redis_check(settings),
        workers_check(settings),
        gateway_check(settings),
        lazyfs_check(settings),
        inode_numbers_check(settings),
        remote_check(settings),
        *containerd_lines(settings),
        *docker_checks(settings),
    ]


def redis_check(settings: NodeSettings) -> Check:
    """Check that Redis takes tasks and keeps them."""
    import redis  # only this check and the workers need Redis, kombu and Celery, which take long to import
    from kombu.utils.url import maybe_sanitize_url

    from gearworkers.workers.broker import is_refusal, require_write

    name = "Redis"
    shown_url = maybe_sanitize_url(settings.effective_broker_url)  # without the password
    advice = f"start it (Procfile: redis), or set GEAR_BROKER_URL; tried {shown_url}"
    url = settings.effective_broker_url.replace("redis+socket://", "unix://").replace("virtual_host=", "db=")
    try:
        client = redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
        memory = client.info("memory")
        persistence = client.info("persistence")
        require_write(client)
    except (redis.RedisError, ValueError) as exc:
        if is_refusal(exc):
            advice = "read its log; workers reconnect when it accepts writes again"
        reason = "refuses tasks" if is_refusal(exc) else "does not answer"
        return Check(name, False, False, f"{reason} ({exc}): the gateway's own processes do imports", advice)
    if memory.get("maxmemory_policy") != "noeviction" or not persistence.get("aof_enabled"):
        return Check(name, False, False, "may lose tasks", "set maxmemory-policy noeviction and appendonly yes")
    return Check(name, True, False, "answers, AOF on, noeviction")


def workers_check(settings: NodeSettings) -> Check:
    """Check that workers serve the queues of this node."""
    from gearworkers.workers.celery_app import make_app  # takes long to import

    try:
        answers = make_app(settings).control.inspect(timeout=_TIMEOUT_S).active_queues() or {}
    except Exception as exc:  # the broker's library raises errors of many kinds
        return Check("Workers", False, False, f"cannot be queried ({type(exc).__name__})", "check Redis first")
    return queues_check(settings.node, {queue["name"] for found in answers.values() for queue in found})


def queues_check(node: str, served: set[str]) -> Check:
    """Check that the queues *served* are those of *node*, and say whether a worker converts images."""
    name = "Workers"
    queues = {f"import@{node}", f"push@{node}"}
    missing = ", ".join(sorted(queues - served))
    if missing:
        advice = "start them (Procfile: workers); until then the gateway does their work"
        return Check(name, False, False, f"no worker serves {missing}", advice)
    converts = "convert worker found" if "convert" in served else "no convert worker: use `gear convert --local`"
    return Check(name, True, False, f"serve {', '.join(sorted(queues))}; {converts}")


def gateway_check(settings: NodeSettings) -> Check:
    """Check that the gateway answers."""
    name = "Gateway"
    socket = settings.effective_plugin_socket
    try:
        call_plugin(socket, "Plugin.Activate", _TIMEOUT_S)
    except (OSError, ValueError, http.client.HTTPException) as exc:
        advice = "start it: python -m plugin_gateway"
        return Check(name, False, True, f"{socket} does not answer ({exc})", advice)
    return Check(name, True, True, f"answers on {socket}")


def lazyfs_check(settings: NodeSettings) -> Check:
    """Check that the lazy file server runs, and that it can fetch."""
    name = "Lazy file server"
    status = read_status(settings.lazyfs_socket)
    if status is None:
        return Check(name, False, False, "does not run: Gear images cannot be used", "start it (Procfile: lazyfs)")
    if status.failures:
        advice = "see `gear status`, and check the remote"
        return Check(name, False, False, f"{counted(len(status.failures), 'object')} could not be fetched", advice)
    return Check(name, True, False, f"runs, {counted(status.incomplete_layers, 'incomplete layer')}")


def inode_numbers_check(settings: NodeSettings) -> Check:
    """Check that no running container uses layers whose files share inode numbers."""
    name = "Inode numbers"
    try:
        ids = sorted(path.name for path in settings.old_numbers_path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        ids = []
    if not ids:
        return Check(name, True, False, "unique across all layers")
    found = f"shared by several layers in {', '.join(_container_names(settings, ids))}, mounted by gearworkers 0.1"
    advice = "stop and start them: until then tools may mistake their files for hard links"
    return Check(name, False, False, found, advice)


def remote_check(settings: Settings) -> Check:
    """Check that the remote answers this node."""
    name = "Remote"
    if not settings.remote.url:
        return Check(name, True, False, "not set: new objects stay on this node, and Gear images cannot be used")
    try:
        remote = open_remote(replace(settings, remote=replace(settings.remote, timeout_s=_REMOTE_TIMEOUT_S)))
        try:
            remote.has([bytes(DIGEST_BYTES)])
            remote.document("doctor")  # lists: only a listing distinguishes a missing bucket from an empty one
        finally:
            remote.close()
    except GearError as exc:
        advice = "new objects stay pending until it answers, and missing files cannot be read"
        return Check(name, False, True, str(exc), advice)
    return Check(name, True, False, f"{remote_name(settings.remote.url).partition('?')[0]} answers")


def containerd_lines(settings: NodeSettings) -> list[Check]:
    """Check the containerd that uses gearworkers; one line if it does not."""
    name = "containerd"
    socket = settings.effective_containerd_socket
    if socket is None:
        return [Check(name, True, False, "not served: GEAR_CONTAINERD_SOCKET is off")]
    checks = containerd_config.containerd_checks(settings)
    if len(checks) == 1:
        return checks
    if checks[1].found == containerd_config.NOT_CONFIGURED:
        return [Check(name, True, False, "does not use gearworkers; see `gear containerd-config`")]
    return [*checks, mount_namespace_check(settings.gear_root, socket, settings.containerd_address)]


def docker_checks(settings: NodeSettings) -> list[Check]:
    """Check dockerd: its version, and the way in which it uses gearworkers."""
    advice = "start dockerd with --experimental -s gear, or set DOCKER_HOST"
    try:
        info = Dockerd(settings).info()
    except GearError as exc:
        return [Check("Docker", False, False, str(exc), advice)]
    numbers = re.match(r"(\d+)\.(\d+)", info.version)
    if numbers is None:
        return [Check("Docker", False, False, f"has the unknown version {info.version!r}", advice)]
    if info.uses_snapshotter:
        return [docker_snapshotter_check(info.version, info.driver)]
    if info.driver != "gear":
        return [Check("Docker", False, True, f"{info.version} stores images by driver {info.driver}", _USE_GEAR)]
    return [
        docker_version_check(info.version, int(numbers[1]), int(numbers[2])),
        _experimental_check(info.experimental),
    ]


def docker_snapshotter_check(version: str, snapshotter: str) -> Check:
    """Check that a dockerd with containerd's image store uses our snapshotter."""
    found = f"{version} with containerd's image store, snapshotter {snapshotter}"
    if snapshotter == "gear":
        return Check("Docker", True, True, found)
    return Check("Docker", False, True, found, _USE_GEAR)


def docker_version_check(version: str, major: int, minor: int) -> Check:
    """Check that a dockerd of this version takes the driver."""
    if (major, minor) < FIRST_DOCKER:
        return Check("Docker", False, True, f"{version} is older than the versions tested", "use 20.10 to 27")
    if major > LAST_DOCKER:
        advice = "use containerd's image store: see `gear containerd-config`"
        return Check("Docker", False, True, f"{version} has no graphdriver plugins", advice)
    if major == LAST_DOCKER:
        advice = "set DOCKERD_DEPRECATED_GRAPHDRIVER_PLUGINS=1 in its environment"
        return Check("Docker", True, True, f"{version}; graphdriver plugins are off by default", advice)
    return Check("Docker", True, True, version)


def _experimental_check(experimental: bool) -> Check:
    if experimental:
        return Check("Docker experimental", True, True, "on")
    advice = 'start dockerd with --experimental, or with "experimental": true in its configuration'
    return Check("Docker experimental", False, True, "off", advice)


def _container_names(settings: NodeSettings, layer_ids: list[str]) -> list[str]:
    """Return the names of the containers on these layers; or the layer's id where dockerd knows no container."""
    try:
        names = Dockerd(settings).container_names()
    except GearError:
        names = {}
    return [f"container {names[id]}" if id in names else f"layer {id}" for id in layer_ids]
