"""Files of environment variables in the syntax of systemd's EnvironmentFile."""

from __future__ import annotations

import re

_QUOTED = r"""'[^']*'|"(?:\\.|[^"\\])*\""""
_VALUE = rf"""(?P<quoted>(?:[ \t]|{_QUOTED})*)(?P<plain>(?:\\.|[^\n\\])*)"""
_LINE = re.compile(rf"[ \t]*(?:(?P<name>[A-Za-z_]\w*)[ \t]*={_VALUE}|[^\n]*)\n?", re.DOTALL | re.ASCII)


def parse_environment(text: str) -> dict[str, str]:
    r"""Return the variables that *text* sets; the last assignment of a name wins.

    A line is NAME=VALUE, empty, or a comment that starts with # or ;. Values may be quoted by ' or ". A backslash
    escapes a character, and at the end of a line continues the line. Other lines are ignored, as systemd does.

    Source: systemd.exec(5), "EnvironmentFile=".
    """
    lines = (match for match in _LINE.finditer(text) if match["name"])
    return {line["name"]: _unquote(line["quoted"]) + _plain(line["plain"]) for line in lines}


def _unquote(text: str) -> str:
    return "".join(
        part[1:-1] if part[0] == "'" else re.sub(r'\\([\\"$`\n])', _escaped, part[1:-1])
        for part in re.findall(_QUOTED, text, re.DOTALL)
    )


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", _escaped, text.strip(), flags=re.DOTALL)


def _escaped(match: re.Match[str]) -> str:
    return match[1].strip("\n")
