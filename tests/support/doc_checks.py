"""Checks of the documentation: each function returns one line per problem, an empty list if there is none."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

TOP_DIRECTORIES = ("gearworkers", "plugin_gateway", "packaging", "tests", "bench", "docs", ".ci")

Options = Mapping[str, Collection[str]]
"""Options by command, such as ``{"profile show": {"--help"}}``."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_SETTING = re.compile(r"\bGEAR_[A-Z_]*[A-Z]\b")
_PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?(?:::\w+)?")
_MODULE = re.compile(rf"(?:{'|'.join(TOP_DIRECTORIES[:5])})(?:\.\w+)+")


def prose(text: str) -> str:
    """Return *text* without its fenced code."""
    return _FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        repeated = (f"{slug}-{number}" for number in range(1, 1000))
        found.add(slug if slug not in found else next(name for name in repeated if name not in found))
    return found


def links(text: str) -> list[str]:
    """Return the targets of all links that do not leave the repository."""
    return [target for target in _LINK.findall(_SPAN.sub("", prose(text))) if "://" not in target]


def dead_links(page: Path, text: str) -> list[str]:
    """Find links of *page* to missing files and headings."""
    problems = []
    for target in links(text):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if name and not file.exists():
            problems.append(f"{page.name}: {target}: no such file")
        elif anchor and anchor not in anchors(text if file == page else file.read_text()):
            problems.append(f"{page.name}: {target}: no such heading")
    return problems


def reachable(start: Path) -> set[Path]:
    """Return the pages that links lead to from *start*, itself included."""
    found: set[Path] = set()
    pending = [start.resolve()]
    while pending:
        page = pending.pop()
        if page in found or page.suffix != ".md" or not page.exists():
            continue
        found.add(page)
        pending += [(page.parent / target.partition("#")[0]).resolve() for target in links(page.read_text())]
    return found


def unknown_settings(text: str, known: Collection[str]) -> list[str]:
    """Find GEAR_… names that are not settings."""
    return [f"{name}: no such setting" for name in sorted(set(_SETTING.findall(text)) - set(known))]


def undocumented_settings(text: str, known: Collection[str]) -> list[str]:
    """Find settings that no table of the page has in its first column."""
    first_cells = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    return [f"{name}: not in a table" for name in sorted(set(known) - set(re.findall(r"`([A-Z_]+)`", first_cells)))]


def wrong_defaults(text: str, defaults: Mapping[str, str]) -> list[str]:
    """Find settings whose table row does not begin its second column with the default; words may follow it."""
    problems = []
    for line in text.splitlines():
        cells = [cell.strip().replace("`", "") for cell in line.split("|")]
        if len(cells) > 2 and cells[1] in defaults:
            default, shown = defaults[cells[1]], cells[2]
            if not re.match(rf"{re.escape(default)}($|\W)", shown):
                problems.append(f"{cells[1]}: the default is {default}, not {shown}")
    return problems


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each shell command in code spans, ``sh`` blocks and the prompts of ``console`` blocks."""
    for span in _SPAN.findall(prose(text)):
        yield from _split(" ".join(span.split()))
    for language, block in _FENCE.findall(text):
        lines = block.replace("\\\n", " ").splitlines()
        if language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        if language in ("sh", "console"):
            for line in lines:
                yield from _split(line)


def unknown_commands(text: str, known: Options) -> list[str]:
    """Find ``gear`` commands and options that do not exist."""
    problems = []
    for words in commands(text):
        name, arguments = _gear_command(words, known)
        if name is None:
            continue
        if name not in known:
            if not any(command.startswith(f"{name} ") for command in known):
                problems.append(f"gear {name}: no such command")
            continue
        options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        problems += [f"gear {name} {option}: no such option" for option in sorted(options - set(known[name]))]
    return problems


def undocumented_commands(text: str, known: Options) -> list[str]:
    """Find ``gear`` commands and options that the page does not name in code."""
    named = {
        (name, word) for words in commands(text) for name, rest in [_gear_command(words, known)] for word in ["", *rest]
    }
    wanted = {(name, option) for name, options in known.items() for option in ["", *options]}
    return [f"gear {name} {option}: not documented".replace(" :", ":") for name, option in sorted(wanted - named)]


def unknown_targets(text: str, known: Collection[str]) -> list[str]:
    """Find ``make`` targets that do not exist."""
    problems = []
    for words in commands(text):
        if words[0] != "make":
            continue
        targets = [word for before, word in pairwise(words) if before != "-C" and word[0] != "-"]
        problems += [f"make {word}: no such target" for word in targets if "=" not in word and word not in known]
    return problems


def unknown_paths(text: str, root: Path) -> list[str]:
    """Find paths and modules of the repository, named in code, that do not exist below *root*."""
    problems = []
    for word in sorted({word for words in commands(text) for word in words}):
        is_path = _PATH.fullmatch(word) and (
            word.endswith(".py") or ("/" in word and word.split("/")[0] in TOP_DIRECTORIES)
        )
        if (is_path and not _exists(root, word)) or (_MODULE.fullmatch(word) and not _is_module(root, word)):
            problems.append(f"{word}: no such path")
    return problems


def _split(line: str) -> Iterator[list[str]]:
    """Yield the words of each command in a line of shell, without assignments and comments."""
    for part in re.split(r"&&|\|\||[;|]", re.sub(r"(^|\s)#.*", "", line)):
        try:
            words = shlex.split(part)
        except ValueError:  # an apostrophe in a code span that is not a command
            words = part.split()
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def _gear_command(words: list[str], known: Options) -> tuple[str | None, list[str]]:
    """Return the name of the ``gear`` command in *words* and its arguments; None if there is none."""
    for at, word in enumerate(words[:-1]):
        is_driver = at > 0 and words[at - 1] == "-s"
        if word.rpartition("/")[2] == "gear" and not is_driver and re.fullmatch(r"[a-z-]+", words[at + 1]):
            is_group = any(name.startswith(words[at + 1] + " ") for name in known)
            length = 2 if is_group and at + 2 < len(words) else 1
            return " ".join(words[at + 1 : at + 1 + length]), words[at + 1 + length :]
    return None, []


def _exists(root: Path, word: str) -> bool:
    path, _, test = word.partition("::")
    found = list(root.glob(path.rstrip("/")))
    return bool(found) and (not test or f"def {test}(" in found[0].read_text())


def _is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()
