"""Where things lie and how they are tuned; the only module that reads the environment."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from gearworkers.errors import InvalidInput

Number = TypeVar("Number", int, float)

DEFAULT_ROOT = Path("/var/lib/gear")
DEFAULT_RUN_DIR = Path("/run/gear")
DEFAULT_PLUGIN_SOCKET = Path("/run/docker/plugins/gear.sock")
DEFAULT_LARGE_OBJECT_BYTES = 2 << 20
DEFAULT_FETCH_THREADS = 32
DEFAULT_FILL_DELAY_S = 10.0
DEFAULT_PROFILE_WINDOW_S = 30.0
DEFAULT_REMOTE_TIMEOUT_S = 60.0
DEFAULT_MANAGER_LISTEN = "127.0.0.1:2019"
DEFAULT_MOST_OBJECT_BYTES = 64 << 30
DEFAULT_CLIENT_TIMEOUT_S = 30.0
DEFAULT_STREAM_IDLE_S = 900.0
DEFAULT_DOCKER_HOST = "unix:///var/run/docker.sock"
XINO = ("off", "on")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("console", "json")


@dataclass(frozen=True, slots=True)
class Settings:
    """One node's settings; immutable, passed to whoever needs it.

    The `gear_*_path` names are the Gear driver's own (GearPublicCachePath, GearImagesPath, …).
    """

    gear_root: Path = DEFAULT_ROOT
    run_dir: Path = DEFAULT_RUN_DIR
    plugin_socket: Path = DEFAULT_PLUGIN_SOCKET
    broker_url: str = ""
    """Empty: the Unix socket redis.sock in run_dir, database 0."""
    remote: str = ""
    """Where objects are kept for all nodes: a directory, s3://BUCKET/PREFIX?…, a manager's URL; empty for nowhere."""
    remote_token: str = ""
    """What the manager is shown; `remote_token_file` goes before it."""
    remote_token_file: Path | None = None
    """Read again for each request, so that a token can be replaced."""
    remote_ca_file: Path | None = None
    """The CA of the manager's certificate; None for the system's trust."""
    remote_timeout_s: float = DEFAULT_REMOTE_TIMEOUT_S
    """What a remote may take to answer, all attempts together; a file system that hangs is given up after it."""
    aws_credentials_file: Path = field(default_factory=lambda: _home() / ".aws" / "credentials")
    aws_profile: str = "default"
    manager_listen: str = DEFAULT_MANAGER_LISTEN
    """host:port of `gear manager`."""
    manager_store: str = ""
    """Where the manager keeps what it is given: a directory or s3://…; empty: manager/ in gear_root."""
    manager_read_tokens_file: Path | None = None
    """Tokens that may read, one a line; read again when it changes."""
    manager_write_tokens_file: Path | None = None
    """Tokens that may also write."""
    manager_tls_cert_file: Path | None = None
    manager_tls_key_file: Path | None = None
    manager_most_object_bytes: int = DEFAULT_MOST_OBJECT_BYTES
    """The largest object that the manager takes."""
    manager_client_timeout_s: float = DEFAULT_CLIENT_TIMEOUT_S
    """A client that sends or takes nothing for so long is dropped."""
    xino: bool = False
    """Mount containers with overlay's xino=on: all files have one st_dev, and inode numbers exceed 2^53."""
    node: str = field(default_factory=socket.gethostname)
    metrics_listen: str = ""
    """Where the gateway's metrics are read: host:port or the path of a Unix socket; empty: metrics.sock in run_dir."""
    stream_idle_s: float = DEFAULT_STREAM_IDLE_S
    """Seconds in which a caller of ApplyDiff sends nothing, or one of Diff takes nothing, before the call fails."""
    large_object_bytes: int = DEFAULT_LARGE_OBJECT_BYTES
    """From this size on an object that a container opens is served in parts while it arrives.

    The C library is smaller: all programs open it, so it is worth to have it where no server is asked.
    """
    fetch_threads: int = DEFAULT_FETCH_THREADS
    """How many requests to the remote the lazy file server has under way at most."""
    fill_delay_s: float = DEFAULT_FILL_DELAY_S
    """So long after its last read the rest of a large object is fetched behind."""
    profile_window_s: float = DEFAULT_PROFILE_WINDOW_S
    """So long the first container of an image is watched, for the profile of its start; 0 for never."""
    docker_host: str = DEFAULT_DOCKER_HOST
    """The dockerd that `gear` asks about images: unix:///PATH or tcp://HOST:PORT."""
    docker_config: Path = field(default_factory=lambda: _home() / ".docker")
    """Where Docker's clients keep the credentials for registries: the directory of config.json."""
    https_proxy: str = ""
    """URL of the proxy on the way to registries; empty for none."""
    no_proxy: str = ""
    """Hosts and domains, with commas between, that the proxy is not asked for."""
    notify_socket: str = ""
    """Where systemd waits to be told that a process is ready; empty: nowhere."""
    log_level: str = "info"
    log_format: str = "console"
    """``console`` or ``json``."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read GEAR_ROOT, GEAR_RUN_DIR, GEAR_PLUGIN_SOCKET, GEAR_BROKER_URL, GEAR_REMOTE, GEAR_NODE,
        GEAR_METRICS_LISTEN, GEAR_STREAM_IDLE_S, GEAR_LARGE_OBJECT_BYTES, GEAR_FETCH_THREADS, GEAR_FILL_DELAY_S,
        GEAR_PROFILE_WINDOW_S, GEAR_REMOTE_TOKEN, GEAR_REMOTE_TOKEN_FILE, GEAR_REMOTE_CA_FILE, GEAR_REMOTE_TIMEOUT_S,
        GEAR_MANAGER_LISTEN, GEAR_MANAGER_STORE, GEAR_MANAGER_READ_TOKENS_FILE, GEAR_MANAGER_WRITE_TOKENS_FILE,
        GEAR_MANAGER_TLS_CERT_FILE, GEAR_MANAGER_TLS_KEY_FILE, GEAR_MANAGER_MOST_OBJECT_BYTES,
        GEAR_MANAGER_CLIENT_TIMEOUT_S, GEAR_XINO, GEAR_LOG_LEVEL and GEAR_LOG_FORMAT; of others'
        AWS_SHARED_CREDENTIALS_FILE, AWS_PROFILE, DOCKER_HOST, DOCKER_CONFIG, HTTPS_PROXY and NO_PROXY. One that is
        empty is as one that is not there.

        Raises:
            InvalidInput: A path is not absolute, a number not positive, a word not one of its setting's.
        """
        return cls(
            gear_root=_absolute(environ, "GEAR_ROOT", DEFAULT_ROOT),
            run_dir=_absolute(environ, "GEAR_RUN_DIR", DEFAULT_RUN_DIR),
            plugin_socket=_absolute(environ, "GEAR_PLUGIN_SOCKET", DEFAULT_PLUGIN_SOCKET),
            broker_url=environ.get("GEAR_BROKER_URL", ""),
            remote=environ.get("GEAR_REMOTE", ""),
            remote_token=environ.get("GEAR_REMOTE_TOKEN", ""),
            remote_token_file=_optional(environ, "GEAR_REMOTE_TOKEN_FILE"),
            remote_ca_file=_optional(environ, "GEAR_REMOTE_CA_FILE"),
            remote_timeout_s=_number(environ, "GEAR_REMOTE_TIMEOUT_S", DEFAULT_REMOTE_TIMEOUT_S),
            aws_credentials_file=_absolute(environ, "AWS_SHARED_CREDENTIALS_FILE", _home() / ".aws" / "credentials"),
            aws_profile=environ.get("AWS_PROFILE") or "default",
            manager_listen=environ.get("GEAR_MANAGER_LISTEN") or DEFAULT_MANAGER_LISTEN,
            manager_store=environ.get("GEAR_MANAGER_STORE", ""),
            manager_read_tokens_file=_optional(environ, "GEAR_MANAGER_READ_TOKENS_FILE"),
            manager_write_tokens_file=_optional(environ, "GEAR_MANAGER_WRITE_TOKENS_FILE"),
            manager_tls_cert_file=_optional(environ, "GEAR_MANAGER_TLS_CERT_FILE"),
            manager_tls_key_file=_optional(environ, "GEAR_MANAGER_TLS_KEY_FILE"),
            manager_most_object_bytes=_number(environ, "GEAR_MANAGER_MOST_OBJECT_BYTES", DEFAULT_MOST_OBJECT_BYTES),
            manager_client_timeout_s=_number(environ, "GEAR_MANAGER_CLIENT_TIMEOUT_S", DEFAULT_CLIENT_TIMEOUT_S),
            stream_idle_s=_number(environ, "GEAR_STREAM_IDLE_S", DEFAULT_STREAM_IDLE_S),
            large_object_bytes=_number(environ, "GEAR_LARGE_OBJECT_BYTES", DEFAULT_LARGE_OBJECT_BYTES),
            fetch_threads=_number(environ, "GEAR_FETCH_THREADS", DEFAULT_FETCH_THREADS),
            fill_delay_s=_number(environ, "GEAR_FILL_DELAY_S", DEFAULT_FILL_DELAY_S),
            profile_window_s=_number(environ, "GEAR_PROFILE_WINDOW_S", DEFAULT_PROFILE_WINDOW_S, or_zero=True),
            xino=_one_of(environ, "GEAR_XINO", XINO, "off") == "on",
            node=environ.get("GEAR_NODE") or socket.gethostname(),
            metrics_listen=environ.get("GEAR_METRICS_LISTEN", ""),
            docker_host=environ.get("DOCKER_HOST") or DEFAULT_DOCKER_HOST,
            docker_config=_absolute(environ, "DOCKER_CONFIG", _home() / ".docker"),
            https_proxy=environ.get("HTTPS_PROXY") or environ.get("https_proxy", ""),
            no_proxy=environ.get("NO_PROXY") or environ.get("no_proxy", ""),
            notify_socket=environ.get("NOTIFY_SOCKET", ""),
            log_level=_one_of(environ, "GEAR_LOG_LEVEL", LOG_LEVELS, "info"),
            log_format=_one_of(environ, "GEAR_LOG_FORMAT", LOG_FORMATS, "console"),
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
        """Where a shared store may be mounted: a second cache level behind public/."""
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
        """Staging; what lies here at start-up is a crash's leftover."""
        return self.gear_root / "build"

    @property
    def gear_push_path(self) -> Path:
        """The durable spool of objects awaiting push."""
        return self.gear_root / "push"

    @property
    def gear_converting_path(self) -> Path:
        """Files without names, of layers that are being converted: on disk, where a system's /tmp may be memory."""
        return self.gear_root / "converting"

    @property
    def gear_remotes_path(self) -> Path:
        """Which directories this node knows to hold a remote."""
        return self.gear_root / "remotes"

    @property
    def gear_pins_path(self) -> Path:
        """Images whose objects are kept, and fetched if they are missing."""
        return self.gear_root / "pins"

    @property
    def gear_arrivals_path(self) -> Path:
        """Links to objects that arrived while incomplete layers were mounted."""
        return self.gear_root / "arrivals"

    @property
    def gear_fetching_path(self) -> Path:
        """Objects on their way."""
        return self.gear_root / "fetching"

    @property
    def gateway_lock(self) -> Path:
        """Held by the one gateway of gear_root."""
        return self.gear_root / "gateway.lock"

    @property
    def lazy_mount_path(self) -> Path:
        """Where the lazy file system is mounted."""
        return self.run_dir / "lazy"

    @property
    def lazyfs_socket(self) -> Path:
        """Where the lazy file server tells its status and takes orders to prefetch."""
        return self.run_dir / "lazyfs.sock"

    @property
    def lazyfs_keeper_socket(self) -> Path:
        """Where the lazy file system's descriptor is kept."""
        return self.run_dir / "lazyfs-keeper.sock"

    @property
    def old_numbers_path(self) -> Path:
        """An empty file per mounted layer whose indexes share inode numbers with others."""
        return self.run_dir / "old-inode-numbers"

    @property
    def streams_socket(self) -> Path:
        """Where the gateway meets whoever does an ApplyDiff or a Diff."""
        return self.run_dir / "streams.sock"

    @property
    def effective_manager_store(self) -> str:
        """manager_store, or a directory in gear_root."""
        return self.manager_store or str(self.gear_root / "manager")

    @property
    def effective_metrics_listen(self) -> str:
        """metrics_listen, or the socket in run_dir."""
        return self.metrics_listen or str(self.run_dir / "metrics.sock")

    @property
    def effective_broker_url(self) -> str:
        """broker_url, or the Redis socket in run_dir."""
        return self.broker_url or f"redis+socket://{self.run_dir}/redis.sock?virtual_host=0"


def _home() -> Path:
    """The user's home; the root of all for a user who has none."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def _absolute(environ: Mapping[str, str], name: str, default: Path) -> Path:
    value = environ.get(name)
    if not value:
        return default
    path = Path(value)
    if not path.is_absolute():
        raise InvalidInput(f"{name}={value}: an absolute path is needed")
    return path


def _optional(environ: Mapping[str, str], name: str) -> Path | None:
    return _absolute(environ, name, Path()) if environ.get(name) else None


def _number(environ: Mapping[str, str], name: str, default: Number, *, or_zero: bool = False) -> Number:
    """A positive number of the default's type."""
    value = environ.get(name)
    if not value:
        return default
    try:
        number = type(default)(value)
    except ValueError:
        number = type(default)(-1)
    if not (number > 0 or (or_zero and number == 0)):
        raise InvalidInput(f"{name}={value}: a number {'of at least' if or_zero else 'above'} 0 is needed")
    return number


def _one_of(environ: Mapping[str, str], name: str, choices: tuple[str, ...], default: str) -> str:
    value = environ.get(name) or default
    if value not in choices:
        raise InvalidInput(f"{name}={value}: one of {', '.join(choices)} is needed")
    return value
