"""Run `gear` as an administrator does: an error is one line that says what to do."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from gearworkers.cli import doctor, main
from gearworkers.settings import Settings
from gearworkers.util import log
from gearworkers.util.check import Check
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.tiny import tar_of


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["gear", *words])
    main.main()


@pytest.fixture(autouse=True)
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set up a node on which nothing has run yet, and keep the logging configuration of the tests."""
    monkeypatch.setattr(log, "configure_logging", lambda settings: None)
    (tmp_path / "remote").mkdir()
    for name, path in (("ROOT", "gear"), ("RUN_DIR", "run"), ("PLUGIN_SOCKET", "gear.sock"), ("REMOTE", "remote")):
        monkeypatch.setenv(f"GEAR_{name}", str(tmp_path / path))


@pytest.mark.parametrize("command", ["status", "gc", "fsck", "push"])
def test_a_command_without_a_store_prints_one_line_of_advice(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, command)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"gear: {tmp_path / 'gear'} holds no store; set GEAR_ROOT") and printed.count("\n") == 1


@pytest.mark.parametrize("found", ["http://[fd00::1]:2019 answers", "/srv/[/x] answers"])
def test_doctor_prints_square_brackets_literally(
    found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda settings: [Check("Remote", True, False, found)])
    with pytest.raises(SystemExit):
        run(monkeypatch, "doctor")
    assert capsys.readouterr().out == f"ok   Remote: {found}\n"


def test_fsck_without_a_lazy_file_server_counts_the_faults_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = GearDriver(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run"))
    driver.prepare()
    driver.create("image", "")
    driver.apply_diff("image", "", io.BytesIO(tar_of({"file": b"content"})))
    driver.engine.objects.remove(hashlib.sha256(b"content").digest())
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "fsck", "--repair")
    printed = capsys.readouterr()
    assert (ended.value.code, printed.err) == (1, "")
    assert "start `gear lazyfs`: it fetches each missing object" in printed.out
    assert printed.out.endswith("\n1 fault\n")
