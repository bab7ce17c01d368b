"""Start-up profiles: what a container opens while it starts, in that order; a document in the remote.

A profile is advice, and whoever wrote it is not trusted: it is bounded when it is read, and what it names is fetched
only if the image has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
import structlog
import zstandard

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import AlreadyExists, IntegrityError
from gearworkers.remote.remote import Remote

_log = structlog.get_logger(__name__)

MAX_OBJECTS = 10_000
MAX_RANGES = 1_024
"""Of one object."""

_FORMAT = 1
_MAX_PACKED_BYTES = 4 << 20
_MAX_BYTES = 32 << 20
_LEVEL = 9
_RACES = 5
_WORTH_SHARE = 0.1
_WORTH_BYTES = 1 << 20
_REQUEST_COST_BYTES = 64 << 10
_HEX_CHARS = 2 * DIGEST_BYTES

Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 60)]


class OpenedObject(msgspec.Struct, frozen=True, array_like=True):
    """An object that was opened."""

    digest: Annotated[str, msgspec.Meta(pattern=rf"^[0-9a-f]{{{_HEX_CHARS}}}\Z")]
    size_bytes: Number
    ranges: Annotated[tuple[tuple[Number, Number], ...], msgspec.Meta(max_length=MAX_RANGES)] = ()
    """Of a large object, (offset, size in bytes): what was read of it, as far as that is known."""


class Profile(msgspec.Struct, frozen=True):
    """What was opened, each once, the first first."""

    objects: Annotated[tuple[OpenedObject, ...], msgspec.Meta(max_length=MAX_OBJECTS)]
    format: Annotated[int, msgspec.Meta(ge=_FORMAT, le=_FORMAT)] = _FORMAT


def opened_object(digest: bytes, size_bytes: int, reads: Iterable[tuple[int, int]]) -> OpenedObject:
    """An object, and as much as a profile holds of what was read of it: (offset, size in bytes), in that order."""
    return OpenedObject(digest.hex(), size_bytes, tuple(joined_ranges(reads)[:MAX_RANGES]))


def pack(profile: Profile) -> bytes:
    """The document: JSON, zstd."""
    return zstandard.compress(msgspec.json.encode(profile), level=_LEVEL)


def unpack(data: bytes) -> Profile:
    """What `pack` made.

    Raises:
        IntegrityError: It is something else, or larger than any profile.
    """
    if len(data) > _MAX_PACKED_BYTES:
        raise IntegrityError(f"profile: {len(data)} bytes are more than any has")
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(data) as reader:
            raw = reader.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise IntegrityError(f"profile: it unpacks to more than {_MAX_BYTES} bytes")
        return msgspec.json.decode(raw, type=Profile)
    except (zstandard.ZstdError, ValueError) as exc:
        raise IntegrityError(f"profile: damaged ({exc})") from exc


def merged_profiles(old: Profile, new: Profile) -> Profile:
    """Both, what only the new one has behind the old one."""
    objects = {one.digest: one for one in old.objects}
    for one in new.objects:
        known = objects.get(one.digest)
        ranges = joined_ranges((*known.ranges, *one.ranges)) if known is not None else one.ranges
        objects[one.digest] = msgspec.structs.replace(one, ranges=tuple(ranges[:MAX_RANGES]))
    return Profile(tuple(objects.values())[:MAX_OBJECTS])


def joined_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes, each once and in that order; what touches an earlier range becomes part of it."""
    result: list[tuple[int, int]] = []
    for offset, size_bytes in ranges:
        end = offset + size_bytes
        for at, (start, length) in enumerate(result):
            if start <= end and offset <= start + length:
                start, end = min(start, offset), max(start + length, end)
                result[at] = (start, end - start)
                break
        else:
            result.append((offset, size_bytes))
    return result


def is_worth_adding(old: Profile, new: Profile) -> bool:
    """Whether a start by the old one alone would wait for so much of the new one that it is worth another version."""
    both = merged_profiles(old, new)
    return _wanted_bytes(both) - _wanted_bytes(old) > _wanted_bytes(old) * _WORTH_SHARE + _WORTH_BYTES


def _wanted_bytes(profile: Profile) -> int:
    """What is prefetched, and something for each object: a request costs as much as some kilobytes."""
    return sum(
        _REQUEST_COST_BYTES + (sum(size for _, size in one.ranges) if one.ranges else one.size_bytes)
        for one in profile.objects
    )


def save_profile(remote: Remote, name: str, profile: Profile, *, again: bool) -> bool:
    """Put *profile* beside what is there; whether that changed anything.

    Args:
        remote: Where profiles are kept.
        name: The document's.
        profile: What was recorded.
        again: Whether to add it to one that is there, rather than to leave that one alone.

    Raises:
        AlreadyExists: Others kept replacing it.
        GearError: What the remote says.
    """
    for _ in range(_RACES):
        found = remote.get_document(name)
        known = None if found is None else _readable(found.data)
        if known is not None and not again:
            return False
        wanted = profile if known is None else merged_profiles(known, profile)
        if wanted == known:
            return False
        try:
            remote.replace_document(name, pack(wanted), found.version if found is not None else 0)
            return True
        except AlreadyExists:
            continue
    raise AlreadyExists(f"document {name}: others kept replacing it")


def _readable(data: bytes) -> Profile | None:
    """None for what is damaged, and may be replaced."""
    try:
        return unpack(data)
    except IntegrityError as exc:
        _log.warning("a profile is not what it should be", error=str(exc))
        return None
