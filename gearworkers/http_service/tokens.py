"""Read and write access by bearer tokens; the token files may be replaced at any time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from gearworkers.errors import FailedPrecondition, GearError, Unavailable, from_os_error
from gearworkers.util.bearer_token import BEARER_TOKEN
from gearworkers.util.fs import file_version, read_small

_ADVICE = "write one into it, such as the output of `openssl rand -hex 32`"


class Access:
    """Decides by the Authorization header of a request whether it may read or write.

    Without any token file everybody may do both.
    """

    def __init__(self, *, write_tokens: Path | None, read_tokens: Path | None) -> None:
        """
        Args:
            write_tokens: File of the tokens that allow both; None: no file.
            read_tokens: File of the tokens that allow reading; None: no file.

        Raises:
            FailedPrecondition: A file cannot be used or has no token.
        """
        self._write = _checked(write_tokens)
        self._read = _checked(read_tokens)

    @property
    def is_open(self) -> bool:
        """Whether everybody may read and write, because there are no token files."""
        return self._write is None and self._read is None

    def may_read(self, authorization: str) -> bool:
        """Return whether the header has a token of either file.

        Raises:
            Unavailable: A token file cannot be used.
        """
        if self.is_open:
            return True
        token = _bearer_token(authorization)
        return any(file is not None and file.has(token) for file in (self._read, self._write))

    def may_write(self, authorization: str) -> bool:
        """Return whether the header has a token for writing; with a file of read tokens alone, nobody may write.

        Raises:
            Unavailable: The token file cannot be used.
        """
        if self._write is None:
            return self._read is None
        return self._write.has(_bearer_token(authorization))


class TokenFile:
    """Tokens, one a line; ``#`` starts a comment. The file is reread when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int, int] | None = None
        self._hashes: frozenset[bytes] = frozenset()

    def has(self, token: str) -> bool:
        """Return whether the file has *token*; the time taken depends on its hash only.

        Raises:
            Unavailable: The file cannot be used, so no token is valid.
        """
        try:
            self._refresh()
        except GearError as exc:
            raise Unavailable(str(exc)) from exc
        return hashlib.sha256(token.encode(errors="surrogateescape")).digest() in self._hashes

    def check(self) -> None:
        """Check that the file has a token.

        Raises:
            FailedPrecondition: It has none, or it cannot be used.
        """
        try:
            self._refresh()
        except GearError as exc:
            raise FailedPrecondition(str(exc)) from exc
        if not self._hashes:
            raise FailedPrecondition(f"{self._path} contains no token; {_ADVICE}")

    def _refresh(self) -> None:
        try:
            version = file_version(self._path)
        except OSError as exc:
            raise from_os_error(exc, f"read tokens from {self._path}") from exc
        if version != self._version:
            tokens = _parse(read_small(self._path), self._path)
            self._hashes = frozenset(hashlib.sha256(token.encode()).digest() for token in tokens)
            self._version = version


def _parse(data: bytes, path: Path) -> Iterator[str]:
    """Yield the tokens of a file.

    Raises:
        FailedPrecondition: A line is malformed. The message has the line's number, but not its content.
    """
    for number, line in enumerate(data.decode("latin-1").split("\n"), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not BEARER_TOKEN.fullmatch(token):
            raise FailedPrecondition(
                f"{path}: line {number} is not a token of printable ASCII characters without spaces; {_ADVICE}"
            )
        yield token


def _checked(path: Path | None) -> TokenFile | None:
    if path is None:
        return None
    file = TokenFile(path)
    file.check()
    return file


def _bearer_token(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
