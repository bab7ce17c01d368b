"""The protocol's requests and answers are those that dockerd sends and takes."""

from __future__ import annotations

import json

import pytest

from gearworkers.layers.diff.changes import Change, ChangeKind
from gearworkers.layers.idmap import IDMap
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


def test_init_takes_null_where_go_has_an_empty_list() -> None:
    request = decode(b'{"Home":"/h","Opts":null,"UIDMaps":null,"GIDMaps":null}', InitRequest)
    assert request == InitRequest("/h", None, None, None)


def test_init_takes_id_maps_by_the_names_that_moby_gives_them() -> None:
    body = b'{"Home":"/h","Opts":["gear.root=/g"],"UIDMaps":[{"container_id":0,"host_id":100000,"size":65536}]}'
    request = decode(body, InitRequest)
    assert request.opts == ["gear.root=/g"]
    assert request.uid_maps == [IDMap(0, 100000, 65536)]


def test_a_layer_request_may_leave_out_what_is_empty_and_bring_what_is_unknown() -> None:
    assert decode(b'{"ID":"a","New":{"x":1}}', LayerRequest) == LayerRequest("a")
    assert decode(b"", LayerRequest) == LayerRequest()


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"ID":1}', b'"a"', b"\xff", b'{"ID":"\xff"}'])
def test_a_body_of_another_shape_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedRequest, match="malformed request body"):
        decode(body, LayerRequest)


def test_an_answer_holds_what_there_is_under_go_names() -> None:
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


def test_a_change_has_path_and_number_and_survives_a_name_that_is_not_utf8() -> None:
    change = Response(changes=[wire_change(Change(b"/a\xff", ChangeKind.DELETE))])
    assert json.loads(encode(change)) == {"Changes": [{"Path": "/a\ufffd", "Kind": 2}]}


def test_an_error_that_names_an_undecodable_file_is_still_json() -> None:
    assert json.loads(error("entry a\udcff"))["Err"] == "entry a?"
