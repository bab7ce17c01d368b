"""The lists of incomplete layers follow the records, also if a record changes twice in a moment."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from gearworkers.engine.engine import Engine
from gearworkers.layers import incomplete as module
from gearworkers.layers.incomplete import IncompleteLayers
from gearworkers.layers.record import LayerKind
from gearworkers.settings import Settings
from tests.support.lazynode import gear_tar
from tests.support.tiny import tar_of

FILES = {"file": b"content" * 1000}


def test_a_layer_that_loses_an_object_as_it_is_marked_complete_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.of(Settings(gear_root=tmp_path, run_dir=tmp_path / "run"))
    engine.prepare()
    engine.create("image", "", LayerKind.NEW)
    engine.apply_diff("image", "", io.BytesIO(gear_tar(FILES)))
    engine.create("ordinary", "", LayerKind.NEW)
    engine.apply_diff("ordinary", "", io.BytesIO(tar_of(FILES)))
    images = engine.settings.gear_images_path
    layers = IncompleteLayers(images)
    assert layers.newly_complete(engine.objects) == ["image"]
    mark_complete = module.mark_complete

    def lose_an_object_afterwards(*arguments: object) -> bool:
        is_complete = mark_complete(*arguments)  # type: ignore[arg-type]
        module.mark_incomplete(images, "image")
        layers.ids()
        return is_complete

    monkeypatch.setattr(module, "mark_complete", lose_an_object_afterwards)
    layers.mark_complete("image", engine.objects)
    assert layers.ids() == ["image"]
