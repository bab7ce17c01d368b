"""Call a manager for documents, nodes, metrics and its OpenAPI document."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import openapi_spec_validator
import pytest

from gearworkers.manager.server import ManagerServer
from gearworkers.settings import ManagerSettings, Settings
from tests.support.manager_calls import call, push, sha256
from tests.support.remotes import Service, get_json, read_metrics

pytestmark = pytest.mark.slow


def test_a_document_has_versions(server: Service) -> None:
    path = "/v1/documents/layers/abc"
    assert call(server, "GET", path)[0] == 404
    assert call(server, "PUT", path, b"one", {"Gear-Version": "1"})[0] == 204
    assert call(server, "PUT", path, b"late", {"Gear-Version": "1"})[0] == 409
    assert call(server, "PUT", path, b"two")[0] == 204
    status, headers, body = call(server, "GET", path)
    assert (status, headers["gear-version"], body) == (200, "2", b"two")
    assert call(server, "PUT", path, b"x", {"Gear-Version": "zero"})[0] == 400
    assert call(server, "PUT", "/v1/documents/../x", b"x")[0] in (400, 404)


def test_nodes_that_send_their_name_are_listed(server: Service) -> None:
    for name in ("alpha", "beta", ""):
        call(server, "POST", "/v1/query", b'{"digests": []}', {"Gear-Node": name})
    nodes = get_json(server, "/v1/nodes")
    assert isinstance(nodes, list)
    names = {node["node"] for node in nodes}
    assert {"alpha", "beta"} <= names and "" not in names


def test_every_call_is_in_the_openapi_document(server: Service, tmp_path: Path) -> None:
    described = get_json(server, "/openapi.json")
    assert isinstance(described, dict)
    documented = {(method.upper(), path) for path, calls in described["paths"].items() for method in calls}
    settings = replace(Settings(), gear_root=tmp_path, manager=ManagerSettings(listen="127.0.0.1:0"))
    served = {(call.method, call.path) for call in ManagerServer(settings).api.routes()}
    assert documented == served
    page = call(server, "GET", "/")[2].decode()
    assert all(path in page for _, path in served)


def test_the_openapi_document_is_valid_and_describes_the_responses(server: Service) -> None:
    described = get_json(server, "/openapi.json")
    assert isinstance(described, dict)
    openapi_spec_validator.validate(described, cls=openapi_spec_validator.OpenAPIV31SpecValidator)
    push(server, b"documented")
    call(server, "POST", "/v1/query", b'{"digests": []}', {"Gear-Node": "documented"})
    for method, path, body in (
        ("get", "/v1/nodes", None),
        ("post", "/v1/query", {"digests": [sha256(b"documented")]}),
        ("post", "/v1/query", {"digests": ["none"]}),
    ):
        operation = described["paths"][path][method]
        sent = None if body is None else json.dumps(body).encode()
        status, headers, answer = call(server, method.upper(), path, sent)
        response = operation["responses"].get(str(status)) or operation["responses"][f"{status // 100}XX"]
        schema = response["content"][headers["content-type"].partition(";")[0]]["schema"]
        jsonschema.validate(json.loads(answer), {**schema, "components": described["components"]})
        if body is not None and status == 200:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            jsonschema.validate(body, {**schema, "components": described["components"]})


def test_requests_are_counted(server: Service) -> None:
    name = 'gear_manager_requests_total{call="query",status="200"}'
    before = read_metrics(server).get(name, 0)
    call(server, "POST", "/v1/query", b'{"digests": []}')
    assert read_metrics(server)[name] == before + 1
    assert call(server, "GET", "/healthz")[0] == 200
