"""Requests and responses of the graphdriver protocol, as dockerd sends and expects them."""

from __future__ import annotations

import json

import pytest

from gearworkers.layers.diff.changes import Change, ChangeKind
from gearworkers.layers.idmap import IdRange
from plugin_gateway.graphdriver.messages import (
    InitRequest,
    LayerRequest,
    MalformedRequest,
    Response,
    decode,
    encode,
    error,
    wire_change,
)


def test_init_accepts_null_for_an_empty_list() -> None:
    request = decode(b'{"Home":"/h","Opts":null,"UIDMaps":null,"GIDMaps":null}', InitRequest)
    assert request == InitRequest("/h", None, None, None)


def test_init_accepts_id_maps_with_the_field_names_of_moby() -> None:
    body = b'{"Home":"/h","Opts":["gear.root=/g"],"UIDMaps":[{"container_id":0,"host_id":100000,"size":65536}]}'
    request = decode(body, InitRequest)
    assert request.opts == ["gear.root=/g"]
    assert request.uid_maps == [IdRange(0, 100000, 65536)]


def test_a_layer_request_may_omit_fields_and_have_unknown_ones() -> None:
    assert decode(b'{"ID":"a","New":{"x":1}}', LayerRequest) == LayerRequest("a")
    assert decode(b"", LayerRequest) == LayerRequest()


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"ID":1}', b'"a"', b"\xff", b'{"ID":"\xff"}'])
def test_a_malformed_body_is_rejected(body: bytes) -> None:
    with pytest.raises(MalformedRequest, match="malformed request body"):
        decode(body, LayerRequest)


def test_a_response_has_its_nonempty_fields_with_their_go_names() -> None:
    assert json.loads(encode(Response())) == {}
    assert json.loads(encode(Response(capabilities={"ReproducesExactDiffs": True}))) == {
        "Capabilities": {"ReproducesExactDiffs": True}
    }
    assert json.loads(encode(Response(status=[("a", "b")], size=3, dir="/d", exists=True))) == {
        "Status": [["a", "b"]],
        "Size": 3,
        "Dir": "/d",
        "Exists": True,
    }


def test_a_change_with_a_path_that_is_not_utf8_is_encoded() -> None:
    change = Response(changes=[wire_change(Change(b"/a\xff", ChangeKind.DELETE))])
    assert json.loads(encode(change)) == {"Changes": [{"Path": "/a\ufffd", "Kind": 2}]}


def test_an_error_with_an_undecodable_file_name_is_valid_json() -> None:
    assert json.loads(error("entry a\udcff"))["Err"] == "entry a?"
