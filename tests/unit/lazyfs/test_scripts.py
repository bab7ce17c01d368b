"""The words of commands and scripts that may name programs."""

from __future__ import annotations

import pytest

from gearworkers.lazyfs.scripts import is_script, words_of, words_of_script


def test_words_of_a_command_include_the_parts_of_paths() -> None:
    assert words_of(b"/usr/sbin/nginx -g 'daemon off;' nginx") == [b"usr", b"sbin", b"nginx", b"-g", b"daemon", b"off"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (b"#!/usr/bin/env python3\nimport os\n", [b"usr", b"bin", b"env", b"python3"]),
        (b'#!/bin/sh\n# more\n  # less\n"$bin/initdb" -x\n', [b"bin", b"sh", b"initdb", b"-x"]),
        (b"#!/bin/bash", [b"bin", b"bash"]),
    ],
)
def test_words_of_a_script(script: bytes, words: list[bytes]) -> None:
    assert is_script(script)
    assert words_of_script(script) == words


def test_a_program_is_no_script() -> None:
    assert not is_script(b"\x7fELF")
    assert not is_script(b"")
