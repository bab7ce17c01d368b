"""What Celery is told, and what a task does: acknowledgement, retries, upkeep with and without a gateway."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from celery.concurrency.prefork import TaskPool
from celery.exceptions import Retry
from kombu.asynchronous import Hub

from gearworkers.engine.engine import Engine
from gearworkers.errors import FailedPrecondition, InvalidInput
from gearworkers.images.convert import ImagePlan, LayerJob, Plan
from gearworkers.settings import Settings
from gearworkers.workers.celery_app import (
    IMAGE_TASK,
    LAYER_TASK,
    RETRIES,
    TIME_LIMIT_S,
    VISIBILITY_TIMEOUT_S,
    _MendPool,
    make_app,
    retry_delay_s,
)
from gearworkers.workers.execute import perform
from gearworkers.workers.messages import Order
from plugin_gateway.graphdriver import options
from plugin_gateway.graphdriver.driver import GearDriver
from tests.support.answers import Answer, answering

HEAVY = ("gearworkers.apply_diff", "gearworkers.diff")
UPKEEP = ("gearworkers.push", "gearworkers.collect_garbage", "gearworkers.dedupe")


@pytest.fixture
def app(tmp_path: Path) -> Any:
    app = make_app(Settings(run_dir=tmp_path))
    app.loader.import_default_modules()
    app.finalize()
    return app


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GEAR_ROOT without a gateway, named by the environment as for a worker."""
    monkeypatch.setenv("GEAR_ROOT", str(tmp_path / "gear"))
    monkeypatch.setenv("GEAR_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "gear"


def test_streams_are_acknowledged_early_and_upkeep_late(app: Any) -> None:
    assert [app.tasks[name].acks_late for name in HEAVY] == [False, False]
    assert all(app.tasks[name].acks_late and app.tasks[name].reject_on_worker_lost for name in UPKEEP)


def test_nothing_keeps_a_result_and_only_json_is_spoken(app: Any) -> None:
    assert all(app.tasks[name].ignore_result for name in HEAVY + UPKEEP)
    assert app.conf.accept_content == ["json"] and app.conf.task_serializer == "json"
    assert app.conf.worker_prefetch_multiplier == 1


def test_redis_redelivers_only_after_every_limit_and_delay(app: Any) -> None:
    limits = [app.tasks[name].time_limit for name in UPKEEP]
    assert limits == [TIME_LIMIT_S] * len(UPKEEP)
    longest_s = TIME_LIMIT_S + max(retry_delay_s(attempt) for attempt in range(RETRIES))
    assert app.conf.broker_transport_options["visibility_timeout"] == VISIBILITY_TIMEOUT_S > longest_s


def test_the_delay_between_attempts_doubles_up_to_a_bound() -> None:
    assert [retry_delay_s(attempt) for attempt in range(10)] == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_importing_the_application_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEAR_ROOT", "not absolute: reading it would raise")
    monkeypatch.delitem(sys.modules, "gearworkers.workers.celery_app")
    assert "app" not in vars(importlib.import_module("gearworkers.workers.celery_app"))


def test_a_stream_order_without_a_gateway_is_dropped(root: Path) -> None:
    settings = Settings.from_environ()
    assert perform(settings, Order("apply_diff", str(root), "token", "a"), "worker") is None
    assert not root.exists()


def test_upkeep_without_a_gateway_is_done(app: Any, root: Path) -> None:
    Engine.of(Settings.from_environ()).prepare()
    answer = perform(Settings.from_environ(), Order("collect_garbage", str(root), "token"), "worker")
    assert answer is not None
    assert (answer.error, answer.figures) == ("", {"removed_objects": 0, "removed_bytes": 0})
    app.tasks["gearworkers.collect_garbage"](str(root), "token", "", "")


def test_upkeep_of_the_root_that_dockerd_has_named_is_done_and_of_no_other(root: Path, tmp_path: Path) -> None:
    settings = Settings.from_environ()
    settings.run_dir.mkdir()
    elsewhere, named = tmp_path / "elsewhere", tmp_path / "named"
    driver = GearDriver(settings)
    driver.prepare()
    driver.init("", [f"gear.root={named}"], (), ())
    assert options.load(settings.run_dir)
    for refused in (root, elsewhere, Path("/")):
        assert perform(settings, Order("collect_garbage", str(refused), "token"), "worker") is None
    assert not elsewhere.exists()
    answer = perform(settings, Order("collect_garbage", str(named), "token"), "worker")
    assert answer is not None and answer.error == ""


def test_upkeep_that_comes_again_is_refused_for_another_root(app: Any, root: Path, tmp_path: Path) -> None:
    other = Settings(gear_root=tmp_path / "other", run_dir=tmp_path)
    Engine.of(other).prepare()
    garbage = other.gear_public_cache_path / "\1A" / "x"
    garbage.touch()
    collect = app.tasks["gearworkers.collect_garbage"]
    forged = arguments(other.gear_root)
    collect.push_request(retries=0, called_directly=False, kwargs=forged, delivery_info={"redelivered": True})
    try:
        collect.run(**forged)
    finally:
        collect.pop_request()
    assert garbage.exists()


def layer_job(source: str) -> LayerJob:
    return LayerJob(source, "127.0.0.1:1/target", f"sha256:{'0' * 64}", 1, f"sha256:{'1' * 64}")


def test_a_conversion_for_another_remote_is_refused_in_words_and_shows_it_no_token(
    app: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEAR_REMOTE", "https://user:secret@manager.example.org:2019/")
    monkeypatch.setenv("GEAR_REMOTE_TOKEN", "token")
    job = msgspec.to_builtins(layer_job("127.0.0.1:1/source"))
    with answering(lambda asked: Answer(200)) as listener:
        with pytest.raises(FailedPrecondition) as refusal:
            app.tasks[LAYER_TASK](job, listener.url)
        assert listener.asked == []
    said = str(refusal.value)
    assert listener.url in said and "https://manager.example.org:2019 " not in said
    assert "GEAR_REMOTE=https://manager.example.org:2019;" in said
    assert "secret" not in said and "--local" in said


@pytest.mark.parametrize("kind", ["oci", "docker-archive"])
def test_a_conversion_of_a_path_is_refused(
    app: Any, root: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEAR_REMOTE", str(tmp_path))
    source = f"{kind}:{tmp_path}/not-there"
    with pytest.raises(InvalidInput, match="registries only"):
        app.tasks[LAYER_TASK](msgspec.to_builtins(layer_job(source)), str(tmp_path))
    plan = Plan(source, "127.0.0.1:1/target", "", (ImagePlan("", "", ()),))
    with pytest.raises(InvalidInput, match="registries only"):
        app.tasks[IMAGE_TASK]([], msgspec.to_builtins(plan))


def arguments(root: Path) -> dict[str, str]:
    return {"gear_root": str(root), "token": "t", "id": "", "parent": ""}


def test_a_push_whose_remote_is_away_is_tried_again_and_one_without_remote_is_not(
    app: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine.of(Settings.from_environ()).prepare()
    push = app.tasks["gearworkers.push"]
    push.push_request(retries=0, called_directly=False, is_eager=True, kwargs=arguments(root), delivery_info={})
    try:
        push.run(**arguments(root))
        monkeypatch.setattr(Engine, "push_pending", _unavailable)
        with pytest.raises(Retry, match="2s"):
            push.run(**arguments(root))
    finally:
        push.pop_request()


def _unavailable(engine: Engine) -> int:
    from gearworkers.errors import Unavailable

    raise Unavailable("the remote is away")


def test_a_process_that_celery_has_ceased_to_watch_is_watched_again(app: Any) -> None:
    pool = TaskPool(1, app=app, initargs=(app, "tests"), threads=False)
    hub: Any = Hub()  # type: ignore[no-untyped-call]
    pool.start()
    try:
        pool.register_with_event_loop(hub)
        (process,) = pool._pool._pool
        pool._pool._untrack_child_process(process, hub)
        _MendPool(SimpleNamespace(steps=[])).start(SimpleNamespace(pool=pool))
        pool.register_with_event_loop(hub)
        assert process._sentinel_poll in hub.readers
    finally:
        pool.terminate()
        hub.close()
