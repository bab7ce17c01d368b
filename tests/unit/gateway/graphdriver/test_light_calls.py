"""Light calls over the plugin's socket: responses and errors, and calls that wait without blocking others."""

from __future__ import annotations

import http.client
import json
import select

import pytest

from gearworkers.errors import IntegrityError, InvalidInput
from gearworkers.workers.claim import ClaimedJob
from gearworkers.workers.messages import JobResult
from tests.support.gateway_jobs import Start
from tests.support.processes import wait_until

pytestmark = pytest.mark.slow


def test_activate_announces_a_graph_driver(start: Start) -> None:
    _, plugin = start()
    assert plugin.request("Plugin.Activate", b"") == (200, b'{"Implements":["GraphDriver"]}')


def test_light_calls_reach_the_driver(start: Start) -> None:
    running, plugin = start()
    assert plugin.call("Init", Home="/h", Opts=None, UIDMaps=[{"container_id": 0, "host_id": 9, "size": 1}]) == {}
    assert running.driver.inits[0][1][0].host_id == 9
    assert plugin.call("Capabilities") == {"Capabilities": {"ReproducesExactDiffs": True}}
    assert plugin.call("Create", ID="a", Parent="") == {}
    assert plugin.call("CreateReadWrite", ID="b", Parent="a") == {}
    assert plugin.call("Exists", ID="b") == {"Exists": True}
    assert plugin.call("Get", ID="b") == {"Dir": "/merged/b"}
    assert plugin.call("GetMetadata", ID="b") == {"Metadata": {"MergedDir": "/merged/b"}}
    assert plugin.call("Put", ID="b") == {}
    assert plugin.call("Changes", ID="b", Parent="a") == {"Changes": [{"Path": "/a", "Kind": 1}]}
    assert plugin.call("DiffSize", ID="b", Parent="a") == {"Size": 42}
    assert plugin.call("Remove", ID="b") == {}
    assert plugin.call("Exists", ID="b") == {}
    assert plugin.call("Cleanup") == {}
    assert plugin.status()["Layers"] == "1"


def test_driver_errors_become_err_without_a_traceback(start: Start) -> None:
    running, plugin = start()
    assert plugin.call("Get", ID="none") == {"Err": "layer none does not exist"}
    running.driver.broken = InvalidInput("a bad id")
    assert plugin.call("Exists", ID="x") == {"Err": "a bad id"}
    running.driver.broken = ZeroDivisionError("oops")
    answer = plugin.call("Status")["Err"]
    assert answer.startswith("internal error: ZeroDivisionError: oops") and "Traceback" not in answer
    running.driver.broken = OSError(28, "x")
    assert plugin.call("Exists", ID="x") == {"Err": "GraphDriver.Exists: No space left on device"}


def test_an_error_naming_an_undecodable_file_is_reported(start: Start) -> None:
    def refuse(claimed: ClaimedJob) -> None:
        claimed.finish(JobResult(error="damaged: a\udcff"))

    running, plugin = start(refuse)
    running.driver.broken = IntegrityError("damaged: a\udcff")
    assert plugin.call("Exists", ID="x") == {"Err": "damaged: a?"}
    assert plugin.apply_diff("a", [b"abc"]) == (500, {"Err": "damaged: a?"})


@pytest.mark.parametrize("method", ["GraphDriver.Nope", "Nope", "GraphDriver.Get/x", "GraphDriver.DiffNope"])
def test_an_unknown_method_is_an_error(start: Start, method: str) -> None:
    _, plugin = start()
    status, body = plugin.request(method, b"{}")
    assert status == 404
    assert "no such call" in json.loads(body)["Err"]


@pytest.mark.parametrize("method", ["GraphDriver.Init", "GraphDriver.Get", "GraphDriver.Diff"])
def test_a_malformed_request_is_an_error(start: Start, method: str) -> None:
    _, plugin = start()
    status, body = plugin.request(method, b'{"ID": 7')
    assert status == 400
    assert "malformed request body" in json.loads(body)["Err"]


def test_calls_waiting_for_the_lazy_file_server_or_their_layer_do_not_block_others(start: Start) -> None:
    """There are more of them than threads in any pool."""
    running, plugin = start()
    ids = [f"gear{number}" for number in range(200)]
    running.driver.layers |= dict.fromkeys([*ids, "plain"], "")
    waiting = [plugin.begin("Get", id) for id in ids]
    wait_until(lambda: len(running.driver.refused_gets) == len(ids), "each Get has its layer's lock")
    waiting += [plugin.begin("Remove", id) for id in ids]
    assert plugin.call("Exists", ID="plain") == {"Exists": True}
    assert plugin.call("Get", ID="plain") == {"Dir": "/merged/plain"}
    for method in ("Put", "Create", "GetMetadata", "Status", "Remove"):
        assert not plugin.call(method, ID={"Create": "new"}.get(method, "plain")).get("Err")
    assert not select.select(waiting, [], [], 0)[0]
    running.driver.lazy_server.set()
    for connection in waiting:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert "Err" not in json.loads(answer.read())
        answer.close()
        connection.close()
    assert set(running.driver.layers) == {"new"}
