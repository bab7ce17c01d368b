"""Parse hosts and ports in settings."""

from __future__ import annotations

import pytest

from gearworkers.util.net import parse_host_port


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:9100", "127.0.0.1", 9100),
        ("[::1]:80", "::1", 80),
        ("node.example:65535", "node.example", 65535),
        (":0", "", 0),
        ("9100", "", 9100),
    ],
)
def test_a_host_and_a_port_are_read_from_text(text: str, host: str, port: int) -> None:
    assert parse_host_port(text) == (host, port)


@pytest.mark.parametrize("text", ["", "127.0.0.1", "host:", "host:65536", "host:-1", "host:٣", "host:http"])
def test_text_without_a_port_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT is needed"):
        parse_host_port(text)
