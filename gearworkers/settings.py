"""Settings of all processes, read from the environment; no other module reads it.

    Settings            all settings of a process; also the node's own: directories, sockets, limits
    ├── .remote         RemoteSettings: the store that all nodes share
    ├── .registry       RegistrySettings: credentials and proxy for registries
    ├── .manager        ManagerSettings: the server of `gear manager`
    └── .log            LogSettings

Functions take the smallest group that they need. `Settings` is a `NodeSettings`, so it can be passed for one. Each
setting is declared once, with variable, default, help, and a type that checks the value. `documented` lists them.

Environment variables were chosen over a file because systemd, Docker Compose and a shell all set them. `gear` adds the
variables of the systemd units' environment file, so that it sees the units' settings (`load_environment_file`). msgspec
checks the values: pydantic-settings takes 350 ms to import, msgspec 40 ms, and `gear` and the workers start often.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

from gearworkers.errors import InvalidInput
from gearworkers.util.env_fields import (
    Bytes,
    Count,
    DocumentedSetting,
    Seconds,
    SecondsOrZero,
    document_settings,
    read_settings,
    setting,
)
from gearworkers.util.environment_file import parse_environment

DEFAULT_STREAM_IDLE_S = 900.0
ENVIRONMENT_FILE = "/etc/gearworkers/environment"
_OTHER_VARIABLES = {"GEAR_ENVIRONMENT_FILE", "GEAR_MANAGER_ROOT"}  # read below, and by docker-compose.yml
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]
LOG_LEVELS: tuple[str, ...] = get_args(LogLevel)


def _home() -> Path:
    """Return the user's home, or / for a user without one."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """The store that all nodes share, and the way to it."""

    url: str = setting(
        "GEAR_REMOTE", "", "Store that all nodes share: a directory, s3://BUCKET/PREFIX or a manager's URL."
    )
    token: str = setting(
        "GEAR_REMOTE_TOKEN", "", "Bearer token for the manager; GEAR_REMOTE_TOKEN_FILE takes precedence."
    )
    token_file: Path | None = setting(
        "GEAR_REMOTE_TOKEN_FILE", None, "File with the bearer token for the manager; read for each request."
    )
    ca_file: Path | None = setting(
        "GEAR_REMOTE_CA_FILE", None, "CA of the manager's certificate.", default_text="the system's CAs"
    )
    timeout_s: Seconds = setting(
        "GEAR_REMOTE_TIMEOUT_S",
        60.0,
        "Seconds within which the remote must answer a call, all attempts together; a manager, each attempt.",
    )
    fetch_threads: Count = setting("GEAR_FETCH_THREADS", 32, "Requests to the remote at the same time.")
    aws_credentials_file: Path = setting(
        "AWS_SHARED_CREDENTIALS_FILE",
        lambda: _home() / ".aws" / "credentials",
        "Credentials for S3.",
        default_text="~/.aws/credentials",
    )
    aws_profile: str = setting("AWS_PROFILE", "default", "Profile in the file of S3 credentials.")


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """Credentials and proxy for registries."""

    docker_config: Path = setting(
        "DOCKER_CONFIG",
        lambda: _home() / ".docker",
        "Directory of config.json, which holds the credentials for registries.",
        default_text="~/.docker",
    )
    https_proxy: str = setting("HTTPS_PROXY", "", "URL of the proxy for registries.", fallback="https_proxy")
    no_proxy: str = setting(
        "NO_PROXY", "", "Hosts and domains to reach without the proxy, separated by commas.", fallback="no_proxy"
    )


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    """The server that `gear manager` runs."""

    listen: str = setting("GEAR_MANAGER_LISTEN", "127.0.0.1:2019", "HOST:PORT on which the manager listens.")
    store: str = setting(
        "GEAR_MANAGER_STORE",
        "",
        "Store of the manager: an existing directory or s3://BUCKET/PREFIX.",
        default_text="manager/ in GEAR_ROOT",
    )
    read_tokens_file: Path | None = setting(
        "GEAR_MANAGER_READ_TOKENS_FILE", None, "File of bearer tokens that may only read, one a line."
    )
    write_tokens_file: Path | None = setting(
        "GEAR_MANAGER_WRITE_TOKENS_FILE", None, "File of bearer tokens that may read and write, one a line."
    )
    tls_cert_file: Path | None = setting(
        "GEAR_MANAGER_TLS_CERT_FILE", None, "Certificate chain of the manager, for TLS."
    )
    tls_key_file: Path | None = setting("GEAR_MANAGER_TLS_KEY_FILE", None, "Key of the manager's certificate.")
    max_object_bytes: Bytes = setting(
        "GEAR_MANAGER_MOST_OBJECT_BYTES", 64 << 30, "Size of the largest object that the manager accepts."
    )
    client_timeout_s: Seconds = setting(
        "GEAR_MANAGER_CLIENT_TIMEOUT_S", 30.0, "Seconds without progress after which a client is disconnected."
    )


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The logs of a process."""

    level: LogLevel = setting("GEAR_LOG_LEVEL", "info", "debug, info, warning or error.")
    format: LogFormat = setting("GEAR_LOG_FORMAT", "console", "console for people, json for programs.")


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """One node: its directories, sockets, queues and limits; immutable.

    The `gear_*_path` names are the Gear driver's own (GearPublicCachePath, GearImagesPath, …).
    """

    gear_root: Path = setting("GEAR_ROOT", Path("/var/lib/gear"), "Directory of layers and objects.")
    run_dir: Path = setting("GEAR_RUN_DIR", Path("/run/gear"), "Directory of sockets and mount counts.")
    plugin_socket: str = setting(
        "GEAR_PLUGIN_SOCKET",
        "/run/docker/plugins/gear.sock",
        "Socket on which dockerd finds the graphdriver plugin; off: dockerd does not find it.",
    )
    containerd_socket: str = setting(
        "GEAR_CONTAINERD_SOCKET",
        "",
        "Socket on which containerd finds the snapshotter and the differ; off: no socket.",
        default_text="containerd.sock in GEAR_RUN_DIR",
    )
    containerd_address: Path = setting(
        "CONTAINERD_ADDRESS", Path("/run/containerd/containerd.sock"), "Socket of the containerd that uses them."
    )
    containerd_namespace: str = setting(
        "CONTAINERD_NAMESPACE", "default", "containerd's namespace for `gear`: moby for Docker, k8s.io for Kubernetes."
    )
    broker_url: str = setting(
        "GEAR_BROKER_URL", "", "Celery's broker.", default_text="redis.sock in GEAR_RUN_DIR, database 0"
    )
    node: str = setting("GEAR_NODE", socket.gethostname, "Name of this node.", default_text="host name")
    metrics_listen: str = setting(
        "GEAR_METRICS_LISTEN",
        "",
        "Address of the gateway's metrics: HOST:PORT or the path of a Unix socket.",
        default_text="metrics.sock in GEAR_RUN_DIR",
    )
    stream_idle_s: Seconds = setting(
        "GEAR_STREAM_IDLE_S",
        DEFAULT_STREAM_IDLE_S,
        "Seconds without a byte after which an import, save, push or commit fails.",
    )
    worker_processes: Count = setting(
        "GEAR_WORKER_PROCESSES",
        lambda: (os.cpu_count() or 1) + 1,
        "Most processes of the import worker, and of the convert worker.",
        default_text="one per core, and one more",
    )
    xino: bool = setting(
        "GEAR_XINO", False, "on: all files of a container have one st_dev, and inode numbers exceed 2^53."
    )
    large_object_bytes: Bytes = setting(
        "GEAR_LARGE_OBJECT_BYTES", 2 << 20, "Size from which a file is read in parts while it arrives."
    )
    fill_delay_s: Seconds = setting(
        "GEAR_FILL_DELAY_S", 10.0, "Seconds without a read after which the rest of a large file is fetched."
    )
    profile_window_s: SecondsOrZero = setting(
        "GEAR_PROFILE_WINDOW_S", 60.0, "Seconds for which the first start of a Gear image is recorded; 0: never."
    )
    lazy_pull: str = setting(
        "GEAR_LAZY_PULL",
        "on",
        "on: containerd does not download layers that are indexed in the remote; off; or only for these registries and "
        "repositories, separated by commas.",
    )
    docker_host: str = setting(
        "DOCKER_HOST", "unix:///var/run/docker.sock", "The dockerd that `gear` asks: unix:///PATH or tcp://HOST:PORT."
    )
    notify_socket: str = setting(
        "NOTIFY_SOCKET", "", "Socket on which systemd waits until the process is ready; systemd sets it."
    )

    @property
    def gear_public_cache_path(self) -> Path:
        """One immutable file per distinct content, shared by all images."""
        return self.gear_root / "public"

    @property
    def gear_private_cache_path(self) -> Path:
        """Objects of private layers, one directory a layer."""
        return self.gear_root / "private"

    @property
    def gear_nfs_path(self) -> Path:
        """Mount point for a shared store: a second cache level behind public/."""
        return self.gear_root / "nfs"

    @property
    def gear_images_path(self) -> Path:
        """Read-only layers."""
        return self.gear_root / "images"

    @property
    def gear_containers_path(self) -> Path:
        """Read-write layers."""
        return self.gear_root / "containers"

    @property
    def gear_build_path(self) -> Path:
        """Staging; anything here at start-up is left by a crash."""
        return self.gear_root / "build"

    @property
    def gear_push_path(self) -> Path:
        """The durable queue of objects awaiting push."""
        return self.gear_root / "push"

    @property
    def gear_converting_path(self) -> Path:
        """Unnamed files of layers in conversion: on disk, since /tmp may be memory."""
        return self.gear_root / "converting"

    @property
    def gear_remotes_path(self) -> Path:
        """An empty file per directory that has held blobs of a remote."""
        return self.gear_root / "remotes"

    @property
    def gear_pins_path(self) -> Path:
        """Pinned images: their objects are kept, and missing ones are fetched."""
        return self.gear_root / "pins"

    @property
    def gear_arrivals_path(self) -> Path:
        """Links to objects that arrived while incomplete layers were mounted."""
        return self.gear_root / "arrivals"

    @property
    def gear_fetching_path(self) -> Path:
        """Objects that are being fetched."""
        return self.gear_root / "fetching"

    @property
    def gateway_lock(self) -> Path:
        """Held by the one gateway of gear_root."""
        return self.gear_root / "gateway.lock"

    @property
    def lazy_mount_path(self) -> Path:
        """Mount point of the lazy file system."""
        return self.run_dir / "lazy"

    @property
    def lazyfs_socket(self) -> Path:
        """Control socket of the lazy file server, for its status and for prefetching."""
        return self.run_dir / "lazyfs.sock"

    @property
    def lazyfs_keeper_socket(self) -> Path:
        """Socket of the process that keeps the lazy file system's descriptor."""
        return self.run_dir / "lazyfs-keeper.sock"

    @property
    def old_numbers_path(self) -> Path:
        """An empty file per mounted layer whose indexes share inode numbers with others."""
        return self.run_dir / "old-inode-numbers"

    @property
    def streams_socket(self) -> Path:
        """Socket on which workers claim an ApplyDiff or a Diff from the gateway."""
        return self.run_dir / "streams.sock"

    @property
    def effective_plugin_socket(self) -> Path:
        """plugin_socket; if it is off, a socket in run_dir for `gear status`, where dockerd does not look for plugins.

        Raises:
            InvalidInput: It is not an absolute path.
        """
        if self.plugin_socket == "off":
            return self.run_dir / "plugin.sock"
        return _absolute("GEAR_PLUGIN_SOCKET", self.plugin_socket)

    @property
    def effective_containerd_socket(self) -> Path | None:
        """containerd_socket, or the one in run_dir; None if it is off.

        Raises:
            InvalidInput: It is not an absolute path.
        """
        if self.containerd_socket == "off":
            return None
        return _absolute("GEAR_CONTAINERD_SOCKET", self.containerd_socket or str(self.run_dir / "containerd.sock"))

    @property
    def effective_metrics_listen(self) -> str:
        """metrics_listen, or the socket in run_dir."""
        return self.metrics_listen or str(self.run_dir / "metrics.sock")

    @property
    def effective_broker_url(self) -> str:
        """broker_url, or the Redis socket in run_dir."""
        return self.broker_url or f"redis+socket://{self.run_dir}/redis.sock?virtual_host=0"


def _absolute(variable: str, value: str) -> Path:
    if not value.startswith("/"):
        raise InvalidInput(f"{variable}={value}: set an absolute path, or off")
    return Path(value)


@dataclass(frozen=True, slots=True)
class Settings(NodeSettings):
    """All settings of a process: the node's own, and a group for each other part."""

    remote: RemoteSettings = field(default_factory=RemoteSettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    manager: ManagerSettings = field(default_factory=ManagerSettings)
    log: LogSettings = field(default_factory=LogSettings)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read every setting; an empty variable counts as unset.

        Raises:
            InvalidInput: A path is not absolute, a number is out of range, or a word is unknown.
        """
        return read_settings(cls, environ)

    @property
    def effective_manager_store(self) -> str:
        """manager.store, or a directory in gear_root."""
        return self.manager.store or str(self.gear_root / "manager")


def documented() -> list[DocumentedSetting]:
    """List every setting in the order of its declaration.

    ``[DocumentedSetting(name="GEAR_STREAM_IDLE_S", default="900", unit="s", help="Seconds without …"), …]``
    """
    return document_settings(Settings)


def load_environment_file(environ: MutableMapping[str, str] = os.environ) -> str:
    """Add the variables of the systemd units' environment file to *environ*; those already there win.

    GEAR_ENVIRONMENT_FILE names the file; off reads none. Without it, the file is ENVIRONMENT_FILE if it exists, unless
    GEAR_ROOT or GEAR_RUN_DIR is set: then *environ* describes another stack than the units'.

    Returns:
        A notice if this user may not read ENVIRONMENT_FILE, which often contains tokens; else "".

    Raises:
        InvalidInput: The file that GEAR_ENVIRONMENT_FILE names does not exist, or a file cannot be read.
    """
    named = environ.get("GEAR_ENVIRONMENT_FILE", "")
    is_other_stack = environ.get("GEAR_ROOT") or environ.get("GEAR_RUN_DIR")
    if named == "off" or (is_other_stack and not named):
        return ""
    path = named or ENVIRONMENT_FILE
    try:
        text = Path(path).read_text()
    except (OSError, ValueError) as exc:
        if isinstance(exc, FileNotFoundError) and not named:
            return ""
        reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8"
        message = f"cannot read settings from {path}: {reason}"
        if isinstance(exc, PermissionError) and not named:
            return f"{message}; run `gear` as root to use them"
        raise InvalidInput(f"{message}; correct the file, or set GEAR_ENVIRONMENT_FILE=off") from exc
    for name, value in parse_environment(text).items():
        environ.setdefault(name, value)
    return ""


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Report each GEAR_ variable of *environ* that is not a setting, with the setting probably meant."""
    unknown = sorted(name for name in environ if name.startswith("GEAR_"))
    if not unknown:
        return []
    known = {one.name for one in documented()} | _OTHER_VARIABLES
    return [_describe_unknown(name, known) for name in unknown if name not in known]


def _describe_unknown(name: str, known: Collection[str]) -> str:
    likely = get_close_matches(name, known, n=1)
    return f"{name} is not a setting and has no effect" + (f"; did you mean {likely[0]}?" if likely else "")
