"""Choose the images of an index, and of a layout, by their platforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from gearworkers.errors import InvalidInput, NotFound
from gearworkers.images import manifest as m
from gearworkers.images.image_index import MAX_NESTED_INDEXES
from tests.support.conversions import Converter
from tests.support.images import Image, tar_of
from tests.support.layouts import AMD64, ARM64, ARMV7, OCI_LAYER, TAR, Layout, entry_for

pytestmark = pytest.mark.slow


class TestIndexes:
    @pytest.mark.parametrize("platform", [AMD64, ARM64, ARMV7])
    @pytest.mark.parametrize("named", [None, m.Platform()])
    def test_the_config_provides_the_platform_if_the_index_does_not(
        self, converter: Converter, layout: Layout, platform: m.Platform, named: m.Platform | None
    ) -> None:
        images = [
            entry_for(named, layout.image_for(one)) for one in (ARM64, m.Platform.parse("linux/arm/v6"), AMD64, ARMV7)
        ]
        converter(layout.source(layout.index(*images)), platform)
        assert converter.platform() == str(platform)

    def test_an_entry_with_a_platform_takes_precedence_over_one_without(
        self, converter: Converter, layout: Layout
    ) -> None:
        unnamed = layout.image((TAR, f"{OCI_LAYER}.v1.tar"))
        converter(layout.source(layout.index(unnamed, entry_for(AMD64, layout.image_for(AMD64)))))
        assert converter.platform() == "linux/amd64"

    def test_images_of_nested_indexes_are_found_and_flattened(self, converter: Converter, layout: Layout) -> None:
        nested = layout.index(entry_for(ARM64, layout.image_for(ARM64)), layout.index(layout.image_for(ARMV7)))
        source = layout.source(
            layout.index(nested, entry_for(AMD64, layout.image_for(AMD64)), nested, annotations={"a": "b"})
        )
        for platform in (AMD64, ARM64, ARMV7):
            converter(source, platform)
            assert converter.platform() == str(platform)
        converter(source, all_platforms=True)
        index = msgspec.json.decode(converter.repository.manifest("gear")[0])
        found = [converter.platform(child["digest"]) for child in index["manifests"]]
        assert found == ["linux/arm64", "linux/arm/v7", "linux/amd64"]
        assert index["annotations"] == {"a": "b"}
        with pytest.raises(NotFound, match=r"linux/riscv64; it has: linux/amd64, linux/arm/v7, linux/arm64"):
            converter(source, m.Platform.parse("linux/riscv64"))

    def test_too_many_nested_indexes_are_rejected(self, converter: Converter, layout: Layout) -> None:
        nested = layout.index(layout.image_for(AMD64))
        for number in range(MAX_NESTED_INDEXES):
            nested = layout.index(nested, annotations={"depth": str(number)})
        converter(layout.source(nested))
        with pytest.raises(InvalidInput, match=f"more than {MAX_NESTED_INDEXES} nested indexes"):
            converter(layout.source(layout.index(nested, annotations={"depth": "one more"})))

    @pytest.mark.parametrize("annotated", [False, True])
    def test_attestations_and_artifacts_are_not_converted(
        self, converter: Converter, layout: Layout, annotated: bool
    ) -> None:
        unknown = m.Platform("unknown", "unknown")
        attestation = layout.image((b"{}", "application/vnd.in-toto+json"), platform=unknown)
        about = {"annotations": {"vnd.docker.reference.type": "attestation-manifest"}} if annotated else {}
        empty = layout.put(b"{}", "application/vnd.oci.empty.v1+json")
        artifact = layout.image((b"{}", "text/spdx"), more={"config": empty})
        children = [artifact, entry_for(unknown, attestation) | about, layout.image_for(ARM64), layout.image_for(AMD64)]
        source = layout.source(layout.index(*children))
        converter(source)
        assert converter.platform() == "linux/amd64"
        converter(source, all_platforms=True)
        index = msgspec.json.decode(converter.repository.manifest("gear")[0])
        assert [converter.platform(one["digest"]) for one in index["manifests"]] == ["linux/arm64", "linux/amd64"]

    @pytest.mark.parametrize("manifests", [{"manifests": None}, {"manifests": []}])
    def test_an_index_without_images_is_rejected(
        self, converter: Converter, layout: Layout, manifests: dict[str, Any]
    ) -> None:
        source = layout.source(layout.index(**manifests))
        for all_platforms in (False, True):
            with pytest.raises(NotFound, match=r"has no image for .*; it has: none"):
                converter(source, all_platforms=all_platforms)

    @pytest.mark.parametrize("name", ["", "v1"])
    def test_manifests_of_one_name_for_several_platforms_are_one_image(
        self, converter: Converter, layout: Layout, name: str
    ) -> None:
        named = {"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}
        other = (
            [entry_for(AMD64, layout.image_for(ARM64)) | {"annotations": {"org.opencontainers.image.ref.name": "v2"}}]
            if name
            else []
        )
        source = layout.source(*other, *(entry_for(one, layout.image_for(one)) | named for one in (AMD64, ARM64)))
        source += f":{name}" if name else ""
        for platform in (AMD64, ARM64):
            converter(source, platform)
            assert converter.platform() == str(platform)
        converter(source, all_platforms=True)
        index = msgspec.json.decode(converter.repository.manifest("gear")[0])
        assert [converter.platform(one["digest"]) for one in index["manifests"]] == ["linux/amd64", "linux/arm64"]

    def test_two_unnamed_images_for_one_platform_are_rejected_as_ambiguous(
        self, converter: Converter, layout: Layout
    ) -> None:
        images = [
            entry_for(AMD64, layout.image_for(AMD64)),
            entry_for(AMD64, layout.image((TAR, f"{OCI_LAYER}.v1.tar"))),
        ]
        with pytest.raises(InvalidInput, match="holds 2 images"):
            converter(layout.source(*images))


class TestPlatforms:
    @pytest.fixture(params=["registry", "layout", "archive"])
    def source(self, request: pytest.FixtureRequest, converter: Converter, tmp_path: Path) -> str:
        """Return the name of a single-platform image for arm64."""
        image = Image([tar_of([("linux/arm64", b"")])], architecture="arm64", compression="")
        if request.param == "registry":
            image.push(converter.repository, "source")
            return f"{converter.name}:source"
        if request.param == "layout":
            image.write_layout(tmp_path / "written")
            return f"oci:{tmp_path / 'written'}"
        (tmp_path / "image.tar").write_bytes(image.saved())
        return f"docker-archive:{tmp_path / 'image.tar'}"

    def test_a_platform_that_the_only_image_does_not_have_is_rejected(self, converter: Converter, source: str) -> None:
        with pytest.raises(NotFound, match="no image for linux/amd64; it has: linux/arm64"):
            converter(source, AMD64)
        with pytest.raises(NotFound):
            converter.repository.manifest("gear")

    @pytest.mark.parametrize("requested", [None, ARM64, m.Platform.parse("linux/arm64/v8")])
    def test_the_only_image_is_converted_if_it_matches_or_no_platform_is_given(
        self, converter: Converter, source: str, requested: m.Platform | None
    ) -> None:
        converter(source, requested)
        assert converter.platform() == "linux/arm64"

    def test_an_image_without_a_platform_matches_no_requested_platform(
        self, converter: Converter, layout: Layout
    ) -> None:
        source = layout.source(layout.image_for(None))
        with pytest.raises(NotFound, match="one without a platform"):
            converter(source, AMD64)
        converter(source, None)
