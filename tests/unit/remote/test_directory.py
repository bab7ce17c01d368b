"""Store blobs in a directory."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, GearError, IntegrityError, NotFound, ResourceExhausted, Unavailable
from gearworkers.remote.directory import DirectoryStore
from gearworkers.remote.remote import Remote


def test_put_blobs_leave_nothing_in_staging(tmp_path: Path) -> None:
    """The store reads nothing from staging, where a crash leaves its files."""
    remote = Remote(DirectoryStore(tmp_path))
    remote.put_many([(hashlib.sha256(b"%d" % number).digest(), b"%d" % number) for number in range(20)])
    assert {path.parts[len(tmp_path.parts)] for path in tmp_path.rglob("*") if path.is_file()} == {"objects"}


def test_files_of_crashed_writers_are_removed_after_a_day(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    for name in ("old", "new"):
        (staging / name).write_bytes(b"half")
    os.utime(staging / "old", (1, 1))
    Remote(DirectoryStore(tmp_path)).put_many([(hashlib.sha256(b"x").digest(), b"x")])
    assert [path.name for path in staging.iterdir()] == ["new"]


def test_a_damaged_file_is_rejected(tmp_path: Path) -> None:
    remote = Remote(DirectoryStore(tmp_path))
    digest = hashlib.sha256(b"content").digest()
    remote.put_many([(digest, b"content")])
    path = tmp_path / "objects" / digest.hex()[:2] / digest.hex()
    for damage in (b"", b"R", b"Rcontenu", b"Z\x28\xb5\x2f\xfd", b"L123", b"?", path.read_bytes()[:-1]):
        path.write_bytes(damage)
        with pytest.raises(IntegrityError):
            list(remote.fetch(digest))


def test_an_unusable_directory_is_not_a_missing_object(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(GearError) as raised:
        DirectoryStore(tmp_path / "file").get(bytes(32))
    assert not isinstance(raised.value, NotFound)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ESTALE, Unavailable),
        (errno.EIO, Unavailable),
        (errno.ETIMEDOUT, Unavailable),
        (errno.ENOSPC, ResourceExhausted),
        (errno.EDQUOT, ResourceExhausted),
        (errno.EROFS, FailedPrecondition),
    ],
)
def test_errors_of_the_kernel_are_translated(
    number: int, kind: type[GearError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched, pytest.raises(kind, match=os.strerror(number)):
        patched.setattr(os, "write", fail)
        DirectoryStore(tmp_path).put_many([(bytes(32), b"R")])
