"""`gear containerd-config --check` where containerd runs, but its program is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from gearworkers.cli.containerd_config import containerd_checks
from gearworkers.containerd.api import introspection_pb2, version_pb2
from gearworkers.settings import Settings


@contextmanager
def containerd(socket: Path) -> Iterator[None]:
    """Answer as a containerd that has any plugin."""
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    answers: dict[str, tuple[str, Message]] = {
        "containerd.services.version.v1.Version": ("Version", version_pb2.VersionResponse(version="v2.1.9")),
        "containerd.services.introspection.v1.Introspection": (
            "Plugins",
            introspection_pb2.PluginsResponse(plugins=[introspection_pb2.Plugin()]),
        ),
    }
    for service, (call, answer) in answers.items():
        data = answer.SerializeToString()
        handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, context, data=data: data)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {call: handler}),))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()


def test_the_check_finds_no_fault_without_the_containerd_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = replace(Settings(), containerd_address=tmp_path / "containerd.sock")
    with containerd(settings.containerd_address):
        checks = containerd_checks(settings)
    assert [check for check in checks if not check.ok] == []
    assert checks[-1].found == "not checked: no containerd program here"
