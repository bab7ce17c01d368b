"""Reject a conversion that would replace its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from gearworkers.errors import InvalidInput
from gearworkers.images import manifest as m
from gearworkers.images.plan import plan_conversion
from tests.support.conversions import Converter
from tests.support.images import Image, push_index, tar_of
from tests.support.layouts import CONTENT, TAR

pytestmark = pytest.mark.slow


class TestTargetNamesSource:
    IMAGE = Image([TAR])

    @pytest.fixture
    def original(self, converter: Converter) -> str:
        """Push an image as `v1` and `latest`; return its digest."""
        self.IMAGE.push(converter.repository, "latest")
        return self.IMAGE.push(converter.repository, "v1")

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            ("{name}:v1", "{name}:v1"),
            ("{name}", "{name}"),
            ("{name}:latest", "{name}"),
            ("{name}:v1", "docker://{name}:v1"),
            ("{name}:v1@{digest}", "{name}:v1"),
            ("{name}@{digest}", "{name}:v1"),
            ("{alias}:v1", "{name}:v1"),
        ],
    )
    @pytest.mark.parametrize("all_platforms", [False, True])
    def test_a_conversion_does_not_replace_its_source(
        self, converter: Converter, original: str, source: str, target: str, all_platforms: bool
    ) -> None:
        names = {"name": converter.name, "digest": original}
        names["alias"] = converter.name.replace("127.0.0.1", "localhost")
        with pytest.raises(InvalidInput, match=r"choose another tag, such as .*-gear"):
            converter(source.format(**names), target=target.format(**names), all_platforms=all_platforms)
        assert converter.repository.manifest("v1")[0] == self.IMAGE.manifest

    def test_the_name_of_an_image_of_this_host_counts(self, converter: Converter, tmp_path: Path) -> None:
        self.IMAGE.write_layout(tmp_path / "layout")
        source, target, settings = f"oci:{tmp_path / 'layout'}", f"{converter.name}:v1", converter.settings.registry
        with pytest.raises(InvalidInput, match="choose another tag"):
            plan_conversion(settings, source, target, name=target)
        for name in ("", f"{converter.name}:v2", "a name of containerd"):
            assert plan_conversion(settings, source, target, name=name).source == source

    def test_another_tag_or_repository_is_accepted_as_target(self, converter: Converter, original: str) -> None:
        converter(f"{converter.name}:v1", target=f"{converter.name}:v2")
        converter(f"{converter.name}:v1", target=f"{converter.name}/other:v1")
        converter(f"{converter.name}@{original}", target=f"{converter.name}:v2")
        assert converter.repository.manifest("v1")[0] == self.IMAGE.manifest

    def test_a_conversion_does_not_replace_its_source_index(self, converter: Converter) -> None:
        index = push_index(converter.repository, "many", [self.IMAGE])
        for source in (f"{converter.name}:many", f"{converter.name}@{m.digest_of(index)}"):
            with pytest.raises(InvalidInput, match="choose another tag"):
                converter(source, target=f"{converter.name}:many", all_platforms=True)

    def test_a_gear_image_may_be_replaced_by_its_conversion(self, converter: Converter, original: str) -> None:
        converter(f"{converter.name}:v1")
        base = converter.image()
        built = Image([*base.tars, tar_of([("top", CONTENT)])], labels={m.GEAR_LABEL: "1"})
        built.push(converter.repository, "gear")
        converter(f"{converter.name}:gear")
        assert CONTENT not in converter.image().tars[1]
