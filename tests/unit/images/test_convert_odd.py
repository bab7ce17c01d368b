"""Convert images of other tools: unusual layer types, indexes, platforms and nulls; reject unsupported ones."""

from __future__ import annotations

import base64
import bz2
import hashlib
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gearworkers.errors import InvalidInput, NotFound
from gearworkers.images import manifest as m
from gearworkers.images.convert import convert_layer
from gearworkers.images.gear_manifest import finish_conversion
from gearworkers.images.image_index import MAX_NESTED_INDEXES
from gearworkers.images.plan import plan_conversion
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.remote.factory import open_remote
from gearworkers.settings import RegistrySettings, RemoteSettings, Settings
from tests.support import registries
from tests.support.images import COMPRESS, Image, Pulled, contents_of, descriptor, pull, push_index, tar_of
from tests.support.registry import Registry

pytestmark = pytest.mark.slow

OCI_LAYER = "application/vnd.oci.image.layer"
CONTENT = hashlib.shake_256(b"content").digest(1000)
TAR = tar_of([("file", CONTENT)])
AMD64, ARM64, ARMV7 = (m.Platform.parse(f"linux/{name}") for name in ("amd64", "arm64", "arm/v7"))


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "remote").mkdir()
    return Settings(
        remote=RemoteSettings(url=str(tmp_path / "remote")),
        registry=RegistrySettings(docker_config=tmp_path / "docker"),
        gear_root=tmp_path / "gear",
    )


class Layout:
    """An OCI layout that tests fill blob by blob."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)

    def put(self, data: bytes, media_type: str, **more: Any) -> m.Document:
        """Store *data*; return its descriptor."""
        (self.path / "blobs" / "sha256" / hashlib.sha256(data).hexdigest()).write_bytes(data)
        return descriptor(data, media_type) | more

    def image(
        self,
        *layers: tuple[bytes, str],
        platform: m.Platform | None = AMD64,
        config: m.Document | None = None,
        more: m.Document | None = None,
    ) -> m.Document:
        """Store an image of *layers*; return the descriptor of its manifest.

        Args:
            layers: Uncompressed tars, each with its media type.
            platform: The platform in the config; None to leave it out.
            config: Changes to the config.
            more: Changes to the manifest.
        """
        runs_on = {"os": platform.os, "architecture": platform.architecture} if platform else {}
        if platform and platform.variant:
            runs_on["variant"] = platform.variant
        rootfs = {"type": "layers", "diff_ids": [m.digest_of(tar) for tar, _ in layers]}
        whole_config = {"config": {"Cmd": ["x"]}, "rootfs": rootfs} | runs_on | (config or {})
        document = {
            "schemaVersion": 2,
            "mediaType": m.OCI_MANIFEST,
            "config": self.put(m.encode(whole_config), m.OCI_CONFIG),
            "layers": [self.put(tar, media_type) for tar, media_type in layers],
        }
        return self.put(m.encode(document | (more or {})), m.OCI_MANIFEST)

    def image_for(self, platform: m.Platform | None) -> m.Document:
        """Store an image with one file, which is named after *platform*; return its descriptor."""
        return self.image((tar_of([(str(platform), b"")]), f"{OCI_LAYER}.v1.tar"), platform=platform)

    def index(self, *children: m.Document, **more: Any) -> m.Document:
        """Store an index of *children*; return its descriptor."""
        document = {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": list(children)} | more
        return self.put(m.encode(document), m.OCI_INDEX)

    def source(self, *children: m.Document) -> str:
        """Write index.json with *children*; return the layout's name."""
        document = {"schemaVersion": 2, "manifests": list(children)}
        (self.path / "index.json").write_bytes(m.encode(document))
        return f"oci:{self.path}"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def entry_for(platform: m.Platform | None, image: m.Document) -> m.Document:
    """Return the entry of *image* in an index, with *platform*."""
    return image | {"platform": msgspec.to_builtins(platform)}


class Converter:
    """Converts images to one repository, and reads the results."""

    def __init__(self, settings: Settings, host: str) -> None:
        self.settings = settings
        self.host = host
        self.name = f"{host}/{settings.gear_root.parent.name.lower().replace('_', '-')}"
        self.repository = self.at(self.name)

    def at(self, name: str) -> Repository:
        return Repository.of(self.settings.registry, Reference.parse(name))

    def __call__(
        self, source: str, platform: m.Platform | None = AMD64, *, target: str = "", all_platforms: bool = False
    ) -> None:
        plan = plan_conversion(
            self.settings.registry,
            source,
            target or f"{self.name}:gear",
            None if all_platforms else platform,
            all_platforms=all_platforms,
        )
        remote = open_remote(self.settings)
        done = [convert_layer(self.settings, remote, job, lambda _: None) for job in plan.jobs()]
        finish_conversion(self.settings.registry, plan, done)
        remote.close()

    def image(self, version: str = "gear") -> Pulled:
        return pull(self.repository, version)

    def contents(self) -> list[bytes]:
        """Return the contents of the first layer's files."""
        remote = open_remote(self.settings)
        return [content for _, content in contents_of(self.image().tars[0], remote)]

    def platform(self, version: str = "gear") -> str:
        """Return the name of the only file, which `Layout.image_for` named after the platform."""
        entries = [entry.name for entry, _ in contents_of(self.image(version).tars[0])]
        assert len(entries) == 1
        return entries[0].decode()


@pytest.fixture
def converter(settings: Settings, peer: Registry) -> Converter:
    return Converter(settings, peer.host)


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
        self, converter: Converter, layout: Layout, config: m.Document
    ) -> None:
        converter(layout.source(layout.image(config=config, more={"layers": None})))
        found = converter.image()
        assert (found.tars, found.config["rootfs"]) == ([], {"type": "layers", "diff_ids": []})

    def test_nulls_count_as_missing_values(self, converter: Converter, layout: Layout) -> None:
        config = {"config": None, "history": None, "variant": None, "created": None}
        image = layout.image((TAR, f"{OCI_LAYER}.v1.tar"), config=config, more={"annotations": None, "subject": None})
        null = {"platform": None, "annotations": None, "urls": None, "data": None}
        converter(layout.source(image | null))
        assert converter.image().config["config"] == {"Labels": {m.GEAR_MARK: "1"}}
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

    def test_a_platform_other_than_the_only_images_is_rejected(self, converter: Converter, source: str) -> None:
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
        built = Image([*base.tars, tar_of([("top", CONTENT)])], labels={m.GEAR_MARK: "1"})
        built.push(converter.repository, "gear")
        converter(f"{converter.name}:gear")
        assert CONTENT not in converter.image().tars[1]


def test_deeply_nested_json_is_rejected() -> None:
    deep = b'{"config":' * 100_000
    with pytest.raises(InvalidInput, match="a config"):
        m.decode(deep, m.Config, "a config")
