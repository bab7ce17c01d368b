"""While the lazy file server is down, containers of Gear images wait for it, and no other call waits for them."""

from __future__ import annotations

import http.client
import json
import select
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gearworkers.engine import mounts
from gearworkers.engine.mounts import LazyServerNeeded
from tests.support.gateways import Running, run_gateway
from tests.support.lazynode import LazyNode
from tests.support.plugin import Plugin
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.tiny import tar_of

pytestmark = pytest.mark.slow

STARTING = [f"starting{number}" for number in range(64)]
FILES = {"etc/file": b"content " * 100}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LazyNode]:
    """Return a node with a Gear image and an ordinary one; its lazy file server is not started."""
    monkeypatch.setattr(mounts, "LAZY_TIMEOUT_S", PATIENCE_S)
    node = LazyNode(tmp_path)
    node.pull(FILES)
    node.apply(tar_of(FILES), "ordinary")
    yield node
    node.close()


class RecordingDriver:
    """The driver of *node*; `refused_gets` has the ids of Gets that would have to wait and may not."""

    def __init__(self, node: LazyNode) -> None:
        self._driver: Any = node.driver
        self.refused_gets: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def get(self, id: str, mount_label: str = "", *, may_wait: bool = True) -> Any:
        try:
            return self._driver.get(id, mount_label, may_wait=may_wait)
        except LazyServerNeeded:
            self.refused_gets.add(id)
            raise


@pytest.fixture
def driver(node: LazyNode) -> RecordingDriver:
    return RecordingDriver(node)


@pytest.fixture
def running(node: LazyNode, driver: Any) -> Iterator[Running]:
    settings = replace(node.settings, plugin_socket="off")
    running = run_gateway(settings, lambda claimed: None, workers=0, driver=driver)
    yield running
    running.stop()


@pytest.mark.parametrize("how", ["has not started", "was killed"])
def test_other_calls_are_served_while_64_containers_wait_for_the_lazy_file_server(
    node: LazyNode, driver: RecordingDriver, running: Running, how: str
) -> None:
    plugin = Plugin(running.driver.settings.effective_plugin_socket)
    if how == "was killed":
        node.start()
        node.kill()
    for id in STARTING:
        plugin.call("CreateReadWrite", ID=id, Parent="image")
    waiting = [plugin.begin("Get", id) for id in STARTING]
    wait_until(lambda: driver.refused_gets == set(STARTING), "each Get has its layer's lock")
    removing = [plugin.begin("Remove", id) for id in STARTING]
    assert plugin.call("Exists", ID="ordinary") == {"Exists": True}
    plugin.call("CreateReadWrite", ID="other", Parent="ordinary")
    merged = plugin.call("Get", ID="other")["Dir"]
    assert Path(merged, "etc/file").read_bytes() == FILES["etc/file"]
    assert plugin.call("Put", ID="other") == plugin.call("Remove", ID="other") == {}
    assert not select.select([*waiting, *removing], [], [], 0)[0]
    node.start()
    assert [Path(answered(connection)["Dir"]).parent.name for connection in waiting] == STARTING
    assert [answered(connection) for connection in removing] == [{}] * len(STARTING)


def answered(connection: Any) -> Any:
    with connection, http.client.HTTPResponse(connection) as answer:
        answer.begin()
        return json.loads(answer.read())
