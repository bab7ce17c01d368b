"""Who may read, and who may write: bearer tokens in files that may be replaced at any time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from gearworkers.errors import FailedPrecondition, GearError, Unavailable, from_os_error
from gearworkers.settings import Settings
from gearworkers.util.bearer_token import BEARER_TOKEN
from gearworkers.util.fs import read_small, stamp


class TokenFile:
    """Tokens, one a line; ``#`` begins a comment. Read again when the file changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._hashes: frozenset[bytes] = frozenset()

    def has(self, token: str) -> bool:
        """Whether *token* is one of them; how long it takes tells of its hash only.

        Raises:
            Unavailable: The file cannot be used: nobody is let in.
        """
        try:
            self._refresh()
        except GearError as exc:
            raise Unavailable(str(exc)) from exc
        return hashlib.sha256(token.encode(errors="surrogateescape")).digest() in self._hashes

    def check(self) -> None:
        """See that there is a token.

        Raises:
            FailedPrecondition: There is none, or the file cannot be used.
        """
        try:
            self._refresh()
        except GearError as exc:
            raise FailedPrecondition(str(exc)) from exc
        if not self._hashes:
            raise FailedPrecondition(f"{self._path} holds no token; write one into it, such as `openssl rand -hex 32`")

    def _refresh(self) -> None:
        try:
            seen = stamp(self._path)
        except OSError as exc:
            raise from_os_error(exc, f"read tokens from {self._path}") from exc
        if seen != self._seen:
            tokens = _tokens_in(read_small(self._path), self._path)
            self._hashes = frozenset(hashlib.sha256(token.encode()).digest() for token in tokens)
            self._seen = seen


def _tokens_in(data: bytes, path: Path) -> Iterator[str]:
    """
    Raises:
        FailedPrecondition: A line is no token; its number is told, and nothing of it.
    """
    for number, line in enumerate(data.decode("latin-1").split("\n"), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not BEARER_TOKEN.fullmatch(token):
            raise FailedPrecondition(
                f"{path}: line {number} is no token, which is letters, digits and signs in one piece; "
                "write one, such as `openssl rand -hex 32`"
            )
        yield token


class Access:
    """What a request's Authorization header lets it do."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            FailedPrecondition: A token file is empty or cannot be used.
        """
        self._write = _checked(settings.manager_write_tokens_file)
        self._read = _checked(settings.manager_read_tokens_file)

    @property
    def is_open(self) -> bool:
        """Whether anybody may read and write: there are no tokens."""
        return self._write is None and self._read is None

    def may_read(self, authorization: str) -> bool:
        """With a token of either file; anybody if there is none."""
        if self.is_open:
            return True
        token = _token(authorization)
        return any(file is not None and file.has(token) for file in (self._read, self._write))

    def may_write(self, authorization: str) -> bool:
        """With a token for writing; anybody if there is no token at all, nobody if there are only tokens to read."""
        if self._write is None:
            return self._read is None
        return self._write.has(_token(authorization))


def _checked(path: Path | None) -> TokenFile | None:
    if path is None:
        return None
    file = TokenFile(path)
    file.check()
    return file


def _token(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
