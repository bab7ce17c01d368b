"""Two ways to call the same driver: in this process, and over the plugin socket as dockerd does."""

from __future__ import annotations

import http.client
import io
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gearworkers.errors import GearError
from gearworkers.layers.idmap import IdRange
from gearworkers.settings import Settings
from gearworkers.tar.reader import Readable
from gearworkers.util.unix_http import UnixHTTPConnection
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.stack import Stack

Options = Mapping[str, str] | None

_TIMEOUT_S = 60.0
_CHUNK_BYTES = 1 << 16


class DriverError(Exception):
    """The driver returned an error; the text is the message that Docker shows."""


class Door(Protocol):
    """The calls of both front doors that fill and show layers; each raises DriverError on an error."""

    @property
    def settings(self) -> Settings:
        """The settings of the store."""

    def create(self, id: str, parent: str = "") -> None: ...

    def apply_diff(self, id: str, parent: str, source: bytes) -> int: ...

    def get(self, id: str) -> Path: ...

    def put(self, id: str) -> None: ...

    def remove(self, id: str) -> None: ...


class Driver(Protocol):
    """The calls of the plugin protocol; each raises DriverError if the driver returns an error."""

    @property
    def settings(self) -> Settings:
        """The settings of the driver."""

    def init(
        self, opts: Sequence[str] = (), uid_maps: Sequence[IdRange] = (), gid_maps: Sequence[IdRange] = ()
    ) -> None: ...

    def capabilities(self) -> dict[str, bool]: ...

    def create(self, id: str, parent: str = "", mount_label: str = "", storage_opt: Options = None) -> None: ...

    def create_read_write(
        self, id: str, parent: str = "", mount_label: str = "", storage_opt: Options = None
    ) -> None: ...

    def remove(self, id: str) -> None: ...

    def get(self, id: str, mount_label: str = "") -> Path: ...

    def put(self, id: str) -> None: ...

    def exists(self, id: str) -> bool: ...

    def status(self) -> dict[str, str]: ...

    def get_metadata(self, id: str) -> dict[str, str]: ...

    def cleanup(self) -> None: ...

    def diff(self, id: str, parent: str = "") -> bytes: ...

    def changes(self, id: str, parent: str = "") -> list[tuple[str, int]]: ...

    def apply_diff(self, id: str, parent: str, source: bytes | Readable) -> int: ...

    def diff_size(self, id: str, parent: str = "") -> int: ...

    def restart(self) -> None:
        """End the driver's process and start another one without an Init."""


def new_layer_id() -> str:
    """Return a new layer id in Docker's format."""
    return secrets.token_hex(32)


class InProcess:
    """Call GearDriver directly."""

    def __init__(self, settings: Settings) -> None:
        self._driver = GearDriver(settings)
        self._driver.prepare()

    @property
    def settings(self) -> Settings:
        return self._driver.settings

    def init(
        self, opts: Sequence[str] = (), uid_maps: Sequence[IdRange] = (), gid_maps: Sequence[IdRange] = ()
    ) -> None:
        self._call("init", "/unused", opts, uid_maps, gid_maps)

    def capabilities(self) -> dict[str, bool]:
        return dict(self._call("capabilities"))

    def create(self, id: str, parent: str = "", mount_label: str = "", storage_opt: Options = None) -> None:
        self._call("create", id, parent, mount_label, storage_opt)

    def create_read_write(self, id: str, parent: str = "", mount_label: str = "", storage_opt: Options = None) -> None:
        self._call("create_read_write", id, parent, mount_label, storage_opt)

    def remove(self, id: str) -> None:
        self._call("remove", id)

    def get(self, id: str, mount_label: str = "") -> Path:
        return Path(self._call("get", id, mount_label))

    def put(self, id: str) -> None:
        self._call("put", id)

    def exists(self, id: str) -> bool:
        return bool(self._call("exists", id))

    def status(self) -> dict[str, str]:
        return dict(self._call("status"))

    def get_metadata(self, id: str) -> dict[str, str]:
        return dict(self._call("get_metadata", id))

    def cleanup(self) -> None:
        self._call("cleanup")

    def diff(self, id: str, parent: str = "") -> bytes:
        out = io.BytesIO()
        self._call("diff", id, parent, out)
        return out.getvalue()

    def changes(self, id: str, parent: str = "") -> list[tuple[str, int]]:
        found = self._call("changes", id, parent)
        return [(change.path.decode("utf-8", "replace"), int(change.kind)) for change in found]

    def apply_diff(self, id: str, parent: str, source: bytes | Readable) -> int:
        readable = io.BytesIO(source) if isinstance(source, bytes) else source
        return int(self._call("apply_diff", id, parent, readable))

    def diff_size(self, id: str, parent: str = "") -> int:
        return int(self._call("diff_size", id, parent))

    def restart(self) -> None:
        self._driver = GearDriver(self.settings)
        self._driver.prepare()

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._driver, method)(*arguments)
        except GearError as exc:
            raise DriverError(str(exc)) from exc


class OverSocket:
    """Call the plugin socket with the HTTP framing that dockerd uses."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._settings = Settings.from_environ(stack.environ())

    @property
    def settings(self) -> Settings:
        return self._settings

    def init(
        self, opts: Sequence[str] = (), uid_maps: Sequence[IdRange] = (), gid_maps: Sequence[IdRange] = ()
    ) -> None:
        self._call("Init", Home="/unused", Opts=list(opts) or None, UIDMaps=_wire(uid_maps), GIDMaps=_wire(gid_maps))

    def capabilities(self) -> dict[str, bool]:
        return dict(self._call("Capabilities")["Capabilities"])

    def create(self, id: str, parent: str = "", mount_label: str = "", storage_opt: Options = None) -> None:
        self._call("Create", ID=id, Parent=parent, MountLabel=mount_label, StorageOpt=storage_opt)

    def create_read_write(self, id: str, parent: str = "", mount_label: str = "", storage_opt: Options = None) -> None:
        self._call("CreateReadWrite", ID=id, Parent=parent, MountLabel=mount_label, StorageOpt=storage_opt)

    def remove(self, id: str) -> None:
        self._call("Remove", ID=id)

    def get(self, id: str, mount_label: str = "") -> Path:
        return Path(self._call("Get", ID=id, MountLabel=mount_label)["Dir"])

    def put(self, id: str) -> None:
        self._call("Put", ID=id)

    def exists(self, id: str) -> bool:
        return bool(self._call("Exists", ID=id).get("Exists", False))

    def status(self) -> dict[str, str]:
        return dict(self._call("Status")["Status"])

    def get_metadata(self, id: str) -> dict[str, str]:
        return dict(self._call("GetMetadata", ID=id)["Metadata"])

    def cleanup(self) -> None:
        self._call("Cleanup")

    def diff(self, id: str, parent: str = "") -> bytes:
        answer, data = self._post("/GraphDriver.Diff", json.dumps({"ID": id, "Parent": parent}).encode())
        if answer.status != http.client.OK:
            raise DriverError(data.decode())
        return data

    def changes(self, id: str, parent: str = "") -> list[tuple[str, int]]:
        found = self._call("Changes", ID=id, Parent=parent).get("Changes")
        return [(change.get("Path", ""), change.get("Kind", 0)) for change in found or []]

    def apply_diff(self, id: str, parent: str, source: bytes | Readable) -> int:
        body = _chunks(io.BytesIO(source) if isinstance(source, bytes) else source)
        answer, data = self._post(f"/GraphDriver.ApplyDiff?id={id}&parent={parent}", body)
        return int(_checked(answer, data).get("Size", 0))

    def diff_size(self, id: str, parent: str = "") -> int:
        return int(self._call("DiffSize", ID=id, Parent=parent).get("Size", 0))

    def restart(self) -> None:
        self._stack.stop("gateway")
        self._stack.start("gateway")

    def _call(self, method: str, **arguments: object) -> Any:
        return _checked(*self._post(f"/GraphDriver.{method}", json.dumps(arguments).encode()))

    def _post(self, path: str, body: bytes | Iterator[bytes]) -> tuple[http.client.HTTPResponse, bytes]:
        connection = UnixHTTPConnection(self._settings.effective_plugin_socket, _TIMEOUT_S)
        chunked = not isinstance(body, bytes)
        headers = {
            "Host": "plugin.moby.localhost",
            "Accept": "application/vnd.docker.plugins.v1.2+json",
            "Content-Type": "application/json",
        }
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        try:
            try:
                connection.request("POST", path, body, headers, encode_chunked=chunked)
            except (BrokenPipeError, ConnectionResetError):
                pass  # rejected before the end of the body; read the response, as Go's client does
            answer = connection.getresponse()
            return answer, answer.read()
        except http.client.HTTPException as exc:
            raise DriverError(f"the connection broke: {exc!r}") from exc
        finally:
            connection.close()


def _checked(answer: http.client.HTTPResponse, data: bytes) -> Any:
    try:
        decoded = json.loads(data)
    except ValueError:
        raise DriverError(f"{answer.status}: {data.decode(errors='replace')}") from None
    if answer.status != http.client.OK or decoded.get("Err"):
        raise DriverError(decoded.get("Err") or f"{answer.status} without a message")
    return decoded  # a missing field has Go's zero value


def _chunks(source: Readable) -> Iterator[bytes]:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while size_bytes := source.readinto(buffer):
        yield bytes(buffer[:size_bytes])


def _wire(maps: Sequence[IdRange]) -> list[dict[str, int]] | None:
    return [{"container_id": span.container_id, "host_id": span.host_id, "size": span.size} for span in maps] or None
