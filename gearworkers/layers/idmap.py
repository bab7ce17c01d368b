"""User and group ids inside containers and on the host: what ``--userns-remap`` gives Init.

Source: moby pkg/idtools, ToHost and ToContainer: the first range that holds the id counts; no ranges, no change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from gearworkers.errors import GearError, InvalidInput
from gearworkers.util.writing import replace_file

_FILE = "id-maps.json"


class IDMap(msgspec.Struct, frozen=True):
    """A range: container_id + n is host_id + n on the host, for n below size."""

    container_id: int
    host_id: int
    size: int


def to_host(container_id: int, maps: Sequence[IDMap]) -> int:
    """The host's id for a container's; InvalidInput when no range holds it."""
    if not maps:
        return container_id
    for span in maps:
        if span.container_id <= container_id < span.container_id + span.size:
            return span.host_id + container_id - span.container_id
    raise InvalidInput(f"container id {container_id} is in none of the id ranges of userns-remap")


def to_container(host_id: int, maps: Sequence[IDMap]) -> int:
    """The container's id for a host's; InvalidInput when no range holds it."""
    if not maps:
        return host_id
    for span in maps:
        if span.host_id <= host_id < span.host_id + span.size:
            return span.container_id + host_id - span.host_id
    raise InvalidInput(f"host id {host_id} is in none of the id ranges of userns-remap")


class IdMaps(msgspec.Struct, frozen=True):
    """The ranges for users and for groups; none of them: ids are the same on both sides."""

    uids: tuple[IDMap, ...] = ()
    gids: tuple[IDMap, ...] = ()

    @property
    def root(self) -> tuple[int, int]:
        """(uid, gid) on the host of the container's root."""
        return self.to_host(0, 0)

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        """(uid, gid) on the host; InvalidInput when one is in no range."""
        return to_host(uid, self.uids), to_host(gid, self.gids)

    def to_container(self, uid: int, gid: int) -> tuple[int, int]:
        """(uid, gid) in the container; InvalidInput when one is in no range."""
        return to_container(uid, self.uids), to_container(gid, self.gids)

    def save(self, root: Path) -> None:
        """Keep them in GEAR_ROOT, for all processes of the node; replaced by one rename."""
        replace_file(root / _FILE, msgspec.json.encode(self), sync=False)  # dockerd names them at each start

    @classmethod
    def load(cls, root: Path) -> IdMaps:
        """What was saved last; none if nothing was.

        Raises:
            GearError: The file is damaged.
        """
        try:
            return msgspec.json.decode((root / _FILE).read_bytes(), type=cls)
        except FileNotFoundError:
            return cls()
        except msgspec.DecodeError as exc:
            raise GearError(f"{root / _FILE} is damaged ({exc}); restart dockerd") from exc
