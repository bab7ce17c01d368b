"""Replace files by one rename, and write all of a buffer."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gearworkers.util.writing import pwrite_all, replace_file, write_all


@pytest.mark.parametrize("sync", [False, True])
def test_replacing_creates_or_overwrites_the_file_and_leaves_nothing_else(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "record"
    for content in (b"first", b"second, longer", b""):
        replace_file(path, content, sync=sync)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("sync", [False, True])
def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"old")
    with _largest_file(1000), pytest.raises(OSError):
        replace_file(path, bytes(2000), sync=sync)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_of_a_file_that_many_threads_replace_see_one_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "record"
    contents = [bytes([number]) * (1000 + number) for number in range(4)]
    replace_file(path, contents[0], sync=False)

    def replace_often(content: bytes) -> None:
        for _ in range(50):
            replace_file(path, content, sync=False)

    threads = [threading.Thread(target=replace_often, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() in contents
    for thread in threads:
        thread.join()
    assert list(tmp_path.iterdir()) == [path]


def test_all_of_a_buffer_is_written_through_a_pipe_that_takes_it_in_parts() -> None:
    content = bytes(range(256)) * 4096
    read_fd, write_fd = os.pipe()
    received: list[bytes] = []

    def read_all() -> None:
        with open(read_fd, "rb") as file:
            received.append(file.read())

    reader = threading.Thread(target=read_all)
    reader.start()
    write_all(write_fd, memoryview(content))
    os.close(write_fd)
    reader.join()
    assert received == [content]


def test_a_buffer_is_written_at_its_offset(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        pwrite_all(file.fileno(), b"defg", 3)
        pwrite_all(file.fileno(), bytearray(b"abc"), 0)
        assert file.read() == b"abcdefg"


def test_the_rest_of_a_buffer_follows_a_short_write(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file, _largest_file(1000), pytest.raises(OSError):
        write_all(file.fileno(), bytes(2000))  # the kernel writes 1,000 bytes, then reports EFBIG
    assert (tmp_path / "file").stat().st_size == 1000
    with open(tmp_path / "file", "w+b") as file, _largest_file(1000), pytest.raises(OSError):
        pwrite_all(file.fileno(), bytes(2000), 500)
    assert (tmp_path / "file").stat().st_size == 1000


@contextmanager
def _largest_file(size_bytes: int) -> Iterator[None]:
    """Make writes beyond *size_bytes* of a file fail; CPython ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
