"""Recordings that cannot begin or do not end: they do not block a container or the gateway."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.cas.refs import OBJECTS_FILE, REF_RECORD
from gearworkers.digest import REDIRECT_XATTR, object_path
from gearworkers.layers.object_list import ObjectList
from gearworkers.profiles import recorder
from gearworkers.profiles.recordings import MAX_RECORDINGS, Recording, Recordings
from gearworkers.profiles.resolve import ObjectResolver
from gearworkers.settings import Settings
from tests.support.processes import wait_until


def test_a_recording_that_fails_to_begin_leaves_no_descriptor_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left() -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pipe", none_left)
    before = os.listdir("/proc/self/fd")
    Recordings(watch=always_opens).begin("c1", Recording(settings_in(tmp_path), "image", tmp_path))
    assert os.listdir("/proc/self/fd") == before


def settings_in(directory: Path) -> Settings:
    """Return settings without a lazy file server, and with a short window."""
    return Settings(gear_root=directory / "gear", run_dir=directory / "run", profile_window_s=0.1)


def always_opens(_: Path) -> int:
    """Watch a file system on which a file was just opened."""
    return os.open("/dev/zero", os.O_RDONLY)


def running() -> int:
    """Return the number of recordings of this process."""
    return [thread.name for thread in threading.enumerate()].count("recording")


def test_a_recording_counts_towards_the_limit_until_it_is_saved(tmp_path: Path) -> None:
    slow_remote = f"touch {tmp_path}/recorder.$$; while [ ! -e {tmp_path}/saved ]; do sleep 0.05; done"
    wait_until(lambda: not running(), "the recordings of other tests are over")
    recordings = Recordings(watch=always_opens, recorder=("sh", "-c", slow_remote))
    recording = Recording(settings_in(tmp_path), "image", tmp_path)

    def begun() -> int:
        return len(list(tmp_path.glob("recorder.*")))

    for number in range(MAX_RECORDINGS + 1):
        recordings.begin(f"c{number}", recording)
    wait_until(lambda: begun() == MAX_RECORDINGS, "the recorders run")
    for number in range(MAX_RECORDINGS):
        recordings.end(f"c{number}")
    recordings.begin("c0", recording)
    assert running() == MAX_RECORDINGS
    (tmp_path / "saved").touch()
    wait_until(lambda: not running(), "the recordings are saved")
    recordings.begin("c0", recording)
    wait_until(lambda: begun() == MAX_RECORDINGS + 1, "another recorder runs")
    recordings.close()


def test_closing_kills_a_recorder_that_does_not_end(tmp_path: Path) -> None:
    ignores_sigterm = f"trap '' TERM; echo $$ > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/pid; exec sleep 100"
    recordings = Recordings(watch=always_opens, recorder=("sh", "-c", ignores_sigterm), end_timeout_s=0.2)
    recordings.begin("c1", Recording(settings_in(tmp_path), "image", tmp_path))
    wait_until((tmp_path / "pid").exists, "the recorder runs")
    recordings.close()
    pid = (tmp_path / "pid").read_text().strip()
    wait_until(lambda: not Path("/proc", pid).exists(), "the recorder is killed")


def test_a_decoded_recording_equals_the_encoded_recording(tmp_path: Path) -> None:
    settings = replace(settings_in(tmp_path), node="a", large_object_bytes=1 << 20)
    recording = Recording(settings, "image", tmp_path / "merged")
    assert Recording.decode(recording.encode()) == recording


def test_a_container_that_opens_files_without_end_is_recorded_until_its_window_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "LATE_S", 0.1)
    monkeypatch.setattr(recorder, "opened_files", lambda group_fd: itertools.repeat((group_fd, True)))
    group_fd = always_opens(tmp_path)
    stop_fd, end_fd = os.pipe()
    with ObjectResolver([], [], tmp_path) as resolver:
        assert recorder.watch_objects(resolver, group_fd, stop_fd, 0.2, must_run=True) == {}
    for fd in (group_fd, stop_fd, end_fd):
        os.close(fd)


def test_an_opened_file_is_resolved_below_a_symlinked_directory_of_containers(tmp_path: Path) -> None:
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
