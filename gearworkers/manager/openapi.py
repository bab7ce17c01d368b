"""The description of the API: OpenAPI 3.1 for programs, and a page for people."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from types import GenericAlias
from typing import Any

import msgspec

from gearworkers.manager.documents import MAX_VERSION
from gearworkers.manager.nodes import NodeRecord
from gearworkers.manager.objects import PushResult
from gearworkers.remote import blob_stream
from gearworkers.remote.blobstore import DOCUMENT_NAME, MAX_NAME_CHARS
from gearworkers.remote.manager_messages import MAX_DIGESTS, VERSION_HEADER, Digests, Present, Problem

_Kind = str | type | GenericAlias
"""A media type, or the type of a JSON body."""

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
    "description": "Version of the new content; if the document has it already, the answer is 409.",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_VERSION},
}
_FRAMES = (
    "Frames to the end of the body: SHA-256 (32 bytes), size (u32, little-endian), blob. A blob begins with R (an "
    "uncompressed content), Z (a content as a zstd frame) or L (the layout of a large object: SHA-256 of the object's "
    "SHA-256 and the rest of the blob, then records of a chunk's size (u32, little-endian) and SHA-256)."
)


def document(*, tokens: bool = True) -> dict[str, Any]:
    """Return the OpenAPI document; *tokens*: whether the server requires tokens."""
    schemas = msgspec.json.schema_components([Digests, Present, Problem, PushResult, NodeRecord], ref_template=_REFS)[1]
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
    """Return the description as HTML."""
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
        f"<h1>{info['title']}</h1><p>{info['description']} For programs: "
        f'<a href="openapi.json">openapi.json</a>.</p><table>{rows}</table></html>'
    )


def _paths() -> _Paths:
    return {**_objects(), **_blobs(), **_documents(), **_nodes(), **_service()}


def _objects() -> _Paths:
    return {
        "/v1/objects/{digest}": {
            "head": _call("query_one", "Return the size of an object; 404 if it is absent.", [_DIGEST]),
            "get": _call(
                "pull_one",
                "Return an object, or a range of it.",
                [_DIGEST, _RANGE],
                answers=_OCTETS,
                others={206: "The range.", 304: "If-None-Match names the object; objects never change."},
            ),
            "put": _call(
                "push_one",
                "Store an object.",
                [_DIGEST],
                f"It is verified on its way in and visible only when whole. {_WRITE}",
                body=_OCTETS,
                answers=PushResult,
                others={201: "The object is new."},
            ),
        },
        "/v1/query": {
            "post": _call(
                "query",
                "Return the digests that are present.",
                [],
                f"At most {MAX_DIGESTS}.",
                body=Digests,
                answers=Present,
            )
        },
    }


def _blobs() -> _Paths:
    """Describe the calls for blobs. The manager returns blobs as stored; clients verify and decode them."""
    return {
        "/v1/blobs/{digest}": {
            "get": _call("pull_blob", "Return the blob of an object or chunk, as stored.", [_DIGEST], answers=_OCTETS)
        },
        "/v1/pull": {
            "post": _call(
                "pull",
                "Return many blobs in one stream, in the order of the request; absent ones are left out.",
                [],
                _FRAMES,
                body=Digests,
                answers=blob_stream.CONTENT_TYPE,
            )
        },
        "/v1/push": {
            "post": _call(
                "push",
                "Store many blobs from one stream.",
                [],
                f"Each is verified before it is stored; chunks must precede their layout. {_WRITE} {_FRAMES}",
                body=blob_stream.CONTENT_TYPE,
                answers=PushResult,
            )
        },
    }


def _documents() -> _Paths:
    return {
        "/v1/documents/{name}": {
            "get": _call(
                "get_document",
                "Return a document; its version is in a header.",
                [_NAME],
                VERSION_HEADER,
                answers=_OCTETS,
            ),
            "put": _call("put_document", "Replace a document.", [_NAME, _VERSION], _WRITE, body=_OCTETS, done=204),
        },
    }


def _nodes() -> _Paths:
    return {
        "/v1/nodes": {
            "get": _call(
                "nodes",
                "Return the nodes of the last ten minutes.",
                [],
                "Every request with a Gear-Node header registers its node.",
                answers=list[NodeRecord],
            )
        },
    }


def _service() -> _Paths:
    return {
        "/metrics": {"get": _call("metrics", "Return the Prometheus metrics.", [], answers="text/plain")},
        "/healthz": {"get": _open(_call("health", "Return 200 while the server answers.", [], answers="text/plain"))},
        "/openapi.json": {"get": _open(_call("openapi", "Return this document.", [], answers="application/json"))},
        "/": {"get": _open(_call("documentation", "Return this document as HTML.", [], answers="text/html"))},
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
    """Return an operation; *others* are further statuses of success, with the same content as *done* except for 304."""
    call: dict[str, Any] = {"operationId": name, "summary": summary, "parameters": parameters}
    if description:
        call["description"] = description
    if body is not None:
        call["requestBody"] = {"required": True, "content": _content(body)}
    content = {} if answers is None else {"content": _content(answers)}
    call["responses"] = {str(done): {"description": "Done.", **content}}
    for status, meaning in others.items():
        call["responses"][str(status)] = {"description": meaning, **({} if status == 304 else content)}
    return call


def _content(kind: _Kind) -> dict[str, Any]:
    if isinstance(kind, str):
        return {kind: {}}
    schema = msgspec.json.schema_components([kind], ref_template=_REFS)[0][0]
    return {"application/json": {"schema": schema}}


def _open(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "security": []}


def _with_problems(call: dict[str, Any]) -> dict[str, Any]:
    problem = {"description": "The error.", "content": _content(Problem)}
    return {**call, "responses": {**call["responses"], "4XX": problem, "5XX": problem}}
