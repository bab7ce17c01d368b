"""Images of other tools: types, indexes, platforms and nulls that a conversion meets, and what it refuses."""

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
    """An OCI layout, made blob by blob."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)

    def put(self, data: bytes, media_type: str, **more: Any) -> m.Document:
        """Hold *data*; its descriptor."""
        (self.path / "blobs" / "sha256" / hashlib.sha256(data).hexdigest()).write_bytes(data)
        return descriptor(data, media_type) | more

    def image(
        self,
        *layers: tuple[bytes, str],
        platform: m.Platform | None = AMD64,
        config: m.Document | None = None,
        more: m.Document | None = None,
    ) -> m.Document:
        """A manifest of blobs and their types, whose tars are *layers*' own; its descriptor.

        Args:
            layers: Blobs that are tars, each with its type.
            platform: What the config says; None for nothing.
            config: Changes to it.
            more: Changes to the manifest.
        """
        runs_on = {"os": platform.os, "architecture": platform.architecture} if platform else {}
        if platform and platform.variant:
            runs_on["variant"] = platform.variant
        rootfs = {"type": "layers", "diff_ids": [m.digest_of(tar) for tar, _ in layers]}
        made = {"config": {"Cmd": ["x"]}, "rootfs": rootfs} | runs_on | (config or {})
        document = {
            "schemaVersion": 2,
            "mediaType": m.OCI_MANIFEST,
            "config": self.put(m.encode(made), m.OCI_CONFIG),
            "layers": [self.put(tar, media_type) for tar, media_type in layers],
        }
        return self.put(m.encode(document | (more or {})), m.OCI_MANIFEST)

    def of(self, platform: m.Platform | None) -> m.Document:
        """An image that is told from others by a file."""
        return self.image((tar_of([(str(platform), b"")]), f"{OCI_LAYER}.v1.tar"), platform=platform)

    def index(self, *children: m.Document, **more: Any) -> m.Document:
        """An index of them."""
        document = {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": list(children)} | more
        return self.put(m.encode(document), m.OCI_INDEX)

    def source(self, *children: m.Document) -> str:
        """Have index.json name them."""
        document = {"schemaVersion": 2, "manifests": list(children)}
        (self.path / "index.json").write_bytes(m.encode(document))
        return f"oci:{self.path}"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def on(platform: m.Platform | None, image: m.Document) -> m.Document:
    """An index's entry that names *platform*."""
    return image | {"platform": msgspec.to_builtins(platform)}


class Converter:
    """Converts to one name, and reads what came of it."""

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
        """Of the first layer."""
        remote = open_remote(self.settings)
        return [content for _, content in contents_of(self.image().tars[0], remote)]

    def platform(self, version: str = "gear") -> str:
        """By the file that tells it."""
        entries = [entry.name for entry, _ in contents_of(self.image(version).tars[0])]
        assert len(entries) == 1
        return entries[0].decode()


@pytest.fixture
def convert_it(settings: Settings, peer: Registry) -> Converter:
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
    def test_foreign_ones_become_common_ones(
        self, convert_it: Converter, layout: Layout, media_type: str, compression: str
    ) -> None:
        layer = layout.put(COMPRESS[compression](TAR), media_type, urls=["http://127.0.0.1:1/layer"])
        convert_it(layout.source(layout.image((TAR, ""), more={"layers": [layer]})))
        (found,) = convert_it.image().manifest["layers"]
        assert (found["mediaType"], "urls" in found) == (m.OCI_LAYER_GZIP, False)
        assert convert_it.contents() == [CONTENT]

    @pytest.mark.parametrize("compression", COMPRESS)
    def test_one_of_no_bytes_is_empty(self, convert_it: Converter, layout: Layout, compression: str) -> None:
        layer = layout.put(COMPRESS[compression](b""), f"{OCI_LAYER}.v1.tar")
        convert_it(layout.source(layout.image((b"", ""), more={"layers": [layer]})))
        assert convert_it.contents() == []

    @pytest.mark.parametrize(
        "config", [{"rootfs": {"type": "layers"}}, {"rootfs": None}, {"rootfs": {"diff_ids": None}}]
    )
    def test_an_image_may_have_none(self, convert_it: Converter, layout: Layout, config: m.Document) -> None:
        convert_it(layout.source(layout.image(config=config, more={"layers": None})))
        found = convert_it.image()
        assert (found.tars, found.config["rootfs"]) == ([], {"type": "layers", "diff_ids": []})

    def test_nulls_are_values_not_given(self, convert_it: Converter, layout: Layout) -> None:
        config = {"config": None, "history": None, "variant": None, "created": None}
        image = layout.image((TAR, f"{OCI_LAYER}.v1.tar"), config=config, more={"annotations": None, "subject": None})
        null = {"platform": None, "annotations": None, "urls": None, "data": None}
        convert_it(layout.source(image | null))
        assert convert_it.image().config["config"] == {"Labels": {m.GEAR_MARK: "1"}}
        assert convert_it.contents() == [CONTENT]

    def test_what_a_descriptor_embeds_is_not_taken_for_what_became_of_it(
        self, convert_it: Converter, layout: Layout
    ) -> None:
        rootfs = {"type": "layers", "diff_ids": [m.digest_of(TAR)]}
        data = m.encode({"os": "linux", "architecture": "amd64", "rootfs": rootfs})
        embedded = {"data": base64.b64encode(data).decode(), "urls": ["http://127.0.0.1:1/config"]}
        config = layout.put(data, m.OCI_CONFIG) | embedded
        image = layout.image((TAR, f"{OCI_LAYER}.v1.tar"), more={"config": config})
        convert_it(layout.source(layout.index(on(AMD64, image) | {"data": "e30="})), all_platforms=True)
        index = msgspec.json.decode(convert_it.repository.manifest("gear")[0])
        assert set(index["manifests"][0]) == {"mediaType", "digest", "size", "platform"}
        assert set(convert_it.image(index["manifests"][0]["digest"]).manifest["config"]) == {
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
    def test_how_one_is_compressed_is_told_if_it_cannot_be_unpacked(
        self, convert_it: Converter, layout: Layout, name: str, pack: Callable[[bytes], bytes], tar: bytes
    ) -> None:
        layer = layout.put(pack(tar), f"{OCI_LAYER}.v1.tar")
        with pytest.raises(InvalidInput, match=f"layer {layer['digest']}: .* compressed with {name}"):
            convert_it(layout.source(layout.image((tar, ""), more={"layers": [layer]})))

    @pytest.mark.parametrize(
        ("media_type", "why"),
        [
            (f"{OCI_LAYER}.v1.tar+gzip+encrypted", "encrypted"),
            ("application/vnd.in-toto+json", "in-toto.*only tars can be converted"),
        ],
    )
    def test_one_that_is_not_a_tar_is_refused(
        self, convert_it: Converter, layout: Layout, media_type: str, why: str
    ) -> None:
        with pytest.raises(InvalidInput, match=why):
            convert_it(layout.source(layout.image((TAR, media_type))))


class TestIndexes:
    @pytest.mark.parametrize("platform", [AMD64, ARM64, ARMV7])
    @pytest.mark.parametrize("named", [None, m.Platform()])
    def test_the_config_says_what_the_index_does_not(
        self, convert_it: Converter, layout: Layout, platform: m.Platform, named: m.Platform | None
    ) -> None:
        images = [on(named, layout.of(one)) for one in (ARM64, m.Platform.parse("linux/arm/v6"), AMD64, ARMV7)]
        convert_it(layout.source(layout.index(*images)), platform)
        assert convert_it.platform() == str(platform)

    def test_an_entry_that_names_the_platform_comes_first(self, convert_it: Converter, layout: Layout) -> None:
        unnamed = layout.image((TAR, f"{OCI_LAYER}.v1.tar"))
        convert_it(layout.source(layout.index(unnamed, on(AMD64, layout.of(AMD64)))))
        assert convert_it.platform() == "linux/amd64"

    def test_indexes_below_it_belong_to_it(self, convert_it: Converter, layout: Layout) -> None:
        below = layout.index(on(ARM64, layout.of(ARM64)), layout.index(layout.of(ARMV7)))
        source = layout.source(layout.index(below, on(AMD64, layout.of(AMD64)), below, annotations={"a": "b"}))
        for platform in (AMD64, ARM64, ARMV7):
            convert_it(source, platform)
            assert convert_it.platform() == str(platform)
        convert_it(source, all_platforms=True)
        index = msgspec.json.decode(convert_it.repository.manifest("gear")[0])
        found = [convert_it.platform(child["digest"]) for child in index["manifests"]]
        assert found == ["linux/arm64", "linux/arm/v7", "linux/amd64"]
        assert index["annotations"] == {"a": "b"}
        with pytest.raises(NotFound, match=r"linux/riscv64; it has: linux/amd64, linux/arm/v7, linux/arm64"):
            convert_it(source, m.Platform.parse("linux/riscv64"))

    def test_there_may_not_be_too_many_of_them(self, convert_it: Converter, layout: Layout) -> None:
        nested = layout.index(layout.of(AMD64))
        for number in range(MAX_NESTED_INDEXES):
            nested = layout.index(nested, annotations={"depth": str(number)})
        convert_it(layout.source(nested))
        with pytest.raises(InvalidInput, match=f"more than {MAX_NESTED_INDEXES} nested indexes"):
            convert_it(layout.source(layout.index(nested, annotations={"depth": "one more"})))

    @pytest.mark.parametrize("annotated", [False, True])
    def test_what_is_about_images_is_no_image(self, convert_it: Converter, layout: Layout, annotated: bool) -> None:
        unknown = m.Platform("unknown", "unknown")
        attestation = layout.image((b"{}", "application/vnd.in-toto+json"), platform=unknown)
        about = {"annotations": {"vnd.docker.reference.type": "attestation-manifest"}} if annotated else {}
        empty = layout.put(b"{}", "application/vnd.oci.empty.v1+json")
        artifact = layout.image((b"{}", "text/spdx"), more={"config": empty})
        children = [artifact, on(unknown, attestation) | about, layout.of(ARM64), layout.of(AMD64)]
        source = layout.source(layout.index(*children))
        convert_it(source)
        assert convert_it.platform() == "linux/amd64"
        convert_it(source, all_platforms=True)
        index = msgspec.json.decode(convert_it.repository.manifest("gear")[0])
        assert [convert_it.platform(one["digest"]) for one in index["manifests"]] == ["linux/arm64", "linux/amd64"]

    @pytest.mark.parametrize("manifests", [{"manifests": None}, {"manifests": []}])
    def test_one_without_images_is_refused(
        self, convert_it: Converter, layout: Layout, manifests: dict[str, Any]
    ) -> None:
        source = layout.source(layout.index(**manifests))
        for all_platforms in (False, True):
            with pytest.raises(NotFound, match=r"has no image for .*; it has: none"):
                convert_it(source, all_platforms=all_platforms)

    @pytest.mark.parametrize("name", ["", "v1"])
    def test_several_platforms_in_a_layout_under_one_name_are_one_image(
        self, convert_it: Converter, layout: Layout, name: str
    ) -> None:
        named = {"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}
        other = (
            [on(AMD64, layout.of(ARM64)) | {"annotations": {"org.opencontainers.image.ref.name": "v2"}}] if name else []
        )
        source = layout.source(*other, *(on(one, layout.of(one)) | named for one in (AMD64, ARM64)))
        source += f":{name}" if name else ""
        for platform in (AMD64, ARM64):
            convert_it(source, platform)
            assert convert_it.platform() == str(platform)
        convert_it(source, all_platforms=True)
        index = msgspec.json.decode(convert_it.repository.manifest("gear")[0])
        assert [convert_it.platform(one["digest"]) for one in index["manifests"]] == ["linux/amd64", "linux/arm64"]

    def test_several_images_of_one_platform_in_a_layout_have_to_be_told_apart(
        self, convert_it: Converter, layout: Layout
    ) -> None:
        images = [on(AMD64, layout.of(AMD64)), on(AMD64, layout.image((TAR, f"{OCI_LAYER}.v1.tar")))]
        with pytest.raises(InvalidInput, match="holds 2 images"):
            convert_it(layout.source(*images))


class TestPlatforms:
    @pytest.fixture(params=["registry", "layout", "archive"])
    def source(self, request: pytest.FixtureRequest, convert_it: Converter, tmp_path: Path) -> str:
        """Of one image, for arm64."""
        image = Image([tar_of([("linux/arm64", b"")])], architecture="arm64", compression="")
        if request.param == "registry":
            image.push(convert_it.repository, "source")
            return f"{convert_it.name}:source"
        if request.param == "layout":
            image.write_layout(tmp_path / "written")
            return f"oci:{tmp_path / 'written'}"
        (tmp_path / "image.tar").write_bytes(image.saved())
        return f"docker-archive:{tmp_path / 'image.tar'}"

    def test_one_that_the_only_image_is_not_for_is_refused(self, convert_it: Converter, source: str) -> None:
        with pytest.raises(NotFound, match="no image for linux/amd64; it has: linux/arm64"):
            convert_it(source, AMD64)
        with pytest.raises(NotFound):
            convert_it.repository.manifest("gear")

    @pytest.mark.parametrize("asked", [None, ARM64, m.Platform.parse("linux/arm64/v8")])
    def test_without_one_the_only_image_is_taken(
        self, convert_it: Converter, source: str, asked: m.Platform | None
    ) -> None:
        convert_it(source, asked)
        assert convert_it.platform() == "linux/arm64"

    def test_an_image_that_names_none_is_for_none_that_is_asked_for(
        self, convert_it: Converter, layout: Layout
    ) -> None:
        source = layout.source(layout.of(None))
        with pytest.raises(NotFound, match="one without a platform"):
            convert_it(source, AMD64)
        convert_it(source, None)


class TestOwnName:
    IMAGE = Image([TAR])

    @pytest.fixture
    def original(self, convert_it: Converter) -> str:
        """The digest of an image that is there as `v1`, and as `latest`."""
        self.IMAGE.push(convert_it.repository, "latest")
        return self.IMAGE.push(convert_it.repository, "v1")

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            ("{name}:v1", "{name}:v1"),
            ("{name}", "{name}"),
            ("{name}:latest", "{name}"),
            ("{name}:v1", "docker://{name}:v1"),
            ("{name}:v1@{digest}", "{name}:v1"),
            ("{name}@{digest}", "{name}:v1"),
            ("{elsewhere}:v1", "{name}:v1"),
        ],
    )
    @pytest.mark.parametrize("all_platforms", [False, True])
    def test_an_original_is_not_replaced(
        self, convert_it: Converter, original: str, source: str, target: str, all_platforms: bool
    ) -> None:
        names = {"name": convert_it.name, "digest": original}
        names["elsewhere"] = convert_it.name.replace("127.0.0.1", "localhost")
        with pytest.raises(InvalidInput, match=r"choose another tag, such as .*-gear"):
            convert_it(source.format(**names), target=target.format(**names), all_platforms=all_platforms)
        assert convert_it.repository.manifest("v1")[0] == self.IMAGE.manifest

    def test_another_tag_or_repository_is_another_name(self, convert_it: Converter, original: str) -> None:
        convert_it(f"{convert_it.name}:v1", target=f"{convert_it.name}:v2")
        convert_it(f"{convert_it.name}:v1", target=f"{convert_it.name}/other:v1")
        convert_it(f"{convert_it.name}@{original}", target=f"{convert_it.name}:v2")
        assert convert_it.repository.manifest("v1")[0] == self.IMAGE.manifest

    def test_an_index_is_not_replaced(self, convert_it: Converter) -> None:
        index = push_index(convert_it.repository, "many", [self.IMAGE])
        for source in (f"{convert_it.name}:many", f"{convert_it.name}@{m.digest_of(index)}"):
            with pytest.raises(InvalidInput, match="choose another tag"):
                convert_it(source, target=f"{convert_it.name}:many", all_platforms=True)

    def test_a_gear_image_is_converted_in_place(self, convert_it: Converter, original: str) -> None:
        convert_it(f"{convert_it.name}:v1")
        base = convert_it.image()
        built = Image([*base.tars, tar_of([("top", CONTENT)])], labels={m.GEAR_MARK: "1"})
        built.push(convert_it.repository, "gear")
        convert_it(f"{convert_it.name}:gear")
        assert CONTENT not in convert_it.image().tars[1]


def test_json_that_is_nested_without_end_is_refused() -> None:
    deep = b'{"config":' * 100_000
    with pytest.raises(InvalidInput, match="a config"):
        m.decode(deep, m.Config, "a config")
