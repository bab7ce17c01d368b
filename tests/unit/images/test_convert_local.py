"""Convert in processes of this host."""

from __future__ import annotations

import pytest

from gearworkers.errors import InvalidInput
from gearworkers.images.convert_local import convert_locally
from gearworkers.images.plan import plan_conversion
from gearworkers.settings import Settings
from tests.support.conversions import (
    AMD64,
    BASE,
    LARGE,
    MIDDLE,
    TOP,
    pushed,
    repository,
)
from tests.support.images import Image, pull, tar_of
from tests.support.registry import Registry

pytestmark = pytest.mark.slow


def test_local_processes_convert_all_layers_and_report_progress(settings: Settings, peer: Registry) -> None:
    image = Image([BASE, TOP, tar_of([("third", LARGE[::-1])])])
    plan = plan_conversion(settings.registry, pushed(settings, peer, image), f"{peer.host}/gear:v1", AMD64)
    read: dict[str, int] = {}

    report = convert_locally(settings, plan, 2, read.__setitem__)
    assert report.layers == 3
    assert read == {job.digest: job.size_bytes for job in plan.jobs()}
    assert len(pull(repository(settings, f"{peer.host}/gear"), "v1").tars) == 3


def test_an_error_in_a_local_process_is_raised_with_its_reason(settings: Settings, peer: Registry) -> None:
    broken = tar_of([("a", MIDDLE)])[:1024] + b"not a tar" * 1000
    plan = plan_conversion(
        settings.registry, pushed(settings, peer, Image([broken, BASE])), f"{peer.host}/gear:v1", AMD64
    )
    with pytest.raises(InvalidInput, match="checksum"):
        convert_locally(settings, plan, 1, lambda *_: None)
