"""Find the programs that a command or a script may run, from the words of its text."""

from __future__ import annotations

import re

MAX_SCRIPT_BYTES = 64 << 10
_WORD = re.compile(rb"[\w.+-]+")
_COMMENT = re.compile(rb"^\s*#.*$", re.MULTILINE)
_SHELLS = {b"sh", b"ash", b"bash", b"dash", b"ksh", b"zsh"}
_MAX_WORDS = 2000


def is_script(head: bytes) -> bool:
    """Return whether a file with this beginning is run by an interpreter."""
    return head.startswith(b"#!")


def words_of(text: bytes) -> list[bytes]:
    """Return the distinct words of a command, in their order; of a path, each part is a word."""
    return list(dict.fromkeys(_WORD.findall(text)))[:_MAX_WORDS]


def words_of_script(script: bytes) -> list[bytes]:
    """Return the words of the first line, which names the interpreter, and for a shell, those of the text."""
    first, _, text = script.partition(b"\n")
    words = words_of(first)
    return words_of(b"\n".join((first, _COMMENT.sub(b"", text)))) if _SHELLS.intersection(words) else words
