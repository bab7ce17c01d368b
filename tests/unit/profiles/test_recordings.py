"""Recordings that cannot begin or do not end, which no container and no gateway may be held up by."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import queue
import subprocess
import threading
from pathlib import Path

import pytest

from gearworkers.cas.refs import OBJECTS_FILE, REF_RECORD
from gearworkers.digest import REDIRECT_XATTR, object_path
from gearworkers.layers.object_list import ObjectList
from gearworkers.profiles import recorder
from gearworkers.profiles import recordings as recordings_module
from gearworkers.profiles.recordings import Recording, Recordings
from gearworkers.profiles.resolve import ObjectResolver
from gearworkers.settings import Settings
from tests.support.lazynode import until


def test_a_recording_without_descriptors_left_is_left_out_and_leaves_none_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left() -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(recordings_module, "watch_opens", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(os, "pipe", none_left)
    before = os.listdir("/proc/self/fd")
    Recordings().begin("c1", Recording(Settings(), "image", tmp_path))
    assert os.listdir("/proc/self/fd") == before


def under_way() -> int:
    """How many recordings this process has."""
    return [thread.name for thread in threading.enumerate()].count("recording")


def test_recordings_whose_containers_have_ended_count_until_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: queue.Queue[str] = queue.Queue()
    kept = threading.Event()

    def slow_remote(recording: Recording, group_fd: int, stop_fd: int) -> None:
        begun.put(recording.image)
        assert kept.wait(20)

    until(lambda: not under_way(), "those of other tests are over")
    recordings = Recordings()
    monkeypatch.setattr(recordings_module, "watch_opens", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(recordings_module, "_is_used", lambda *_: True)
    monkeypatch.setattr(recordings_module, "_is_known", lambda _: False)
    monkeypatch.setattr(recordings, "_record", slow_remote)
    for number in range(recordings_module._MAX_AT_ONCE + 1):
        recordings.begin("c1", Recording(Settings(), f"image{number}", tmp_path))
        recordings.end("c1")
    assert {begun.get(timeout=20) for _ in range(recordings_module._MAX_AT_ONCE)} == {
        "image0",
        "image1",
        "image2",
        "image3",
    }
    assert under_way() == recordings_module._MAX_AT_ONCE
    kept.set()
    until(lambda: not under_way(), "they are kept")
    recordings.begin("c1", Recording(Settings(), "later", tmp_path))
    assert begun.get(timeout=20) == "later"


def test_a_recorder_that_does_not_end_holds_up_no_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings_module, "_END_S", 0.2)
    recordings = Recordings()
    with subprocess.Popen(["sh", "-c", "trap '' TERM; echo; exec sleep 100"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        recordings._processes.add(process)
        recordings.close()
        assert process.wait(20) < 0


def test_a_container_that_never_stops_opening_files_is_recorded_until_its_window_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_LATE_S", 0.1)
    monkeypatch.setattr(recorder, "opened_files", lambda group_fd: itertools.repeat((group_fd, True)))
    group_fd = os.open("/dev/zero", os.O_RDONLY)  # always ready
    stop_fd, end_fd = os.pipe()
    with ObjectResolver([], [], tmp_path) as known:
        assert recorder._watched(known, group_fd, stop_fd, 0.2, must_run=True) == {}
    for fd in (group_fd, stop_fd, end_fd):
        os.close(fd)


def test_an_opened_file_is_told_also_where_containers_lie_behind_a_symlink(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"content").digest()
    for name in ("index", "merged"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "file").touch()
    os.setxattr(tmp_path / "root/index/file", REDIRECT_XATTR, object_path(digest))
    (tmp_path / OBJECTS_FILE).write_bytes(REF_RECORD.pack(digest, 7))
    objects = ObjectList.open(tmp_path / OBJECTS_FILE)
    assert objects is not None
    (tmp_path / "link").symlink_to("root")
    with (
        ObjectResolver([tmp_path / "root/index"], [objects], tmp_path / "link/merged") as known,
        open(tmp_path / "root/merged/file", "rb") as file,
    ):
        assert known.resolve(file.fileno()) == (digest, 7)
