"""Profile documents: validation, merging, and concurrent writes of two nodes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import zstandard

from gearworkers.errors import AlreadyExists, IntegrityError
from gearworkers.profiles import document
from gearworkers.profiles.document import MAX_OBJECTS, MAX_RANGES, OpenedObject, Profile
from gearworkers.remote.factory import open_remote
from gearworkers.remote.remote import Remote
from gearworkers.settings import RemoteSettings, Settings

A, B, C = (letter * 64 for letter in "abc")
NAME = "profiles/" + "0" * 64


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    (tmp_path / "remote").mkdir()
    return open_remote(Settings(gear_root=tmp_path, remote=RemoteSettings(url=str(tmp_path / "remote"))))


def packed(document: object) -> bytes:
    return zstandard.compress(msgspec.json.encode(document))


def test_a_profile_is_read_as_written() -> None:
    one = Profile((OpenedObject(A, 5), OpenedObject(B, 1 << 30, ((4096, 100), (0, 1)))))
    assert document.unpack(document.pack(one)) == one


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no zstd",
        zstandard.compress(b"{}"),
        zstandard.compress(b"\xff\xfe"),
        packed({"format": 2, "objects": []}),
        packed({"objects": [["../../etc/passwd", 1, []]]}),
        packed({"objects": [[A + "\n", 1, []]]}),
        packed({"objects": [[A[:-1] + "\n", 1, []]]}),
        packed({"objects": [[A, -1, []]]}),
        packed({"objects": [[A, 1, [[-1, 5]]]]}),
        packed({"objects": [[A, 1 << 62, []]]}),
        packed({"objects": [[A, 1, [[0, 1]] * (MAX_RANGES + 1)]]}),
        packed({"objects": [[A, 1, []]] * (MAX_OBJECTS + 1)}),
        zstandard.compress(b" " * (40 << 20)),
        bytes(5 << 20),
    ],
)
def test_malformed_profiles_are_rejected(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        document.unpack(data)


def test_merged_profiles_keep_the_order_of_the_first_and_join_ranges() -> None:
    old = Profile((OpenedObject(A, 5), OpenedObject(B, 100_000, ((0, 10), (50, 10)))))
    new = Profile((OpenedObject(C, 7), OpenedObject(B, 100_000, ((10, 5), (90, 1))), OpenedObject(A, 5)))
    assert document.merged_profiles(old, new) == Profile(
        (OpenedObject(A, 5), OpenedObject(B, 100_000, ((0, 15), (50, 10), (90, 1))), OpenedObject(C, 7))
    )
    assert document.merged_profiles(old, old) == old


def test_adjacent_ranges_are_joined() -> None:
    assert document.joined_ranges([(10, 5), (0, 10), (100, 1), (12, 1)]) == [(0, 15), (100, 1)]


def test_the_first_profile_is_kept_unless_it_is_extended(remote: Remote) -> None:
    assert document.save_profile(remote, NAME, Profile((OpenedObject(A, 1),)), extend=False)
    assert not document.save_profile(remote, NAME, Profile((OpenedObject(B, 2),)), extend=False)
    assert document.save_profile(remote, NAME, Profile((OpenedObject(B, 2),)), extend=True)
    assert not document.save_profile(remote, NAME, Profile((OpenedObject(B, 2),)), extend=True)
    data = remote.document(NAME)
    assert data is not None
    assert document.unpack(data) == Profile((OpenedObject(A, 1), OpenedObject(B, 2)))


def test_a_damaged_profile_is_replaced(remote: Remote) -> None:
    remote.put_document(NAME, b"damaged")
    assert document.save_profile(remote, NAME, Profile((OpenedObject(A, 1),)), extend=False)
    data = remote.document(NAME)
    assert data is not None
    assert document.unpack(data) == Profile((OpenedObject(A, 1),))


def test_profiles_recorded_at_the_same_time_are_merged(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = remote.replace_document

    def late(name: str, data: bytes, version: int) -> None:
        monkeypatch.setattr(remote, "replace_document", replace)
        replace(name, document.pack(Profile((OpenedObject(B, 2),))), version)
        raise AlreadyExists("another node was faster")

    monkeypatch.setattr(remote, "replace_document", late)
    assert document.save_profile(remote, NAME, Profile((OpenedObject(A, 1),)), extend=True)
    data = remote.document(NAME)
    assert data is not None
    assert {opened.digest for opened in document.unpack(data).objects} == {A, B}
