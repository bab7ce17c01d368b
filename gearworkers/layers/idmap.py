"""Map user and group ids between containers and the host: the ranges of ``--userns-remap``, which Init receives.

Source: moby pkg/idtools, ToHost and ToContainer: the first range that contains the id applies; without ranges ids are
unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from gearworkers.errors import GearError, InvalidInput
from gearworkers.util.writing import replace_file

_FILE = "id-maps.json"


class IdRange(msgspec.Struct, frozen=True):
    """A range: the id container_id + n is host_id + n on the host, for n below size."""

    container_id: int
    host_id: int
    size: int


def to_host(container_id: int, maps: Sequence[IdRange]) -> int:
    """Return the host's id of a container's id; InvalidInput if no range contains it."""
    if not maps:
        return container_id
    for span in maps:
        if span.container_id <= container_id < span.container_id + span.size:
            return span.host_id + container_id - span.container_id
    raise InvalidInput(f"container id {container_id} is outside the id ranges of userns-remap")


def to_container(host_id: int, maps: Sequence[IdRange]) -> int:
    """Return the container's id of a host's id; InvalidInput if no range contains it."""
    if not maps:
        return host_id
    for span in maps:
        if span.host_id <= host_id < span.host_id + span.size:
            return span.container_id + host_id - span.host_id
    raise InvalidInput(f"host id {host_id} is outside the id ranges of userns-remap")


class IdMaps(msgspec.Struct, frozen=True):
    """The ranges for users and groups. Without ranges ids are the same in containers and on the host."""

    uids: tuple[IdRange, ...] = ()
    gids: tuple[IdRange, ...] = ()

    @property
    def root(self) -> tuple[int, int]:
        """The (uid, gid) on the host of the container's root."""
        return self.to_host(0, 0)

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        """Return (uid, gid) on the host; InvalidInput if no range contains one of them."""
        return to_host(uid, self.uids), to_host(gid, self.gids)

    def to_container(self, uid: int, gid: int) -> tuple[int, int]:
        """Return (uid, gid) in the container; InvalidInput if no range contains one of them."""
        return to_container(uid, self.uids), to_container(gid, self.gids)

    def save(self, root: Path) -> None:
        """Store the maps in GEAR_ROOT for all processes of the node; replace the file by one rename."""
        replace_file(root / _FILE, msgspec.json.encode(self), sync=False)  # dockerd passes the maps at each start

    @classmethod
    def load(cls, root: Path) -> IdMaps:
        """Return the stored maps; empty maps if none are stored.

        Raises:
            GearError: The file is damaged.
        """
        try:
            return msgspec.json.decode((root / _FILE).read_bytes(), type=cls)
        except FileNotFoundError:
            return cls()
        except msgspec.DecodeError as exc:
            raise GearError(f"{root / _FILE} is damaged ({exc}); restart dockerd") from exc
