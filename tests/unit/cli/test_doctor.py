"""Checks of `gear doctor`: FUSE, lazy file server, Redis, gateway and Docker."""

from __future__ import annotations

import json
import os
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from gearworkers.cli import doctor
from gearworkers.cli.status import STATUS_TIMEOUT_S, gateway_status
from gearworkers.lazyfs.fuse_probe import check_features, check_fuse
from gearworkers.lazyfs.fuse_protocol import InitFlag
from gearworkers.settings import Settings
from tests.support.gateways import run_gateway
from tests.support.lazynode import gear_tar, lazy_node
from tests.support.processes import Daemon, listens

SNAPSHOTTER_TYPE = "io.containerd.snapshotter.v1"


def test_the_fuse_check_leaves_nothing_mounted(tmp_path_factory: pytest.TempPathFactory) -> None:
    def mounted() -> list[str]:
        """Return the FUSE mounts, without those of concurrent tests."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if " - fuse" in line and str(tmp_path_factory.getbasetemp().parent) not in line]

    before = mounted()
    check = check_fuse()
    assert check.ok, check
    assert "unanswered requests are sent again" in check.found
    assert mounted() == before


def test_the_fuse_check_gives_advice_for_a_missing_and_for_an_old_fuse() -> None:
    check = check_fuse(Path("/dev/no-fuse"))
    assert not check.ok
    assert not check.needed
    assert "/dev/no-fuse" in check.found
    assert "6.9" in check_features(InitFlag.PASSTHROUGH).advice


@pytest.mark.slow
def test_the_lazy_file_server_check_reports_a_stopped_server_and_failed_fetches(tmp_path: Path) -> None:
    assert "does not run" in doctor.lazyfs_check(replace(Settings(), run_dir=tmp_path)).found
    with lazy_node(tmp_path) as node:
        node.apply(gear_tar({"file": b"missing in the remote"}), "image")
        assert doctor.lazyfs_check(node.settings).found == "runs, 1 incomplete layer"
        with pytest.raises(OSError, match="Input/output"):
            (node.run("c1") / "file").read_bytes()
        assert doctor.lazyfs_check(node.settings).found == "1 object could not be fetched"


def test_the_redis_check_hides_the_password_of_the_url() -> None:
    check = doctor.redis_check(replace(Settings(), broker_url="redis://user:secret@127.0.0.1:1/0"))
    assert not check.ok and "127.0.0.1:1" in check.advice
    assert "secret" not in f"{check.found} {check.advice}"


def test_the_redis_check_reports_a_server_that_refuses_writes(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    options = {"port": "0", "unixsocket": str(path), "dir": str(tmp_path), "min-replicas-to-write": "1"}
    command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
    server = Daemon(command, tmp_path / "log", os.environ)
    server.start()
    try:
        server.wait_until(lambda: listens(path), "Redis's socket")
        check = doctor.redis_check(replace(Settings(), run_dir=tmp_path))
    finally:
        server.stop()
    assert not check.ok and check.found.startswith("refuses tasks (NOREPLICAS")


def test_the_status_command_waits_for_a_slow_gateway(tmp_path: Path) -> None:
    def count() -> list[tuple[str, str]]:
        time.sleep(0.5)
        return [("Objects", "1000000")]

    settings = Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", plugin_socket="off")
    running = run_gateway(settings, lambda claimed: None)
    running.driver.status = count  # type: ignore[method-assign]
    try:
        assert gateway_status(settings, timeout_s=0.1) is None
        found = gateway_status(settings)
    finally:
        running.stop()
    assert found is not None and ("Objects", "1000000") in found
    assert STATUS_TIMEOUT_S >= 60


@pytest.mark.parametrize(
    ("version", "ok", "words"),
    [
        ("19.3", False, "older"),
        ("20.10", True, ""),
        ("26.1", True, ""),
        ("27.5", True, "DOCKERD_DEPRECATED_GRAPHDRIVER_PLUGINS=1"),
        ("28.0", False, "has no graphdriver plugins"),
    ],
)
def test_the_docker_check_names_the_problem_of_a_version(version: str, ok: bool, words: str) -> None:
    check = doctor.docker_version_check(version, *map(int, version.split(".")))
    assert check.ok == ok and words in f"{check.found}; {check.advice}"


@pytest.mark.parametrize(("snapshotter", "ok"), [("gear", True), ("overlayfs", False)])
def test_the_docker_check_names_the_snapshotter_of_containerds_image_store(snapshotter: str, ok: bool) -> None:
    check = doctor.docker_snapshotter_check("28.5.2", snapshotter)
    assert check.ok == ok and snapshotter in check.found


def test_the_containerd_check_reports_a_containerd_that_does_not_answer(tmp_path: Path) -> None:
    settings = replace(Settings(), run_dir=tmp_path, containerd_address=tmp_path / "containerd.sock")
    (check,) = doctor.containerd_lines(settings)
    assert not check.ok and str(settings.containerd_address) in check.found


def test_the_remote_check_hides_the_password_of_the_url(tmp_path: Path) -> None:
    url = f"{tmp_path}/remote"
    Path(url).mkdir()
    assert doctor.remote_check(with_remote(tmp_path, url)).found == f"{url} answers"
    check = doctor.remote_check(with_remote(tmp_path, "http://user:secret@127.0.0.1:1"))
    assert not check.ok and check.needed and "127.0.0.1:1" in check.found
    assert "secret" not in f"{check.found} {check.advice}"


def with_remote(tmp_path: Path, url: str) -> Settings:
    settings = Settings(gear_root=tmp_path / "gear")
    return replace(settings, remote=replace(settings.remote, url=url))


@contextmanager
def dockerd(path: Path, info: dict[str, object]) -> Iterator[None]:
    """Answer GET /info as dockerd does, on the socket *path*."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(info).encode()
            self.send_response(200 if self.path == "/info" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with socketserver.UnixStreamServer(os.fspath(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("info", "found"),
    [
        (
            {"ServerVersion": "26.1.5", "ExperimentalBuild": True, "Driver": "gear", "DriverStatus": None},
            ["26.1.5", "on"],
        ),
        (
            {"ServerVersion": "28.5.2", "Driver": "gear", "DriverStatus": [["driver-type", SNAPSHOTTER_TYPE]]},
            ["28.5.2 with containerd's image store, snapshotter gear"],
        ),
    ],
)
def test_the_docker_check_needs_no_docker_program(
    info: dict[str, object], found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = replace(Settings(), docker_host=f"unix://{tmp_path}/docker.sock")
    with dockerd(tmp_path / "docker.sock", info):
        checks = doctor.docker_checks(settings)
    assert [check.found for check in checks] == found and all(check.ok for check in checks)


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ({"Driver": "overlay2", "DriverStatus": None}, "26.1.5 stores images by driver overlay2"),
        (
            {"Driver": "overlayfs", "DriverStatus": [["driver-type", SNAPSHOTTER_TYPE]]},
            "26.1.5 with containerd's image store, snapshotter overlayfs",
        ),
    ],
)
def test_a_dockerd_with_another_storage_driver_is_an_error(info: dict[str, object], found: str, tmp_path: Path) -> None:
    settings = replace(Settings(), docker_host=f"unix://{tmp_path}/docker.sock")
    with dockerd(tmp_path / "docker.sock", {"ServerVersion": "26.1.5", "ExperimentalBuild": True} | info):
        (check,) = doctor.docker_checks(settings)
    assert (check.ok, check.needed, check.found) == (False, True, found)


@pytest.mark.parametrize(
    ("served", "ok", "found"),
    [
        ({"import@n", "push@n", "convert"}, True, "serve import@n, push@n; convert worker found"),
        ({"import@n", "push@n"}, True, "serve import@n, push@n; no convert worker"),
        ({"import@n", "push@other"}, False, "no worker serves push@n"),
    ],
)
def test_the_workers_check_names_convert_workers(served: set[str], ok: bool, found: str) -> None:
    check = doctor.queues_check("n", served)
    assert check.ok is ok and check.found.startswith(found)


@pytest.mark.parametrize("host", ["tcp://host:abc", "tcp://[::1", "host"])
def test_a_malformed_docker_host_is_reported(host: str) -> None:
    (check,) = doctor.docker_checks(replace(Settings(), docker_host=host))
    assert not check.ok and f"DOCKER_HOST={host}: set unix:///PATH" in check.found
