"""The generated messages of gRPC services are those that the .proto files describe."""

from __future__ import annotations

import runpy
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[3]


def test_generated_messages_match_their_proto_files(tmp_path: Path) -> None:
    protos = runpy.run_path(str(CHECKOUT / "packaging" / "protos.py"))
    protos["generate"](tmp_path)
    for package in protos["PACKAGES"]:
        generated = {path.name: path.read_text() for path in (tmp_path / package).iterdir()}
        checked_in = {path.name: path.read_text() for path in (CHECKOUT / package).glob("*_pb2.py*")}
        assert generated == checked_in, "run `make protos`"
