"""`gear` as an administrator meets it: an error is one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gearworkers.cli import doctor, main
from gearworkers.mounts.probe import Check
from gearworkers.util import log


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["gear", *words])
    main.main()


@pytest.fixture(autouse=True)
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node on which nothing has run yet; and the log of the tests stays what it is."""
    monkeypatch.setattr(log, "configure_logging", lambda settings: None)
    (tmp_path / "remote").mkdir()
    for name, path in (("ROOT", "gear"), ("RUN_DIR", "run"), ("PLUGIN_SOCKET", "gear.sock"), ("REMOTE", "remote")):
        monkeypatch.setenv(f"GEAR_{name}", str(tmp_path / path))


@pytest.mark.parametrize("command", ["status", "gc", "fsck", "push"])
def test_where_no_store_is_a_command_says_so(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, command)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"gear: {tmp_path / 'gear'} holds no store; set GEAR_ROOT") and told.count("\n") == 1


@pytest.mark.parametrize("found", ["http://[fd00::1]:2019 answers", "/srv/[/x] answers"])
def test_doctor_prints_what_it_found_to_the_letter(
    found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda settings: [Check("Remote", True, False, found)])
    with pytest.raises(SystemExit):
        run(monkeypatch, "doctor")
    assert capsys.readouterr().out == f"ok   Remote: {found}\n"
