"""Files that hold tokens and credentials, and hold something else: refused in words that show nothing of it."""

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


def written(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


BAD: dict[str, Callable[[Path], None]] = {
    "not UTF-8": written(b"\xff\xfe" + SECRET.encode()),
    "a surrogate": written(SECRET.encode() + b"\xed\xa0\x80"),
    "other letters": written((SECRET + "é").encode()),
    "two words": written(SECRET.encode() + b" " + SECRET.encode()),
    "control characters": written(SECRET.encode() + b"\x00\x1b[31m"),
    "huge": written(SECRET.encode() * 300_000),
    "a directory": lambda path: path.mkdir(),
}
ABSENT: dict[str, Callable[[Path], None]] = {
    "empty": written(b""),
    "blank": written(b" \n"),
    "not there": lambda path: None,
}
LINES: dict[str, Callable[[Path], None]] = {"two lines": written(f"{SECRET}\n{SECRET}".encode())}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secret"


def said(error: pytest.ExceptionInfo[GearError], file: Path) -> None:
    text = str(error.value)
    assert str(file) in text and SECRET not in text and "\n" not in text


@pytest.mark.parametrize("make", [*BAD.values(), *ABSENT.values(), *LINES.values()], ids=[*BAD, *ABSENT, *LINES])
def test_a_client_with_no_token_to_show_says_so_and_asks_nobody(make: Callable[[Path], None], file: Path) -> None:
    make(file)
    store = ManagerStore("http://127.0.0.1:1", RemoteSettings(token_file=file), "test")
    for call in (lambda: store.present([bytes(32)]), lambda: store.get_document("layer")):
        with pytest.raises(FailedPrecondition) as error:
            call()
        said(error, file)


@pytest.mark.parametrize("make", [*BAD.values(), *ABSENT.values()], ids=[*BAD, *ABSENT])
def test_a_manager_does_not_start_with_it(make: Callable[[Path], None], file: Path) -> None:
    make(file)
    for write_tokens, read_tokens in ((file, None), (None, file)):
        with pytest.raises(FailedPrecondition) as error:
            Access(write_tokens=write_tokens, read_tokens=read_tokens)
        said(error, file)


def test_a_manager_says_it_in_one_line(file: Path, tmp_path: Path) -> None:
    BAD["not UTF-8"](file)
    command = [sys.executable, "-c", "from gearworkers.cli.main import main; main()", "manager"]
    environ = {"GEAR_ROOT": str(tmp_path), "GEAR_MANAGER_WRITE_TOKENS_FILE": str(file)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and re.fullmatch(rf"gear: {file}: line 1 is not a token.*\n", done.stderr), done.stderr


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_a_manager_whose_file_becomes_one_lets_nobody_in_until_it_is_right(
    make: Callable[[Path], None], file: Path, tmp_path: Path
) -> None:
    file.write_text("# ünïcödé in a comment is none of its business\ntoken\n")
    access = Access(write_tokens=file, read_tokens=None)
    assert access.may_write("Bearer token")
    file.unlink()
    make(file)
    with pytest.raises(Unavailable) as error:
        access.may_write("Bearer token")
    said(error, file)
    file.rename(tmp_path / "old")
    file.write_text("other\r\n")
    assert access.may_write("Bearer other") and not access.may_write("Bearer token")


@pytest.mark.parametrize(
    "make",
    [
        written(b'{"auths": {"\xff": {"auth": "hunter2"}}}'),
        written(b'{"auths": {"registry": {"password": "hunter2\xff"}}}'),
        written(b'{"auths": "hunter2"}'),
        written(b""),
        BAD["huge"],
        BAD["a directory"],
    ],
)
def test_registries_credentials_that_cannot_be_read_are_told(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "config.json")
    with pytest.raises((FailedPrecondition, InvalidInput)) as error:
        find_credentials(tmp_path, "registry")
    said(error, tmp_path / "config.json")


def test_credentials_of_any_letters_are_taken(tmp_path: Path) -> None:
    config = {"auths": {"registry": {"username": "ü", "password": "€"}}}
    (tmp_path / "config.json").write_text(json.dumps(config, ensure_ascii=False))
    found = find_credentials(tmp_path, "registry")
    assert found is not None and (found.user, found.password) == ("ü", "€")


@pytest.mark.parametrize(
    "make",
    [
        written(b"[default]\naws_access_key_id = \xff\naws_secret_access_key = hunter2\n"),
        written(b"[default]\nhunter2\n"),
        BAD["huge"],
        BAD["a directory"],
    ],
)
def test_aws_credentials_that_cannot_be_read_are_told(make: Callable[[Path], None], file: Path) -> None:
    make(file)
    with pytest.raises(FailedPrecondition) as error:
        open_s3("s3://bucket?endpoint=http://127.0.0.1:1", RemoteSettings(aws_credentials_file=file))
    said(error, file)


def test_a_proxys_password_that_no_header_takes_is_not_shown() -> None:
    with pytest.raises(InvalidInput, match="HTTPS_PROXY") as error:
        open_transport(RegistrySettings(https_proxy="http://user:hunter2€@127.0.0.1:1"), "registry.example.org")
    assert SECRET not in str(error.value)


def test_a_question_that_is_not_utf8_is_answered_in_words(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with manager_thread(Settings(gear_root=tmp_path, manager=ManagerSettings(store=str(tmp_path / "store")))) as url:
        answer = urllib3.request("POST", f"{url}/v1/query", body=b'{"digests": ["\xff"]}', retries=False)
    assert answer.status == 400 and "utf-8" in answer.json()["error"]
