"""Names in the documentation exist: files, settings, commands, targets. All settings and commands are documented."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from gearworkers.cli.main import app
from gearworkers.settings import Settings, documented
from tests.support import doc_checks

CHECKOUT = Path(__file__).resolve().parents[3]
REFERENCE = CHECKOUT / "docs" / "reference.md"
PAGES = sorted(
    [CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + [*CHECKOUT.glob("docs/**/*.md")]
)
CONFIGURATION = sorted(
    [CHECKOUT / name for name in ("docker-compose.yml", "Procfile", "Makefile", "packaging/redis.sh")]
    + [*CHECKOUT.glob("packaging/systemd/*")]
)
OTHER_VARIABLES = {"GEAR_MANAGER_ROOT", "GEAR_ENVIRONMENT_FILE"}
"""Variables that docker-compose.yml itself reads, and the one that names the file of settings."""
README_LINES = 150


@cache
def settings() -> dict[str, str]:
    """Return the default of every setting, without systemd's own variable."""
    return {setting.name: setting.default for setting in documented() if setting.name != "NOTIFY_SOCKET"}


@cache
def cli_commands() -> dict[str, set[str]]:
    """Return the options of every `gear` command, by the command's name."""
    return dict(_commands(typer.main.get_command(app), ""))


def _commands(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the commands below *command*, an object of Click or of Typer's own copy of Click."""
    if not hasattr(command, "commands"):
        yield name, {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        return
    for child in command.commands.values():
        yield from _commands(child, f"{name} {child.name}".strip())


@cache
def make_targets() -> set[str]:
    """Return the targets of the Makefile, with a `bench-NAME` for every benchmark."""
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    rows = (CHECKOUT / "bench" / "__main__.py").read_text().partition("ROWS:")[2].partition("}")[0]
    return targets | {f"bench-{name}" for name in re.findall(r'"([a-z-]+)":', rows)}


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_links_have_a_target(page: Path) -> None:
    assert doc_checks.dead_links(page, page.read_text()) == []


def test_commands_exist(page: Path) -> None:
    assert doc_checks.unknown_commands(page.read_text(), cli_commands()) == []


def test_make_targets_exist(page: Path) -> None:
    assert doc_checks.unknown_targets(page.read_text(), make_targets()) == []


def test_paths_and_modules_exist(page: Path) -> None:
    assert doc_checks.unknown_paths(page.read_text(), CHECKOUT) == []


@pytest.mark.parametrize("path", [*PAGES, *CONFIGURATION], ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_settings_exist(path: Path) -> None:
    assert doc_checks.unknown_settings(path.read_text(), settings().keys() | OTHER_VARIABLES) == []


def test_the_reference_has_every_setting() -> None:
    assert doc_checks.undocumented_settings(REFERENCE.read_text(), settings()) == []


def test_the_reference_has_the_default_of_every_setting() -> None:
    assert doc_checks.wrong_defaults(REFERENCE.read_text(), settings()) == []


def test_the_reference_has_every_command_and_option() -> None:
    assert doc_checks.undocumented_commands(REFERENCE.read_text(), cli_commands()) == []


def test_every_page_is_reachable_from_the_readme() -> None:
    assert set(PAGES) - doc_checks.reachable(CHECKOUT / "README.md") == set()


def test_the_readme_is_short() -> None:
    assert len((CHECKOUT / "README.md").read_text().splitlines()) <= README_LINES


def test_settings_accept_the_values_in_examples() -> None:
    text = "".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    typed = dict(re.findall(r"\b(GEAR_[A-Z_]+)='?([^\s']+)", "".join(blocks)))
    assert {"GEAR_REMOTE", "GEAR_MANAGER_LISTEN"} <= set(typed)
    Settings.from_environ(typed)


def test_make_help_lists_every_target_and_benchmark() -> None:
    text = (CHECKOUT / "Makefile").read_text()
    listed = set(re.findall(r"[a-z]+(?:-[a-z]+)*", text.partition("help:\n")[2].partition("\n\n")[0]))
    assert {target.removeprefix("bench-") for target in make_targets()} - {"help"} <= listed


# -- each check fails on a broken sample

KNOWN = {"fsck": {"--repair"}, "profile show": set()}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](missing.md)", "missing.md: no such file"),
        ("[a](#nowhere)", "#nowhere: no such heading"),
        ("# Some where\n[a](#somewhere)", "#somewhere: no such heading"),
        ("```\n# Only code\n```\n[a](#only-code)", "#only-code: no such heading"),
        ("[a](other.md#nowhere)", "other.md#nowhere: no such heading"),
    ],
)
def test_a_dead_link_is_found(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "other.md").write_text("# There\n")
    assert doc_checks.dead_links(tmp_path / "page.md", text) == [f"page.md: {problem}"]


def test_good_links_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# `GEAR_X`, and *more*\n")
    text = "# Two words\n## Two words\n[a](#two-words) [b](#two-words-1) [c](other.md#gear_x-and-more) [d](https://e.org/f)"
    assert doc_checks.dead_links(tmp_path / "page.md", text) == []


def test_a_page_without_links_to_it_is_not_reachable(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("[a](linked.md#here)")
    (tmp_path / "linked.md").write_text("")
    (tmp_path / "lost.md").write_text("")
    assert doc_checks.reachable(tmp_path / "README.md") == {tmp_path / "README.md", tmp_path / "linked.md"}


def test_an_unknown_setting_is_found() -> None:
    assert doc_checks.unknown_settings("set GEAR_ROOT and GEAR_ROTO", {"GEAR_ROOT"}) == ["GEAR_ROTO: no such setting"]


@pytest.mark.parametrize("text", ["", "`GEAR_ROOT` in prose", "| other | `GEAR_ROOT` |"])
def test_an_undocumented_setting_is_found(text: str) -> None:
    assert doc_checks.undocumented_settings(text, {"GEAR_ROOT"}) == ["GEAR_ROOT: not in a table"]


def test_a_wrong_default_is_found() -> None:
    text = "| `GEAR_A` | 1 (one) |\n| `GEAR_B` | `x` in `GEAR_A` |\n| `GEAR_C` | 10 |"
    problems = doc_checks.wrong_defaults(text, {"GEAR_A": "1", "GEAR_B": "x in GEAR_A", "GEAR_C": "1"})
    assert problems == ["GEAR_C: the default is 1, not 10"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`gear fsk`", "gear fsk: no such command"),
        ("`gear fsck --repiar`", "gear fsck --repiar: no such option"),
        ("`gear profile shwo IMAGE`", "gear profile shwo: no such command"),
        ("```sh\nA=1 x && docker exec y .venv/bin/gear fsk\n```", "gear fsk: no such command"),
        ("```console\n$ gear fsck \\\n  --all\n```", "gear fsck --all: no such option"),
    ],
)
def test_an_unknown_command_is_found(text: str, problem: str) -> None:
    assert doc_checks.unknown_commands(text, KNOWN) == [problem]


def test_good_commands_are_accepted() -> None:
    text = "`gear fsck --repair` `dockerd -s gear now`\n```console\n$ gear profile show x  # gear fsk\ngear fsk\n```"
    assert doc_checks.unknown_commands(text, KNOWN) == []


def test_an_undocumented_command_and_option_are_found() -> None:
    problems = ["gear fsck --repair: not documented", "gear profile show: not documented"]
    assert doc_checks.undocumented_commands("`gear fsck`", KNOWN) == problems


@pytest.mark.parametrize(
    "text", ["`make bulid`", "```sh\ngit pull && make -C /opt bulid\n```", "`make bench-import bulid`"]
)
def test_an_unknown_make_target_is_found(text: str) -> None:
    assert doc_checks.unknown_targets(text, {"build", "bench-import"}) == ["make bulid: no such target"]


@pytest.mark.parametrize(
    "word",
    [
        "tests/unit/test_missing.py",
        "gearworkers/missing/",
        "tests/e2e/test_missing*.py",
        "tests/unit/packaging/test_docs.py::test_missing",
        "layers/store.py",
        "gearworkers.workers.missing",
    ],
)
def test_an_unknown_path_is_found(word: str) -> None:
    assert doc_checks.unknown_paths(f"`{word}` `tests/unit/packaging/` `gearworkers.cli`", CHECKOUT) == [
        f"{word}: no such path"
    ]
