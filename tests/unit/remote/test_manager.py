"""The client of a manager: unreachable, slow and wrong servers, malformed tokens."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, Unavailable
from gearworkers.remote import encoding
from gearworkers.remote.manager import ManagerStore
from gearworkers.settings import RemoteSettings, Settings
from tests.support.answers import Answer, answering

pytestmark = pytest.mark.slow


def test_an_unreachable_manager_is_unavailable(tmp_path: Path) -> None:
    settings = replace(Settings(), remote=RemoteSettings(timeout_s=2))
    with pytest.raises(Unavailable):
        ManagerStore("http://127.0.0.1:1", settings.remote, "test").present([bytes(32)])


@pytest.mark.parametrize(
    "beginning",
    [b"Content-Length: 100000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n186a0\r\n" + bytes(32) + b"\xa0\x86\1\0"],
)
def test_a_manager_that_sends_too_slowly_is_unavailable(beginning: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_drip, args=(listener, b"HTTP/1.1 200 OK\r\n" + beginning))
        thread.start()
        store = ManagerStore(f"http://127.0.0.1:{listener.getsockname()[1]}", RemoteSettings(timeout_s=2.0), "test")
        with pytest.raises(Unavailable, match="bytes missing after"):
            if b"chunked" in beginning:
                list(store.get_many([bytes(32)]))
            else:
                store.get(bytes(32))
        store.close()
        thread.join()


@pytest.mark.parametrize("status", [301, 302, 303, 304, 307, 308])
def test_a_redirect_does_not_confirm_a_push(status: int) -> None:
    with answering(lambda asked: Answer(status, {"Location": "/login"})) as server:
        store = ManagerStore(server.url, RemoteSettings(), "test")
        with pytest.raises(FailedPrecondition, match="is not a manager"):
            store.put_many([(hashlib.sha256(b"x").digest(), encoding.encode(b"x"))])
        assert len(server.asked) == 1


@pytest.mark.parametrize("content", [b"secret\nsecret two\n", b"secret\xff", "se\u20accret".encode()])
def test_the_error_of_a_malformed_token_does_not_contain_it(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(FailedPrecondition, match="a single token of printable") as caught:
        ManagerStore("http://127.0.0.1:1", RemoteSettings(token_file=file), "test").present([bytes(32)])
    assert "secret" not in str(caught.value)


def _drip(listener: socket.socket, beginning: bytes) -> None:
    """Start a response, then send single bytes until the client disconnects."""
    client, _ = listener.accept()
    with client:
        client.recv(65536)
        client.sendall(beginning)
        while True:
            try:
                client.sendall(b"x")
            except OSError:
                return
            time.sleep(0.02)
