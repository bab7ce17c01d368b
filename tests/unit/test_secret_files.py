"""Reject invalid files of tokens and credentials, with errors that do not show their content."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import urllib3

from gearworkers.errors import FailedPrecondition, GearError, InvalidInput, Unavailable
from gearworkers.http_service.tokens import Access
from gearworkers.images.credentials import find_credentials
from gearworkers.images.transport import open_transport
from gearworkers.remote.manager import ManagerStore
from gearworkers.remote.s3 import open_s3
from gearworkers.settings import ManagerSettings, RegistrySettings, RemoteSettings, Settings
from tests.support.remotes import manager_thread

SECRET = "hunter2"


def writer(data: bytes) -> Callable[[Path], None]:
    """Return a function that writes *data* to a file."""

    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


INVALID: dict[str, Callable[[Path], None]] = {
    "not UTF-8": writer(b"\xff\xfe" + SECRET.encode()),
    "a surrogate": writer(SECRET.encode() + b"\xed\xa0\x80"),
    "other letters": writer((SECRET + "é").encode()),
    "two words": writer(SECRET.encode() + b" " + SECRET.encode()),
    "control characters": writer(SECRET.encode() + b"\x00\x1b[31m"),
    "huge": writer(SECRET.encode() * 300_000),
    "a directory": lambda path: path.mkdir(),
}
EMPTY: dict[str, Callable[[Path], None]] = {
    "empty": writer(b""),
    "blank": writer(b" \n"),
    "not there": lambda path: None,
}
LINES: dict[str, Callable[[Path], None]] = {"two lines": writer(f"{SECRET}\n{SECRET}".encode())}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secret"


def check_error(error: pytest.ExceptionInfo[GearError], file: Path) -> None:
    """Check that the error names the file in one line and does not show the secret."""
    text = str(error.value)
    assert str(file) in text and SECRET not in text and "\n" not in text


@pytest.mark.parametrize("make", [*INVALID.values(), *EMPTY.values(), *LINES.values()], ids=[*INVALID, *EMPTY, *LINES])
def test_a_client_without_a_valid_token_fails_without_a_request(make: Callable[[Path], None], file: Path) -> None:
    make(file)
    store = ManagerStore("http://127.0.0.1:1", RemoteSettings(token_file=file), "test")
    for call in (lambda: store.present([bytes(32)]), lambda: store.get_document("layer")):
        with pytest.raises(FailedPrecondition) as error:
            call()
        check_error(error, file)


@pytest.mark.parametrize("make", [*INVALID.values(), *EMPTY.values()], ids=[*INVALID, *EMPTY])
def test_a_manager_does_not_start_with_an_invalid_token_file(make: Callable[[Path], None], file: Path) -> None:
    make(file)
    for write_tokens, read_tokens in ((file, None), (None, file)):
        with pytest.raises(FailedPrecondition) as error:
            Access(write_tokens=write_tokens, read_tokens=read_tokens)
        check_error(error, file)


@pytest.mark.slow
def test_the_manager_command_reports_an_invalid_token_file_in_one_line(file: Path, tmp_path: Path) -> None:
    INVALID["not UTF-8"](file)
    command = [sys.executable, "-c", "from gearworkers.cli.main import main; main()", "manager"]
    environ = {"GEAR_ROOT": str(tmp_path), "GEAR_MANAGER_WRITE_TOKENS_FILE": str(file)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and re.fullmatch(rf"gear: {file}: line 1 is not a token.*\n", done.stderr), done.stderr


@pytest.mark.parametrize("make", INVALID.values(), ids=INVALID)
def test_a_manager_rejects_all_tokens_while_its_token_file_is_invalid(
    make: Callable[[Path], None], file: Path, tmp_path: Path
) -> None:
    file.write_text("# ünïcödé is allowed in a comment\ntoken\n")
    access = Access(write_tokens=file, read_tokens=None)
    assert access.may_write("Bearer token")
    file.unlink()
    make(file)
    with pytest.raises(Unavailable) as error:
        access.may_write("Bearer token")
    check_error(error, file)
    file.rename(tmp_path / "old")
    file.write_text("other\r\n")
    assert access.may_write("Bearer other") and not access.may_write("Bearer token")


@pytest.mark.parametrize(
    "make",
    [
        writer(b'{"auths": {"\xff": {"auth": "hunter2"}}}'),
        writer(b'{"auths": {"registry": {"password": "hunter2\xff"}}}'),
        writer(b'{"auths": "hunter2"}'),
        writer(b""),
        INVALID["huge"],
        INVALID["a directory"],
    ],
)
def test_unreadable_registry_credentials_are_reported(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "config.json")
    with pytest.raises((FailedPrecondition, InvalidInput)) as error:
        find_credentials(tmp_path, "registry")
    check_error(error, tmp_path / "config.json")


def test_credentials_may_contain_any_letters(tmp_path: Path) -> None:
    config = {"auths": {"registry": {"username": "ü", "password": "€"}}}
    (tmp_path / "config.json").write_text(json.dumps(config, ensure_ascii=False))
    found = find_credentials(tmp_path, "registry")
    assert found is not None and (found.user, found.password) == ("ü", "€")


@pytest.mark.parametrize(
    "make",
    [
        writer(b"[default]\naws_access_key_id = \xff\naws_secret_access_key = hunter2\n"),
        writer(b"[default]\nhunter2\n"),
        INVALID["huge"],
        INVALID["a directory"],
    ],
)
def test_unreadable_aws_credentials_are_reported(make: Callable[[Path], None], file: Path) -> None:
    make(file)
    with pytest.raises(FailedPrecondition) as error:
        open_s3("s3://bucket?endpoint=http://127.0.0.1:1", RemoteSettings(aws_credentials_file=file))
    check_error(error, file)


def test_a_proxy_password_that_does_not_fit_a_header_is_not_shown() -> None:
    with pytest.raises(InvalidInput, match="HTTPS_PROXY") as error:
        open_transport(RegistrySettings(https_proxy="http://user:hunter2€@127.0.0.1:1"), "registry.example.org")
    assert SECRET not in str(error.value)


def test_a_query_that_is_not_utf8_is_answered_with_an_error_message(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with manager_thread(Settings(gear_root=tmp_path, manager=ManagerSettings(store=str(tmp_path / "store")))) as url:
        response = urllib3.request("POST", f"{url}/v1/query", body=b'{"digests": ["\xff"]}', retries=False)
    assert response.status == 400 and "utf-8" in response.json()["error"]
