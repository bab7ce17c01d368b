"""The filters of List: ``kind==committed,labels."containerd.io/snapshot.ref"~=sha256:.*``.

A filter is a list of selectors, which must all match. A selector is a field path, and perhaps an operator and a value;
without them it matches if the field is present. Of several filters one must match; no filter matches everything.

Source: containerd's pkg/filters, and core/snapshots, "Walk".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping

from gearworkers.errors import InvalidInput
from plugin_gateway.containerd.snapshot_table import Snapshot

Predicate = Callable[[Snapshot], bool]
_FIELD = re.compile(r'[A-Za-z]\w*|"(?:[^"\\]|\\.)*"')
_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s,]+')
_EXPRESSION = re.compile(r'"(?:[^"\\]|\\.)*"|/[^/]*/|\|[^|]*\||[^\s,/|][^\s,]*')
_OPERATORS: Mapping[str, Callable[[str, str], bool]] = {
    "==": lambda found, wanted: found == wanted,
    "!=": lambda found, wanted: found != wanted,
    "~=": lambda found, wanted: re.search(wanted, found) is not None,
}


def matcher(filters: Iterable[str]) -> Predicate:
    """Return a function that tells whether a snapshot matches any of *filters*.

    Raises:
        InvalidInput: A filter is malformed.
    """
    parsed = [_parsed(one) for one in filters]
    if not parsed:
        return lambda snapshot: True
    return lambda snapshot: any(all(selects(snapshot) for selects in selectors) for selectors in parsed)


def _parsed(text: str) -> list[Predicate]:
    at, selectors = 0, list[Predicate]()
    while at < len(text):
        if selectors:
            if text[at] != ",":
                raise InvalidInput(f"filter {text!r}: a comma is missing at character {at}")
            at += 1
        path, at = _field_path(text, at)
        operator = text[at : at + 2]
        if operator in _OPERATORS:
            value = (_EXPRESSION if operator == "~=" else _VALUE).match(text, at + 2)
            if value is None:
                raise InvalidInput(f"filter {text!r}: the value after {operator} is missing, or its quote is open")
            at = value.end()
            raw_quotes = "/|" if operator == "~=" else ""
            selectors.append(_selector(text, path, operator, _unquoted(text, value[0], raw_quotes)))
        else:
            selectors.append(_presence(path))
    return selectors


def _field_path(text: str, at: int) -> tuple[list[str], int]:
    path = list[str]()
    while True:
        field = _FIELD.match(text, at)
        if field is None:
            raise InvalidInput(f"filter {text!r}: a field is missing at character {at}")
        path.append(_unquoted(text, field[0]))
        at = field.end()
        if text[at : at + 1] != ".":
            return path, at
        at += 1


def _unquoted(text: str, token: str, raw_quotes: str = "") -> str:
    """Return the token without its quotes; *raw_quotes* are those inside which a backslash is an ordinary character."""
    if token[0] in raw_quotes:
        return token[1:-1]
    if token[0] != '"':
        return token
    try:
        return str(json.loads(token))
    except json.JSONDecodeError as exc:
        raise InvalidInput(f"filter {text!r}: {token} is not a valid string") from exc


def _presence(path: list[str]) -> Predicate:
    return lambda snapshot: _field(snapshot, path) is not None


def _selector(text: str, path: list[str], operator: str, value: str) -> Predicate:
    if operator == "~=":
        try:
            re.compile(value)
        except re.error as exc:
            raise InvalidInput(f"filter {text!r}: {value!r} is not a valid regular expression: {exc}") from exc
    compare = _OPERATORS[operator]

    def selects(snapshot: Snapshot) -> bool:
        found = _field(snapshot, path)
        return (found is not None or operator != "==") and compare(found or "", value)

    return selects


def _field(snapshot: Snapshot, path: list[str]) -> str | None:
    match path:
        case ["kind"]:
            return snapshot.kind.name.lower()
        case ["name"]:
            return snapshot.name
        case ["parent"]:
            return snapshot.parent
        case ["labels", *key]:
            return snapshot.labels.get(".".join(key))
    return None
