"""Dataclass fields that are read from environment variables.

A group of settings is a frozen dataclass whose fields are declared by `setting`, or are groups themselves. The types
check the values: msgspec converts the text of a variable to the type of its field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from gearworkers.errors import InvalidInput

T = TypeVar("T")

Count = Annotated[int, Meta(gt=0, description="a whole number above 0")]
Bytes = Annotated[int, Meta(gt=0, description="a whole number of bytes above 0", extra={"unit": "bytes"})]
Seconds = Annotated[float, Meta(gt=0, description="a number of seconds above 0", extra={"unit": "s"})]
SecondsOrZero = Annotated[float, Meta(ge=0, description="a number of seconds, at least 0", extra={"unit": "s"})]


class DocumentedSetting(NamedTuple):
    """One setting as its documentation shows it."""

    name: str
    """The environment variable: "GEAR_STREAM_IDLE_S"."""
    default: str
    """The default as one would write it into the environment ("900", "off"), or in words; "none" if unset."""
    unit: str
    """"s", "bytes" or ""."""
    help: str
    """One sentence, ending with a full stop."""


class _Declared(NamedTuple):
    name: str
    help: str
    default_text: str | None
    fallback: str | None


def setting(name: str, default: Any, help: str, *, default_text: str | None = None, fallback: str | None = None) -> Any:
    """Declare a dataclass field that the environment variable *name* sets.

    Args:
        name: The variable.
        default: The value of an unset or empty variable, or a function that returns it.
        help: One sentence.
        default_text: The default in words, where its value does not say enough.
        fallback: A variable to read if *name* is unset.
    """
    metadata = {"declared": _Declared(name, help, default_text, fallback)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def read_settings(group: type[T], environ: Mapping[str, str]) -> T:
    """Make a *group* of settings, and the groups inside it, from *environ*; an empty variable counts as unset.

    Raises:
        InvalidInput: A value does not fit its type; the message names the variable and the values allowed.
    """
    hints = get_type_hints(group, include_extras=True)
    values = {}
    for one in fields(group):  # type: ignore[arg-type]
        if is_dataclass(hints[one.name]):
            values[one.name] = read_settings(hints[one.name], environ)
            continue
        declared: _Declared = one.metadata["declared"]
        text = environ.get(declared.name) or environ.get(declared.fallback or "")
        if text:
            values[one.name] = _parse(declared.name, text, hints[one.name])
    return group(**values)


def document_settings(group: type[Any]) -> list[DocumentedSetting]:
    """List the settings of *group*, and of the groups inside it, in the order of their declaration."""
    return [_document(one, hint) for one, hint in _settings_in(group)]


def _settings_in(group: type[Any]) -> Iterator[tuple[Field[Any], Any]]:
    """Yield each setting of *group*, and of the groups inside it, with its type."""
    hints = get_type_hints(group, include_extras=True)
    for one in fields(group):
        if is_dataclass(hints[one.name]):
            yield from _settings_in(hints[one.name])
        else:
            yield one, hints[one.name]


def _document(one: Field[Any], hint: Any) -> DocumentedSetting:
    declared: _Declared = one.metadata["declared"]
    default = declared.default_text
    if default is None:
        default = ("on" if one.default else "off") if hint is bool else str(one.default or "none")
    unit = (hint.__metadata__[0].extra or {}).get("unit", "") if get_origin(hint) is Annotated else ""
    return DocumentedSetting(declared.name, default.removesuffix(".0"), unit, declared.help)


def _parse(name: str, text: str, hint: Any) -> Any:
    if hint is bool:
        return _parse(name, text, Literal["off", "on"]) == "on"
    is_number = get_origin(hint) is Annotated
    try:
        return msgspec.convert(text.strip() if is_number else text, hint, strict=False, dec_hook=_absolute)
    except msgspec.ValidationError as exc:
        raise InvalidInput(f"{name}={text}: set {_allowed(hint)}") from exc


def _absolute(kind: type[Path], text: str) -> Path:
    path = kind(text)
    if not path.is_absolute():
        raise ValueError("not absolute")
    return path


def _allowed(hint: Any) -> str:
    """Return the values that *hint* allows, in words."""
    if get_origin(hint) is Annotated:
        return str(hint.__metadata__[0].description)
    return f"one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else "an absolute path"
