"""Convert layers, configs and manifests of other tools; reject unsupported ones."""

from __future__ import annotations

import base64
import bz2
import lzma
from collections.abc import Callable

import msgspec
import pytest

from gearworkers.errors import InvalidInput
from gearworkers.images import manifest as m
from tests.support.conversions import Converter
from tests.support.images import COMPRESS, tar_of
from tests.support.layouts import AMD64, CONTENT, OCI_LAYER, TAR, Layout, entry_for

pytestmark = pytest.mark.slow


class TestLayers:
    @pytest.mark.parametrize(
        ("media_type", "compression"),
        [
            (f"{OCI_LAYER}.nondistributable.v1.tar", ""),
            (f"{OCI_LAYER}.nondistributable.v1.tar+gzip", "gzip"),
            (f"{OCI_LAYER}.nondistributable.v1.tar+zstd", "zstd"),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "gzip"),
        ],
    )
    def test_foreign_layers_become_ordinary_gzip_layers(
        self, converter: Converter, layout: Layout, media_type: str, compression: str
    ) -> None:
        layer = layout.put(COMPRESS[compression](TAR), media_type, urls=["http://127.0.0.1:1/layer"])
        converter(layout.source(layout.image((TAR, ""), more={"layers": [layer]})))
        (found,) = converter.image().manifest["layers"]
        assert (found["mediaType"], "urls" in found) == (m.OCI_LAYER_GZIP, False)
        assert converter.contents() == [CONTENT]

    @pytest.mark.parametrize("compression", COMPRESS)
    def test_a_layer_without_bytes_is_converted_to_an_empty_layer(
        self, converter: Converter, layout: Layout, compression: str
    ) -> None:
        layer = layout.put(COMPRESS[compression](b""), f"{OCI_LAYER}.v1.tar")
        converter(layout.source(layout.image((b"", ""), more={"layers": [layer]})))
        assert converter.contents() == []

    @pytest.mark.parametrize(
        "config", [{"rootfs": {"type": "layers"}}, {"rootfs": None}, {"rootfs": {"diff_ids": None}}]
    )
    def test_an_image_without_layers_is_converted(
        self, converter: Converter, layout: Layout, config: m.JsonObject
    ) -> None:
        converter(layout.source(layout.image(config=config, more={"layers": None})))
        found = converter.image()
        assert (found.tars, found.config["rootfs"]) == ([], {"type": "layers", "diff_ids": []})

    def test_nulls_count_as_missing_values(self, converter: Converter, layout: Layout) -> None:
        config = {"config": None, "history": None, "variant": None, "created": None}
        image = layout.image((TAR, f"{OCI_LAYER}.v1.tar"), config=config, more={"annotations": None, "subject": None})
        null = {"platform": None, "annotations": None, "urls": None, "data": None}
        converter(layout.source(image | null))
        assert converter.image().config["config"] == {"Labels": {m.GEAR_LABEL: "1"}}
        assert converter.contents() == [CONTENT]

    def test_embedded_data_and_urls_are_dropped_from_converted_descriptors(
        self, converter: Converter, layout: Layout
    ) -> None:
        rootfs = {"type": "layers", "diff_ids": [m.digest_of(TAR)]}
        data = m.encode({"os": "linux", "architecture": "amd64", "rootfs": rootfs})
        embedded = {"data": base64.b64encode(data).decode(), "urls": ["http://127.0.0.1:1/config"]}
        config = layout.put(data, m.OCI_CONFIG) | embedded
        image = layout.image((TAR, f"{OCI_LAYER}.v1.tar"), more={"config": config})
        converter(layout.source(layout.index(entry_for(AMD64, image) | {"data": "e30="})), all_platforms=True)
        index = msgspec.json.decode(converter.repository.manifest("gear")[0])
        assert set(index["manifests"][0]) == {"mediaType", "digest", "size", "platform"}
        assert set(converter.image(index["manifests"][0]["digest"]).manifest["config"]) == {
            "mediaType",
            "digest",
            "size",
        }

    @pytest.mark.parametrize(
        ("name", "pack"),
        [
            ("xz", lzma.compress),
            ("bzip2", bz2.compress),
            ("lz4", lambda tar: b"\x04\x22\x4d\x18" + tar),
            ("gzip", lambda tar: COMPRESS["gzip"](COMPRESS["gzip"](tar))),
        ],
    )
    @pytest.mark.parametrize("tar", [TAR, tar_of([])[:512]], ids=["long", "short"])
    def test_the_error_names_an_unsupported_compression(
        self, converter: Converter, layout: Layout, name: str, pack: Callable[[bytes], bytes], tar: bytes
    ) -> None:
        layer = layout.put(pack(tar), f"{OCI_LAYER}.v1.tar")
        with pytest.raises(InvalidInput, match=f"layer {layer['digest']}: .* compressed with {name}"):
            converter(layout.source(layout.image((tar, ""), more={"layers": [layer]})))

    @pytest.mark.parametrize(
        ("media_type", "why"),
        [
            (f"{OCI_LAYER}.v1.tar+gzip+encrypted", "encrypted"),
            ("application/vnd.in-toto+json", "in-toto.*only tars can be converted"),
        ],
    )
    def test_layers_that_are_not_tars_are_rejected(
        self, converter: Converter, layout: Layout, media_type: str, why: str
    ) -> None:
        with pytest.raises(InvalidInput, match=why):
            converter(layout.source(layout.image((TAR, media_type))))


def test_deeply_nested_json_is_rejected() -> None:
    deep = b'{"config":' * 100_000
    with pytest.raises(InvalidInput, match="a config"):
        m.decode(deep, m.Config, "a config")
