"""Environment files are read as systemd reads them, and the environment wins over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gearworkers import settings
from gearworkers.errors import InvalidInput
from gearworkers.settings import load_environment_file
from gearworkers.util.environment_file import parse_environment


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A=b", "b"),
        ("  A = b c  \n", "b c"),
        ("A='b \\ c'", "b \\ c"),
        ('A="b \\" \\n"', 'b " \\n'),
        ('A="b\nc"', "b\nc"),
        ("A=b#c", "b#c"),
        ("A=b \\\nc", "b c"),
        ("A=b\\'c", "b'c"),
        ("A=\"b\"'c'd", "bcd"),
        ("A=", ""),
        ("A=\nB=c", ""),
        ("A=x\nA=b", "b"),
        ("# A=x\n;A=x\nA=b\n#A=x", "b"),
    ],
)
def test_values_are_read_as_systemd_reads_them(text: str, value: str) -> None:
    assert parse_environment(text)["A"] == value


def test_lines_without_an_assignment_are_ignored() -> None:
    assert parse_environment("export A=b\nwords\n\nB=c\n") == {"B": "c"}


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "environment"
    file.write_text("GEAR_ROOT=/file\nGEAR_REMOTE=/remote\n")
    environ = {"GEAR_ENVIRONMENT_FILE": str(file), "GEAR_ROOT": "/own"}
    load_environment_file(environ)
    assert (environ["GEAR_ROOT"], environ["GEAR_REMOTE"]) == ("/own", "/remote")


@pytest.mark.parametrize(
    ("own", "remote"),
    [
        ({}, "/remote"),
        ({"GEAR_ROOT": "/own"}, None),
        ({"GEAR_RUN_DIR": "/own"}, None),
        ({"GEAR_ENVIRONMENT_FILE": "off"}, None),
    ],
)
def test_the_units_file_is_read_only_for_the_stack_of_the_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, str], remote: str | None
) -> None:
    file = tmp_path / "environment"
    file.write_text("GEAR_REMOTE=/remote\n")
    monkeypatch.setattr(settings, "ENVIRONMENT_FILE", str(file))
    environ = dict(own)
    load_environment_file(environ)
    assert environ.get("GEAR_REMOTE") == remote


def test_a_host_without_the_units_file_uses_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "ENVIRONMENT_FILE", str(tmp_path / "none"))
    environ: dict[str, str] = {}
    load_environment_file(environ)
    assert environ == {}


def test_a_named_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"cannot read settings from {tmp_path}/none: No such file"):
        load_environment_file({"GEAR_ENVIRONMENT_FILE": f"{tmp_path}/none"})


def test_a_file_for_root_only_is_a_notice_to_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "Permission denied; run `gear` as root" in load_environment_file({})
    with pytest.raises(InvalidInput, match="Permission denied"):
        load_environment_file({"GEAR_ENVIRONMENT_FILE": f"{tmp_path}/environment"})
