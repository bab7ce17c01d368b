"""The document of a start-up profile: the objects that a container opens while it starts, in that order.

The document is JSON, compressed with zstd, in the remote. A profile is advice from an untrusted author: `unpack` limits
its size, and an object is fetched only if the image's own lists contain it.
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
"""Limit of ranges per object."""

_FORMAT = 1
_MAX_PACKED_BYTES = 4 << 20
_MAX_BYTES = 32 << 20
_LEVEL = 9
_ATTEMPTS = 5
_GROWTH_SHARE = 0.1
_GROWTH_BYTES = 1 << 20
_REQUEST_COST_BYTES = 64 << 10
_HEX_CHARS = 2 * DIGEST_BYTES

Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 60)]


class OpenedObject(msgspec.Struct, frozen=True, array_like=True):
    """An opened object."""

    digest: Annotated[str, msgspec.Meta(pattern=rf"^[0-9a-f]{{{_HEX_CHARS}}}\Z")]
    size_bytes: Number
    ranges: Annotated[tuple[tuple[Number, Number], ...], msgspec.Meta(max_length=MAX_RANGES)] = ()
    """(offset, size in bytes) of the known reads of a large object."""


class Profile(msgspec.Struct, frozen=True):
    """The opened objects, each once, in the order of the first open."""

    objects: Annotated[tuple[OpenedObject, ...], msgspec.Meta(max_length=MAX_OBJECTS)]
    format: Annotated[int, msgspec.Meta(ge=_FORMAT, le=_FORMAT)] = _FORMAT


def opened_object(digest: bytes, size_bytes: int, reads: Iterable[tuple[int, int]]) -> OpenedObject:
    """Return an opened object with its reads, (offset, size in bytes) in order, up to the limit of ranges."""
    return OpenedObject(digest.hex(), size_bytes, tuple(joined_ranges(reads)[:MAX_RANGES]))


def pack(profile: Profile) -> bytes:
    """Return the document of a profile."""
    return zstandard.compress(msgspec.json.encode(profile), level=_LEVEL)


def unpack(data: bytes) -> Profile:
    """Return the profile in a document.

    Raises:
        IntegrityError: The document is damaged, malformed or too large.
    """
    if len(data) > _MAX_PACKED_BYTES:
        raise IntegrityError(f"a profile of {len(data)} bytes exceeds the limit of {_MAX_PACKED_BYTES}")
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(data) as reader:
            raw = reader.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise IntegrityError(f"a profile unpacks to more than {_MAX_BYTES} bytes")
        return msgspec.json.decode(raw, type=Profile)
    except (zstandard.ZstdError, ValueError) as exc:
        raise IntegrityError(f"a profile is damaged: {exc}") from exc


def merged_profiles(old: Profile, new: Profile) -> Profile:
    """Return the union of two profiles: the old objects, then the objects that only the new profile has."""
    objects = {one.digest: one for one in old.objects}
    for one in new.objects:
        known = objects.get(one.digest)
        ranges = joined_ranges((*known.ranges, *one.ranges)) if known is not None else one.ranges
        objects[one.digest] = msgspec.structs.replace(one, ranges=tuple(ranges[:MAX_RANGES]))
    return Profile(tuple(objects.values())[:MAX_OBJECTS])


def joined_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges in the same order; a range that overlaps or touches an earlier range is merged into it."""
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
    """Whether the new profile adds enough bytes to the old profile to justify a new version."""
    both = merged_profiles(old, new)
    return _cost_bytes(both) - _cost_bytes(old) > _cost_bytes(old) * _GROWTH_SHARE + _GROWTH_BYTES


def _cost_bytes(profile: Profile) -> int:
    """Return the prefetched bytes, plus a constant per object for its request."""
    return sum(
        _REQUEST_COST_BYTES + (sum(size for _, size in one.ranges) if one.ranges else one.size_bytes)
        for one in profile.objects
    )


def save_profile(remote: Remote, name: str, profile: Profile, *, extend: bool) -> bool:
    """Save *profile* in the remote; return whether the document changed.

    Args:
        remote: Stores the document.
        name: The document's name.
        profile: The recorded profile.
        extend: Whether to extend an existing profile. If not, an existing profile stays unchanged.

    Raises:
        AlreadyExists: Other nodes kept replacing the document.
        GearError: The remote refuses.
    """
    for _ in range(_ATTEMPTS):
        found = remote.get_document(name)
        known = None if found is None else _readable(found.data)
        if known is not None and not extend:
            return False
        merged = profile if known is None else merged_profiles(known, profile)
        if merged == known:
            return False
        try:
            remote.replace_document(name, pack(merged), found.version if found is not None else 0)
            return True
        except AlreadyExists:
            continue
    raise AlreadyExists(f"cannot save document {name}: other nodes kept replacing it")


def _readable(data: bytes) -> Profile | None:
    """Return the profile in a document; None if it is damaged and may be replaced."""
    try:
        return unpack(data)
    except IntegrityError as exc:
        _log.warning("a profile is damaged", error=str(exc))
        return None
