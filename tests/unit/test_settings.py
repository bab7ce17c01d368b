"""Read settings from the environment, and document them."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from gearworkers.errors import InvalidInput
from gearworkers.settings import Settings, documented, unknown_variables


def test_settings_are_read_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown_user(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    assert Settings.from_environ().registry.docker_config == Path("/.docker")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GEAR_ROOT", "var/gear"),
        ("GEAR_FETCH_THREADS", "0"),
        ("GEAR_FILL_DELAY_S", "soon"),
        ("GEAR_PROFILE_WINDOW_S", "-1"),
        ("GEAR_REMOTE_TIMEOUT_S", "nan"),
        ("GEAR_LOG_LEVEL", "loud"),
        ("GEAR_XINO", "auto"),
    ],
)
def test_an_invalid_value_is_reported_with_its_setting(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=f"{name}.*{value}"):
        Settings.from_environ()


@pytest.mark.parametrize(
    ("name", "default", "unit"),
    [
        ("GEAR_STREAM_IDLE_S", "900", "s"),
        ("GEAR_LARGE_OBJECT_BYTES", "2097152", "bytes"),
        ("GEAR_XINO", "off", ""),
        ("GEAR_REMOTE", "none", ""),
        ("GEAR_NODE", "host name", ""),
        ("HTTPS_PROXY", "none", ""),
    ],
)
def test_every_setting_is_documented_with_default_and_unit(name: str, default: str, unit: str) -> None:
    found = next(one for one in documented() if one.name == name)
    assert (found.default, found.unit) == (default, unit) and found.help.endswith(".") and "\n" not in found.help


@pytest.mark.parametrize(
    ("name", "problems"),
    [
        ("GEAR_REMOT", ["GEAR_REMOT is not a setting and has no effect; did you mean GEAR_REMOTE?"]),
        ("GEAR_QQQQQQQQQQQQQQ", ["GEAR_QQQQQQQQQQQQQQ is not a setting and has no effect"]),
        ("GEAR_REMOTE", []),
        ("GEAR_ENVIRONMENT_FILE", []),
        ("OTHER_REMOT", []),
    ],
)
def test_an_unknown_variable_is_reported_with_the_likely_setting(name: str, problems: list[str]) -> None:
    assert unknown_variables({name: "x"}) == problems


def test_processes_log_unknown_variables_when_they_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEAR_REMOT", "/remote")
    monkeypatch.setenv("GEAR_RUN_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "plugin_gateway"],
        env={**os.environ, "GEAR_PLUGIN_SOCKET": "relative"},  # ends after it has read its settings
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "did you mean GEAR_REMOTE?" in done.stderr
