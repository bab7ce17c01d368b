"""Map user and group ids between containers and the host.

Init receives the ranges of ``--userns-remap``. containerd names ranges for each snapshot of a container in a user
namespace.

Source: moby pkg/idtools, ToHost and ToContainer: the first range that contains the id applies; without ranges ids are
unchanged. user_namespaces(7) for the kernel's format and limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from gearworkers.errors import GearError, InvalidInput
from gearworkers.mounts.idmapped import MappedTree, OwnerMap
from gearworkers.util.writing import replace_file

_FILE = "id-maps.json"
_MAX_RANGES = 340
_MAX_ID = (1 << 32) - 1
"""The kernel's invalid id, which no range contains."""


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

    def __bool__(self) -> bool:
        """Whether there are ranges."""
        return bool(self.uids or self.gids)

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

    @property
    def inverse(self) -> IdMaps:
        """The maps from the host's ids to the container's."""
        return IdMaps(_inverse(self.uids), _inverse(self.gids))

    def after(self, first: IdMaps) -> IdMaps:
        """Return the maps that have the effect of *first*, followed by these."""
        return IdMaps(_composed(first.uids, self.uids), _composed(first.gids, self.gids))

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


NO_MAPS = IdMaps()


def parse_ranges(text: str) -> tuple[IdRange, ...]:
    """Return the ranges of text such as ``0:100000:65536,65536:300000:10``: CONTAINER:HOST:SIZE.

    Raises:
        InvalidInput: The text is malformed, or ranges overlap.

    Source: containerd's internal/userns, "IdRange.Unmarshal".
    """
    ranges = tuple(map(_parsed_range, text.split(",")))
    if len(ranges) > _MAX_RANGES:
        raise InvalidInput(f"{len(ranges)} id ranges exceed the kernel's limit of {_MAX_RANGES}")
    if _overlap(ranges) or _overlap(_inverse(ranges)):
        raise InvalidInput(f"the id ranges {text} overlap")
    return ranges


def shown_tree(lower: Path, stored: IdMaps, shown: IdMaps) -> Path | MappedTree:
    """Return a layer's tree for an overlay.

    Args:
        lower: The tree.
        stored: Maps a container's ids to the owners of the tree's files.
        shown: Maps a container's ids to the owners that the overlay shows.
    """
    if stored == shown:
        return lower
    maps = shown.after(stored.inverse)
    return MappedTree(lower, OwnerMap(_kernel_text(maps.uids), _kernel_text(maps.gids)))


def _parsed_range(text: str) -> IdRange:
    numbers = text.split(":")
    if len(numbers) != 3 or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise InvalidInput(f"{text[:80]!r} is not an id range: use CONTAINER:HOST:SIZE")
    container_id, host_id, size = map(int, numbers)
    if not size or max(container_id, host_id) + size > _MAX_ID:
        raise InvalidInput(f"id range {text}: ids are below {_MAX_ID}, and the size is at least 1")
    return IdRange(container_id, host_id, size)


def _overlap(ranges: Sequence[IdRange]) -> bool:
    spans = sorted((span.container_id, span.size) for span in ranges)
    return any(start + size > following for (start, size), (following, _) in pairwise(spans))


def _inverse(maps: Sequence[IdRange]) -> tuple[IdRange, ...]:
    return tuple(IdRange(span.host_id, span.container_id, span.size) for span in maps)


def _composed(first: tuple[IdRange, ...], then: tuple[IdRange, ...]) -> tuple[IdRange, ...]:
    if not first or not then:
        return first or then
    found = []
    for one in first:
        for two in then:
            start = max(one.host_id, two.container_id)
            size = min(one.host_id + one.size, two.container_id + two.size) - start
            if size > 0:
                from_start = one.container_id + start - one.host_id
                found.append(IdRange(from_start, two.host_id + start - two.container_id, size))
    return tuple(found)


def _kernel_text(maps: Sequence[IdRange]) -> bytes:
    spans = maps or (IdRange(0, 0, _MAX_ID),)
    return b"".join(b"%d %d %d\n" % (span.container_id, span.host_id, span.size) for span in spans)
