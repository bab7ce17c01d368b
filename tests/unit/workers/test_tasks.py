"""Celery tasks: acknowledgement, retries, and maintenance with and without a gateway."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from celery.concurrency.prefork import TaskPool
from celery.exceptions import Retry
from kombu.asynchronous import Hub

from gearworkers.engine.engine import Engine
from gearworkers.errors import FailedPrecondition, InvalidInput, Unavailable
from gearworkers.images.plan import ConversionPlan, ImagePlan, LayerJob
from gearworkers.settings import Settings
from gearworkers.workers.celery_app import (
    IMAGE_TASK,
    LAYER_TASK,
    RETRIES,
    TIME_LIMIT_S,
    VISIBILITY_TIMEOUT_S,
    RepairPool,
    make_app,
    retry_delay_s,
)
from gearworkers.workers.execute import execute
from gearworkers.workers.messages import ApplyDiff, CollectGarbage, Dedupe, Granted, Push, WorkerJob, frame
from plugin_gateway.graphdriver import options
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.answers import Answer, answering

HEAVY = ("gearworkers.apply_diff", "gearworkers.diff")
MAINTENANCE = ("gearworkers.push", "gearworkers.collect_garbage", "gearworkers.dedupe")


@pytest.fixture
def app(tmp_path: Path) -> Any:
    app = make_app(Settings(run_dir=tmp_path))
    app.loader.import_default_modules()
    app.finalize()
    return app


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a GEAR_ROOT without a gateway; the environment names it, as for a worker."""
    monkeypatch.setenv("GEAR_ROOT", str(tmp_path / "gear"))
    monkeypatch.setenv("GEAR_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "gear"


def test_heavy_jobs_are_acknowledged_early_and_maintenance_late(app: Any) -> None:
    assert [app.tasks[name].acks_late for name in HEAVY] == [False, False]
    assert all(app.tasks[name].acks_late and app.tasks[name].reject_on_worker_lost for name in MAINTENANCE)


def test_jobs_keep_no_result_and_messages_are_json(app: Any) -> None:
    assert all(app.tasks[name].ignore_result for name in HEAVY + MAINTENANCE)
    assert app.conf.accept_content == ["json"] and app.conf.task_serializer == "json"
    assert app.conf.worker_prefetch_multiplier == 1


def test_redis_redelivers_only_after_every_limit_and_delay(app: Any) -> None:
    limits = [app.tasks[name].time_limit for name in MAINTENANCE]
    assert limits == [TIME_LIMIT_S] * len(MAINTENANCE)
    longest_s = TIME_LIMIT_S + max(retry_delay_s(attempt) for attempt in range(RETRIES))
    assert app.conf.broker_transport_options["visibility_timeout"] == VISIBILITY_TIMEOUT_S > longest_s


def test_the_delay_between_attempts_doubles_up_to_a_bound() -> None:
    assert [retry_delay_s(attempt) for attempt in range(10)] == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def collecting(root: Path) -> CollectGarbage:
    return CollectGarbage(gear_root=str(root))


def arguments(job: WorkerJob) -> dict[str, object]:
    """Return the arguments of a job's task."""
    return {"job": msgspec.to_builtins(job)}


def test_a_heavy_job_without_a_gateway_is_dropped(root: Path) -> None:
    settings = Settings.from_environ()
    assert execute(settings, ApplyDiff(gear_root=str(root), id="a"), "worker") is None
    assert not root.exists()


def test_maintenance_without_a_gateway_is_done(app: Any, root: Path) -> None:
    Engine.of(Settings.from_environ()).prepare()
    result = execute(Settings.from_environ(), collecting(root), "worker")
    assert result is not None
    assert (result.error, result.figures) == ("", {"removed_objects": 0, "removed_bytes": 0})
    app.tasks["gearworkers.collect_garbage"](**arguments(collecting(root)))


def test_a_process_does_the_granted_job_instead_of_the_job_from_redis(root: Path) -> None:
    settings = Settings.from_environ()
    Engine.of(settings).prepare()
    reports: list[bytes] = []

    def grant(listener: socket.socket) -> None:
        control, _ = listener.accept()
        with control:
            control.recv(4096)
            control.sendall(frame(Granted(collecting(root))))
            reports.append(control.recv(4096))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(settings.streams_socket))
        listener.listen()
        gateway = threading.Thread(target=grant, args=(listener,))
        gateway.start()
        result = execute(settings, Dedupe(gear_root=str(root), id="forged"), "worker")
        gateway.join()
    assert result is not None and result.figures == {"removed_objects": 0, "removed_bytes": 0}
    assert reports == [frame(result)]


def test_a_task_takes_only_its_own_kind_of_job(app: Any, root: Path) -> None:
    with pytest.raises(msgspec.ValidationError):
        app.tasks["gearworkers.apply_diff"](**arguments(collecting(root)))


def test_maintenance_is_done_for_the_roots_of_dockerd_and_of_the_settings_only(root: Path, tmp_path: Path) -> None:
    settings = Settings.from_environ()
    settings.run_dir.mkdir()
    elsewhere, named = tmp_path / "elsewhere", tmp_path / "named"
    driver = GearDriver(settings)
    driver.prepare()
    driver.init("", [f"gear.root={named}"], (), ())
    assert options.load(settings.run_dir)
    for refused in (elsewhere, Path("/")):
        assert execute(settings, collecting(refused), "worker") is None
    assert not elsewhere.exists()
    for accepted in (root, named):
        result = execute(settings, collecting(accepted), "worker")
        assert result is not None and result.error == ""


def test_redelivered_maintenance_for_another_root_is_rejected(app: Any, root: Path, tmp_path: Path) -> None:
    other = Settings(gear_root=tmp_path / "other", run_dir=tmp_path)
    Engine.of(other).prepare()
    garbage = other.gear_public_cache_path / "\1A" / "x"
    garbage.touch()
    collect = app.tasks["gearworkers.collect_garbage"]
    forged = arguments(collecting(other.gear_root))
    collect.push_request(retries=0, called_directly=False, kwargs=forged, delivery_info={"redelivered": True})
    try:
        collect.run(**forged)
    finally:
        collect.pop_request()
    assert garbage.exists()


def layer_job(source: str) -> LayerJob:
    return LayerJob(source, "127.0.0.1:1/target", f"sha256:{'0' * 64}", 1, f"sha256:{'1' * 64}")


def test_a_conversion_for_another_remote_is_rejected_and_sends_no_token(
    app: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEAR_REMOTE", "https://user:secret@manager.example.org:2019/")
    monkeypatch.setenv("GEAR_REMOTE_TOKEN", "token")
    job = msgspec.to_builtins(layer_job("127.0.0.1:1/source"))
    with answering(lambda _: Answer(200)) as listener:
        with pytest.raises(FailedPrecondition) as refusal:
            app.tasks[LAYER_TASK](job, listener.url)
        assert listener.requests == []
    said = str(refusal.value)
    assert listener.url in said and "https://manager.example.org:2019 " not in said
    assert "GEAR_REMOTE=https://manager.example.org:2019;" in said
    assert "secret" not in said and "--local" in said


@pytest.mark.parametrize("kind", ["oci", "docker-archive"])
def test_a_conversion_of_a_path_is_rejected(
    app: Any, root: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEAR_REMOTE", str(tmp_path))
    source = f"{kind}:{tmp_path}/not-there"
    with pytest.raises(InvalidInput, match="registries only"):
        app.tasks[LAYER_TASK](msgspec.to_builtins(layer_job(source)), str(tmp_path))
    plan = ConversionPlan(source, "127.0.0.1:1/target", "", False, (ImagePlan("", "", ()),))
    with pytest.raises(InvalidInput, match="registries only"):
        app.tasks[IMAGE_TASK]([], msgspec.to_builtins(plan))


def test_a_push_to_an_unreachable_remote_is_retried_and_one_without_a_remote_is_not(
    app: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine.of(Settings.from_environ()).prepare()
    push = app.tasks["gearworkers.push"]
    job = arguments(Push(gear_root=str(root)))
    push.push_request(retries=0, called_directly=False, is_eager=True, kwargs=job, delivery_info={})
    try:
        push.run(**job)
        monkeypatch.setattr(Engine, "push_pending", _unavailable)
        with pytest.raises(Retry, match="2s"):
            push.run(**job)
    finally:
        push.pop_request()


def _unavailable(engine: Engine) -> int:
    raise Unavailable("the remote is unreachable")


@pytest.mark.slow
def test_a_process_that_celery_no_longer_watches_is_watched_again(app: Any) -> None:
    pool = TaskPool(1, app=app, initargs=(app, "tests"), threads=False)
    hub: Any = Hub()  # type: ignore[no-untyped-call]
    pool.start()
    try:
        pool.register_with_event_loop(hub)
        (process,) = pool._pool._pool
        pool._pool._untrack_child_process(process, hub)
        RepairPool(SimpleNamespace(steps=[])).start(SimpleNamespace(pool=pool))
        pool.register_with_event_loop(hub)
        assert process._sentinel_poll in hub.readers
    finally:
        pool.terminate()
        hub.close()
