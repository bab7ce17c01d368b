"""Store blobs in S3: credentials, regions, errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gearworkers.cli.doctor import remote_check
from gearworkers.errors import FailedPrecondition, NotFound, Unavailable
from gearworkers.remote.s3 import SharedCredentials, open_s3
from gearworkers.settings import RemoteSettings, Settings
from tests.support.answers import Answer, answering
from tests.support.processes import wait_until
from tests.support.remotes import s3_server

pytestmark = pytest.mark.slow


@contextmanager
def _recording(keys: list[str]) -> Iterator[str]:
    """Run an empty S3 server that records the access key of each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            keys.append(self.headers["Authorization"].partition("Credential=")[2].partition("/")[0])
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_changed_credentials_are_reread(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    credentials = SharedCredentials(path, "gear")
    assert not credentials.exists()
    for key in ("one", "two"):
        path.write_text(f"[gear]\naws_access_key_id = {key}\naws_secret_access_key = s%cret\naws_session_token = t\n")
        given = credentials()
        assert (given["access_key_id"], given["secret_access_key"], given["token"]) == (key, "s%cret", "t")
    path.write_text("[gear]\naws_access_key_id = x\n")
    with pytest.raises(FailedPrecondition):
        credentials()


def test_requests_are_signed_with_changed_credentials(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    template = "[default]\naws_access_key_id = {}\naws_secret_access_key = x\n"
    path.write_text(template.format("AKIAFIRST"))
    keys: list[str] = []
    with _recording(keys) as endpoint:
        store = open_s3(f"s3://b?endpoint={endpoint}", RemoteSettings(aws_credentials_file=path))

        def signs_with(key: str) -> bool:
            store.present([bytes(32)])
            return keys[-1] == key

        assert signs_with("AKIAFIRST")
        path.write_text(template.format("AKIASECOND"))
        wait_until(lambda: signs_with("AKIASECOND"), "the second key is used")


@pytest.mark.parametrize(
    ("option", "environ", "signed"),
    [("", "", "us-east-1"), ("", "eu-west-1", "eu-west-1"), ("eu-x", "eu-west-1", "eu-x")],
)
def test_the_region_of_the_url_precedes_the_environments(
    option: str, environ: str, signed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = x\naws_secret_access_key = x\n")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_REGION", environ) if environ else monkeypatch.delenv("AWS_REGION", raising=False)
    with answering(lambda asked: Answer(404)) as server:
        url = f"s3://b?endpoint={server.url}" + (f"&region={option}" if option else "")
        open_s3(url, RemoteSettings(aws_credentials_file=tmp_path / "credentials")).present([bytes(32)])
        assert f"/{signed}/s3/aws4_request" in server.asked[0].headers["Authorization"]


def test_an_unreachable_server_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = x\naws_secret_access_key = x\n")
    settings = RemoteSettings(aws_credentials_file=tmp_path / "credentials")
    with pytest.raises(Unavailable):
        open_s3("s3://b?endpoint=http://127.0.0.1:1", settings).get(bytes(32))


def test_a_missing_bucket_is_reported_to_writers_and_by_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = x\naws_secret_access_key = x\n")
    remote = RemoteSettings(aws_credentials_file=tmp_path / "credentials")
    with s3_server(tmp_path) as server:
        url = f"s3://nobucket?endpoint={server.url}"
        with pytest.raises(NotFound, match="s3://nobucket: the bucket does not exist"):
            open_s3(url, remote).put_many([(bytes(32), b"R")])
        found = remote_check(Settings(gear_root=tmp_path, remote=replace(remote, url=url)))
        assert not found.ok and "404 Not Found" in found.found
