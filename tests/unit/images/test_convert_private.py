"""Copy private layers unchanged."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from gearworkers.errors import InvalidInput
from gearworkers.images import manifest as m
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from tests.support.conversions import (
    LARGE,
    MIDDLE,
    SMALL,
    converted,
    pushed,
    repository,
)
from tests.support.images import Image, pull, push_index, tar_of
from tests.support.registry import Registry

pytestmark = pytest.mark.slow


class TestPrivateLayers:
    MARKED = tar_of([(".gear-private", b""), ("secret", MIDDLE)])
    ABOVE = tar_of([("other", LARGE)])

    @pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
    def test_private_layers_are_copied_without_storing_objects(
        self, settings: Settings, peer: Registry, compression: str
    ) -> None:
        image = Image([tar_of([("base", SMALL + MIDDLE)]), self.MARKED, self.ABOVE], compression, compression == "zstd")
        target = f"{peer.host}/gear:v1"
        report = converted(settings, pushed(settings, peer, image), target)
        assert (report.layers, report.private_layers, report.objects) == (3, 2, 1)
        found = pull(repository(settings, target), "v1")
        assert found.tars[1:] == [self.MARKED, self.ABOVE]
        assert found.tars[0] != image.tars[0]
        assert found.manifest["layers"][1:] == msgspec.json.decode(image.manifest)["layers"][1:]
        contents = [hashlib.sha256(content).digest() for content in (MIDDLE, LARGE, SMALL + MIDDLE)]
        assert open_remote(settings).has(contents) == [contents[2]]

    def test_a_private_layer_is_copied_even_if_another_images_conversion_converted_it(
        self, settings: Settings, peer: Registry
    ) -> None:
        converted(settings, pushed(settings, peer, Image([self.ABOVE])), f"{peer.host}/gear:v1")
        source = pushed(settings, peer, Image([self.MARKED, self.ABOVE]), "private")
        assert converted(settings, source, f"{peer.host}/gear:v2").private_layers == 2
        found = pull(repository(settings, f"{peer.host}/gear:v2"), "v2")
        assert found.tars == [self.MARKED, self.ABOVE]
        assert m.GEAR_LABEL not in found.config["config"]["Labels"]

    def test_a_layer_that_is_private_in_one_platform_is_private_in_all(
        self, settings: Settings, peer: Registry
    ) -> None:
        target = repository(settings, f"{peer.host}/many")
        images = [Image([self.MARKED, self.ABOVE]), Image([self.ABOVE], architecture="arm64")]
        push_index(target, "v1", images)
        report = converted(settings, f"{peer.host}/many:v1", f"{peer.host}/gear:v1", all_platforms=True)
        assert (report.layers, report.private_layers, report.objects) == (2, 2, 0)

    def test_a_private_mark_after_contents_is_rejected(self, settings: Settings, peer: Registry) -> None:
        late = Image([tar_of([("secret", MIDDLE), (".gear-private", b"")])])
        with pytest.raises(InvalidInput, match=r"\.gear-private.* comes after contents"):
            converted(settings, pushed(settings, peer, late), f"{peer.host}/gear:v1")
