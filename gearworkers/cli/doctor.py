"""What `gear doctor` looks at beside the kernel: Redis, workers, the gateway, Docker."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis
from kombu.utils.url import maybe_sanitize_url

from gearworkers.cli.docker_api import container_names
from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import GearError
from gearworkers.layers.index.probe import check_index
from gearworkers.lazyfs.client import read_status
from gearworkers.lazyfs.fuse_probe import check_fuse
from gearworkers.mounts.probe import Check, probe
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from gearworkers.util.unix_http import UnixHTTPConnection

_TIMEOUT_S = 3.0
_STATUS_TIMEOUT_S = 60.0
"""Of a million objects the gateway counts for seconds what is stored."""
_REMOTE_TIMEOUT_S = 10.0
_FIRST_DOCKER = (20, 10)
_LAST_DOCKER = 27
_GATED_DOCKER = 27


def diagnose(settings: Settings) -> list[Check]:
    """Look at everything a node needs; nothing is changed."""
    root = settings.gear_root
    while not root.exists():
        root = root.parent
    node = [_redis(settings), _workers(settings), _gateway(settings), _lazy_files(settings)]
    node += [inode_numbers_check(settings), remote_check(settings)]
    return [*probe(root, check_index), check_fuse(), *node, *_docker()]


def gateway_status(settings: Settings) -> list[tuple[str, str]] | None:
    """What the running gateway answers to GraphDriver.Status; None if none runs."""
    try:
        answer = _call(settings.plugin_socket, "GraphDriver.Status", _STATUS_TIMEOUT_S)
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return [(key, value) for key, value in answer.get("Status") or []]


def _redis(settings: Settings) -> Check:
    from gearworkers.workers.broker import is_refusal, require_write  # heavy, and of no use to the other commands

    name = "Redis"
    tried = maybe_sanitize_url(settings.effective_broker_url)  # its password is not told
    advice = f"start it (Procfile: redis), or set GEAR_BROKER_URL; tried {tried}"
    try:
        client = redis.Redis.from_url(
            _redis_url(settings), socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
        )
        memory = client.info("memory")
        persistence = client.info("persistence")
        require_write(client)
    except (redis.RedisError, ValueError) as exc:
        if is_refusal(exc):
            advice = "see its log; when it takes them again, workers come back by themselves"
        how = "refuses tasks" if is_refusal(exc) else "does not answer"
        return Check(name, False, False, f"{how} ({exc}): imports go on in the gateway", advice)
    if memory.get("maxmemory_policy") != "noeviction" or not persistence.get("aof_enabled"):
        return Check(name, False, False, "may lose tasks", "set maxmemory-policy noeviction and appendonly yes")
    return Check(name, True, False, "answers, AOF on, noeviction")


def _workers(settings: Settings) -> Check:
    from gearworkers.workers.celery_app import make_app  # heavy, and of no use to the other commands

    name = "Workers"
    queues = {f"import@{settings.node}", f"push@{settings.node}"}
    try:
        answers = make_app(settings).control.inspect(timeout=_TIMEOUT_S).active_queues() or {}
    except Exception as exc:  # whatever the broker library raises, there is no answer
        return Check(name, False, False, f"cannot be asked ({type(exc).__name__})", "see Redis first")
    served = {queue["name"] for found in answers.values() for queue in found}
    missing = ", ".join(sorted(queues - served))
    if missing:
        advice = "start them (Procfile: import, push); until then the gateway works for them"
        return Check(name, False, False, f"nobody serves {missing}", advice)
    return Check(name, True, False, f"{len(answers)} serve {', '.join(sorted(queues))}")


def _gateway(settings: Settings) -> Check:
    name = "Gateway"
    try:
        _call(settings.plugin_socket, "Plugin.Activate", _TIMEOUT_S)
    except (OSError, ValueError, http.client.HTTPException) as exc:
        advice = "start it: python -m plugin_gateway"
        return Check(name, False, True, f"{settings.plugin_socket} does not answer ({exc})", advice)
    return Check(name, True, True, f"answers on {settings.plugin_socket}")


def inode_numbers_check(settings: Settings) -> Check:
    """Whether containers run on layers whose files share inode numbers."""
    name = "Inode numbers"
    try:
        ids = sorted(path.name for path in settings.old_numbers_path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        ids = []
    if not ids:
        return Check(name, True, False, "differ over all layers")
    found = f"shared by several layers in {', '.join(_container_names(settings, ids))}, mounted by gearworkers 0.1"
    return Check(name, False, False, found, "stop and start them: until then copies of them may mix up hard links")


def _container_names(settings: Settings, layer_ids: list[str]) -> list[str]:
    """The containers on these layers; the layer's id for one that dockerd does not name."""
    try:
        named = container_names(settings)
    except GearError:
        named = {}
    return [f"container {named[id]}" if id in named else f"layer {id}" for id in layer_ids]


def _lazy_files(settings: Settings) -> Check:
    name = "Lazy file server"
    status = read_status(settings.lazyfs_socket)
    if status is None:
        return Check(name, False, False, "does not run: Gear images cannot", "start it (Procfile: lazyfs)")
    if status.failures:
        advice = "see `gear status`, and the remote"
        return Check(name, False, False, f"{len(status.failures)} objects could not be fetched", advice)
    return Check(name, True, False, f"runs, {status.incomplete_layers} incomplete layers")


def remote_check(settings: Settings) -> Check:
    """Whether the remote answers this node."""
    name = "Remote"
    if not settings.remote.url:
        return Check(name, True, False, "none is set: new objects stay on this node, Gear images cannot be used")
    try:
        remote = open_remote(replace(settings, remote=replace(settings.remote, timeout_s=_REMOTE_TIMEOUT_S)))
        try:
            remote.has([bytes(DIGEST_BYTES)])
            remote.document("doctor")  # a listing: it alone tells a bucket that is not there from one that is empty
        finally:
            remote.close()
    except GearError as exc:
        return Check(name, False, False, str(exc), "new objects wait in the spool until then")
    return Check(name, True, False, f"{settings.remote.url.partition('?')[0]} answers")


def _docker() -> list[Check]:
    try:
        told = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}} {{.Server.Experimental}}"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S * 3,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return [Check("Docker", False, False, f"cannot be asked ({exc})", "install docker 20.10 to 27")]
    version, _, experimental = told.stdout.strip().partition(" ")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if told.returncode or numbers is None:
        return [Check("Docker", False, False, "no daemon answers", "start dockerd with --experimental -s gear")]
    return [_docker_version(version, int(numbers[1]), int(numbers[2])), _docker_experimental(experimental)]


def _docker_version(version: str, major: int, minor: int) -> Check:
    if (major, minor) < _FIRST_DOCKER:
        return Check("Docker", False, True, f"{version} is older than what gearworkers was tried on", "use 20.10 to 27")
    if major > _LAST_DOCKER:
        return Check("Docker", False, True, f"{version} has no graphdriver plugins", "use 20.10 to 27")
    if major == _GATED_DOCKER:
        advice = "set DOCKERD_DEPRECATED_GRAPHDRIVER_PLUGINS=1 in its environment"
        return Check("Docker", True, True, f"{version}; graphdriver plugins are gated", advice)
    return Check("Docker", True, True, version)


def _docker_experimental(told: str) -> Check:
    if told == "true":
        return Check("Docker experimental", True, True, "on")
    advice = 'start dockerd with --experimental, or with "experimental": true in its configuration'
    return Check("Docker experimental", False, True, "off", advice)


def _redis_url(settings: Settings) -> str:
    return settings.effective_broker_url.replace("redis+socket://", "unix://").replace("virtual_host=", "db=")


def _call(plugin_socket: Path, method: str, timeout_s: float) -> dict[str, Any]:
    """One call of the plugin protocol.

    Raises:
        OSError: Nobody listens, or nobody answers in time.
        HTTPException: The answer is not HTTP, or breaks off.
        ValueError: The answer is no JSON.
    """
    connection = UnixHTTPConnection(plugin_socket, timeout_s)
    try:
        connection.request("POST", f"/{method}", body=b"{}")
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer
    finally:
        connection.close()
