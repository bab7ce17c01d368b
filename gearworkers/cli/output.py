"""Exit codes and standard output of the `gear` commands."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape

from gearworkers.util.check import Check

EXIT_FAULTS = 1
"""`gear doctor`, `gear fsck`, `gear push` and `gear containerd-config --check` found faults, one line for each."""
EXIT_ERROR = 2
"""The command failed, with one line on stderr; also wrong arguments, which Typer reports itself."""

console = Console(soft_wrap=True, highlight=False)


def counted(count: int, noun: str) -> str:
    """Return ``1 fault``, ``2 faults``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print keys and values in two columns."""
    for key, value in pairs:
        console.print(f"{key:<16}{value}", markup=False)


def print_checks(checks: Iterable[Check]) -> None:
    """Print a line for each check."""
    for check in checks:
        mark = "[green]ok[/]" if check.ok else ("[red]WRONG[/]" if check.needed else "[yellow]note[/]")
        advice = f"; {check.advice}" if check.advice else ""
        console.print(f"{mark:<14} {escape(f'{check.name}: {check.found}{advice}')}")
