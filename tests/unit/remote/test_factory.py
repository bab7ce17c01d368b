"""Open the remote that the settings name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, InvalidInput
from gearworkers.remote.factory import open_remote, uses_nfs
from gearworkers.settings import RemoteSettings, Settings


def test_the_nfs_directory_of_a_node_caches_the_remote(tmp_path: Path) -> None:
    settings = replace(Settings(), gear_root=tmp_path / "gear", remote=RemoteSettings(url=str(tmp_path / "remote")))
    (settings.gear_nfs_path / "objects").mkdir(parents=True)
    (tmp_path / "remote").mkdir()
    assert uses_nfs(settings)
    remote = open_remote(settings)
    digest = hashlib.sha256(b"shared").digest()
    remote.put_many([(digest, b"shared")])
    (tmp_path / "remote" / "objects" / digest.hex()[:2] / digest.hex()).unlink()
    assert b"".join(remote.fetch(digest)) == b"shared"
    remote.close()


def test_an_empty_nfs_directory_is_not_in_use(tmp_path: Path) -> None:
    settings = replace(Settings(), gear_root=tmp_path)
    settings.gear_nfs_path.mkdir()
    assert not uses_nfs(settings)


@pytest.mark.parametrize("url", ["relative/path", "ftp://host", "s3://", "s3://bucket?colour=red"])
def test_a_remote_of_an_unknown_kind_is_rejected(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        open_remote(replace(Settings(), gear_root=tmp_path, remote=RemoteSettings(url=url)))


def test_the_error_without_a_remote_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="GEAR_REMOTE"):
        open_remote(replace(Settings(), gear_root=tmp_path))
