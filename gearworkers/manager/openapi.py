"""The API's own description: OpenAPI 3.1, and a page of it for people."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from types import GenericAlias
from typing import Any

import msgspec

from gearworkers.manager.documents import MOST_VERSION
from gearworkers.manager.nodes import Joining, Node
from gearworkers.manager.objects import Stored
from gearworkers.remote import blob_stream
from gearworkers.remote.blobstore import DOCUMENT_NAME, MAX_NAME_CHARS
from gearworkers.remote.manager_messages import MAX_DIGESTS, VERSION_HEADER, Digests, Present, Problem

_Kind = str | type | GenericAlias
"""A media type, or what its JSON holds."""

_Paths = dict[str, dict[str, Any]]
"""The operations of each path, by method."""

_OCTETS = "application/octet-stream"
_REFS = "#/components/schemas/{name}"
_WRITE = "Needs a token for writing."

_DIGEST = {
    "name": "digest",
    "in": "path",
    "required": True,
    "description": "SHA-256 in lower-case hex.",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
}
_NAME = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "Letters, digits, ._:@+- and slashes between parts, such as profiles/library/nginx:1.27.",
    "schema": {"type": "string", "pattern": f"^{DOCUMENT_NAME.pattern}$", "maxLength": MAX_NAME_CHARS},
}
_RANGE = {"name": "Range", "in": "header", "description": "bytes=FIRST-LAST", "schema": {"type": "string"}}
_VERSION = {
    "name": VERSION_HEADER,
    "in": "header",
    "description": "The version that this is to become; refused with 409 if it is there already.",
    "schema": {"type": "integer", "minimum": 1, "maximum": MOST_VERSION},
}
_FRAMES = (
    "A sequence of frames to the end of the body: SHA-256 (32 bytes), size (u32, little-endian), blob. A blob begins "
    "with R (a content as it is), Z (a content as a zstd frame) or L (the layout of a large object: SHA-256 of the "
    "object's SHA-256 and all that follows, then records of a chunk's size (u32, little-endian) and SHA-256)."
)


def document(*, tokens: bool = True) -> dict[str, Any]:
    """The OpenAPI document; *tokens* says whether they are asked for."""
    schemas = msgspec.json.schema_components([Digests, Present, Problem, Stored, Joining, Node], ref_template=_REFS)[1]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gearworkers manager",
            "version": "1",
            "description": "Objects by SHA-256, and small named documents, for all nodes of a cluster.",
        },
        "security": [{"token": []}] if tokens else [],
        "paths": {path: {m: _with_problems(call) for m, call in calls.items()} for path, calls in _paths().items()},
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def page() -> str:
    """The same to read."""
    described = document()
    rows = "".join(
        f"<tr><td><b>{method.upper()}</b></td><td><code>{escape(path)}</code></td>"
        f"<td>{escape(call['summary'])} {escape(call.get('description', ''))}</td></tr>"
        for path, calls in described["paths"].items()
        for method, call in calls.items()
    )
    info = described["info"]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{info['title']}</title>"
        "<style>body{font:16px/1.5 sans-serif;margin:2em auto;max-width:64em;padding:0 1em}"
        "td{padding:.4em .8em;border-top:1px solid #ccc;vertical-align:top}code{white-space:nowrap}</style>"
        f"<h1>{info['title']}</h1><p>{info['description']} All of it, for programs: "
        f'<a href="openapi.json">openapi.json</a>.</p><table>{rows}</table></html>'
    )


def _paths() -> _Paths:
    return {**_objects(), **_blobs(), **_documents(), **_nodes(), **_about_itself()}


def _objects() -> _Paths:
    return {
        "/v1/objects/{digest}": {
            "head": _call("query_one", "Is this object there, and how large is it?", [_DIGEST]),
            "get": _call(
                "pull_one",
                "An object, whole or a range of it.",
                [_DIGEST, _RANGE],
                answers=_OCTETS,
                others={206: "The range.", 304: "It is what If-None-Match names: an object never changes."},
            ),
            "put": _call(
                "push_one",
                "Store an object.",
                [_DIGEST],
                f"Verified while it comes; visible only when whole. {_WRITE}",
                body=_OCTETS,
                answers=Stored,
                others={201: "It is new."},
            ),
        },
        "/v1/query": {
            "post": _call(
                "query", "Which of these are there?", [], f"At most {MAX_DIGESTS}.", body=Digests, answers=Present
            )
        },
    }


def _blobs() -> _Paths:
    """Those as stored, for who verifies and unpacks."""
    return {
        "/v1/blobs/{digest}": {
            "get": _call("pull_blob", "What is stored of an object or chunk, as stored.", [_DIGEST], answers=_OCTETS)
        },
        "/v1/pull": {
            "post": _call(
                "pull",
                "Many blobs in one stream, in the order asked for; those that are not there are left out.",
                [],
                _FRAMES,
                body=Digests,
                answers=blob_stream.CONTENT_TYPE,
            )
        },
        "/v1/push": {
            "post": _call(
                "push",
                "Store many blobs sent in one stream.",
                [],
                f"Each is verified before it is stored; chunks go before their layout. {_WRITE} {_FRAMES}",
                body=blob_stream.CONTENT_TYPE,
                answers=Stored,
            )
        },
    }


def _documents() -> _Paths:
    return {
        "/v1/documents/{name}": {
            "get": _call(
                "get_document", "A document; its version is in the header.", [_NAME], VERSION_HEADER, answers=_OCTETS
            ),
            "put": _call("put_document", "Replace a document.", [_NAME, _VERSION], _WRITE, body=_OCTETS, done=204),
        },
    }


def _nodes() -> _Paths:
    return {
        "/v1/join": {
            "post": _call(
                "join",
                "This node is there.",
                [],
                "Every request with a Gear-Node header says so too.",
                body=Joining,
                answers=Node,
            )
        },
        "/v1/nodes": {"get": _call("nodes", "The nodes heard of in the last ten minutes.", [], answers=list[Node])},
    }


def _about_itself() -> _Paths:
    return {
        "/metrics": {"get": _call("metrics", "Counters for Prometheus.", [], answers="text/plain")},
        "/healthz": {"get": _open(_call("health", "The server answers.", [], answers="text/plain"))},
        "/openapi.json": {"get": _open(_call("openapi", "This document.", [], answers="application/json"))},
        "/": {"get": _open(_call("documentation", "This document, to read.", [], answers="text/html"))},
    }


def _call(
    name: str,
    summary: str,
    parameters: list[dict[str, Any]],
    description: str = "",
    *,
    body: _Kind | None = None,
    answers: _Kind | None = None,
    done: int = 200,
    others: Mapping[int, str] = {},
) -> dict[str, Any]:
    """One operation; *others* are statuses of success beside *done*, of the same content but for 304."""
    call: dict[str, Any] = {"operationId": name, "summary": summary, "parameters": parameters}
    if description:
        call["description"] = description
    if body is not None:
        call["requestBody"] = {"required": True, "content": _content(body)}
    content = {} if answers is None else {"content": _content(answers)}
    call["responses"] = {str(done): {"description": "Done.", **content}}
    for status, what in others.items():
        call["responses"][str(status)] = {"description": what, **({} if status == 304 else content)}
    return call


def _content(kind: _Kind) -> dict[str, Any]:
    if isinstance(kind, str):
        return {kind: {}}
    schema = msgspec.json.schema_components([kind], ref_template=_REFS)[0][0]
    return {"application/json": {"schema": schema}}


def _open(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "security": []}


def _with_problems(call: dict[str, Any]) -> dict[str, Any]:
    problem = {"description": "What was wrong.", "content": _content(Problem)}
    return {**call, "responses": {**call["responses"], "4XX": problem, "5XX": problem}}
