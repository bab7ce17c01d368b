"""The libraries that programs of this host need, compared with the dynamic linker's answer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gearworkers.lazyfs import elf

PROGRAMS = [Path("/bin/sh"), Path("/bin/ls"), Path("/usr/bin/redis-server"), Path("/usr/sbin/runc")]


def needed(data: bytes) -> list[bytes]:
    program = elf.parse_head(data[: elf.HEAD_BYTES])
    if program is None:
        return []
    found = elf.parse_dynamic(program, part(data, program.dynamic))
    return elf.names_of(found, part(data, found.strings)) if found is not None else []


def part(data: bytes, wanted: elf.Part) -> bytes:
    return data[wanted.offset : wanted.offset + wanted.size_bytes]


def linked(path: Path) -> dict[bytes, Path]:
    """Return all libraries that the dynamic linker loads for a program, by name."""
    output = subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout
    return {name.encode(): Path(found) for name, found in re.findall(r"(\S+) => (/\S+)", output)}


@pytest.mark.parametrize("path", [path for path in PROGRAMS if path.exists()], ids=str)
def test_a_program_needs_what_the_dynamic_linker_loads(path: Path) -> None:
    libraries = linked(path)
    assert libraries
    found, unread = set[bytes](), {path}
    while unread:
        names = set(needed(unread.pop().read_bytes())) - found
        found |= names
        unread |= {libraries[name] for name in names if name in libraries}
    assert {name for name in found if not name.startswith(b"ld-linux")} == set(libraries)


def test_the_loaded_parts_of_a_library_have_its_tables() -> None:
    libc = linked(Path("/bin/sh"))[b"libc.so.6"].read_bytes()
    program = elf.parse_head(libc[: elf.HEAD_BYTES])
    assert program is not None
    loaded = program.loaded()
    dynamic = program.dynamic.offset
    assert any(one.offset <= dynamic < one.offset + one.size_bytes for one in loaded)
    assert sum(one.size_bytes for one in loaded) < len(libc) / 2


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n" * 500, b"\x7fELF", b"\x7fELF\x02\x01" + bytes(4090)], ids=len)
def test_other_files_need_nothing(data: bytes) -> None:
    assert needed(data) == []


def test_a_damaged_program_needs_nothing_or_some_names() -> None:
    whole = Path("/bin/sh").read_bytes()
    for at in range(0, elf.HEAD_BYTES, 8):
        needed(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        needed(whole[:at])
    program = elf.parse_head(whole)
    assert program is not None
    at = program.dynamic.offset
    for value in (os.urandom(program.dynamic.size_bytes), b"\xff" * program.dynamic.size_bytes):
        assert len(needed(whole[:at] + value + whole[at + len(value) :])) < sys.maxsize
