"""Convert images from indexes, OCI layouts and `docker save` archives."""

from __future__ import annotations

import io
import json
import os
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.errors import IntegrityError, InvalidInput, NotFound
from gearworkers.images import manifest as m
from gearworkers.images.source import open_source
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from tests.support.conversions import (
    BASE,
    MIDDLE,
    TOP,
    converted,
    pushed,
    repository,
    special,
)
from tests.support.images import Image, contents_of, pull, push_index, tar_of
from tests.support.registry import Registry

pytestmark = pytest.mark.slow


class TestIndexes:
    ARM = Image([tar_of([("arm", MIDDLE)])], oci=True, architecture="arm64")
    AMD = Image([tar_of([("amd", MIDDLE)])], oci=True)
    NOTE = Image([tar_of([("note", b"")])], oci=True, architecture="unknown")

    @pytest.fixture
    def source(self, settings: Settings, peer: Registry) -> str:
        target = repository(settings, f"{peer.host}/many")
        push_index(target, "v1", [self.ARM, self.AMD], [self.NOTE])
        return f"{peer.host}/many:v1"

    def test_only_the_requested_platform_is_converted(self, settings: Settings, peer: Registry, source: str) -> None:
        converted(settings, source, f"{peer.host}/gear:v1")
        found = pull(repository(settings, f"{peer.host}/gear"), "v1")
        assert found.config["architecture"] == "amd64"
        assert contents_of(found.tars[0], open_remote(settings)) == contents_of(self.AMD.tars[0])

    def test_all_platforms_are_converted_without_attestations(
        self, settings: Settings, peer: Registry, source: str
    ) -> None:
        converted(settings, source, f"{peer.host}/gear:v1", all_platforms=True)
        target = repository(settings, f"{peer.host}/gear")
        index = json.loads(target.manifest("v1")[0])
        assert [child["platform"]["architecture"] for child in index["manifests"]] == ["arm64", "amd64"]
        assert index["annotations"] == {"a": "b"}
        architectures = [pull(target, child["digest"]).config["architecture"] for child in index["manifests"]]
        assert architectures == ["arm64", "amd64"]

    def test_the_error_for_a_missing_platform_lists_the_available_ones(
        self, settings: Settings, peer: Registry, source: str
    ) -> None:
        with pytest.raises(NotFound, match=r"linux/riscv64.*linux/amd64, linux/arm64"):
            converted(settings, source, f"{peer.host}/gear:v1", m.Platform.parse("linux/riscv64"))


class TestArchives:
    IMAGE = Image([BASE, TOP], compression="")

    def test_a_docker_archive_is_converted_like_its_pushed_image(
        self, settings: Settings, peer: Registry, tmp_path: Path
    ) -> None:
        (tmp_path / "image.tar").write_bytes(self.IMAGE.saved("some/image:v1"))
        converted(settings, f"docker-archive:{tmp_path / 'image.tar'}", f"{peer.host}/saved:v1")
        converted(settings, pushed(settings, peer, self.IMAGE), f"{peer.host}/pushed:v1")
        found = pull(repository(settings, f"{peer.host}/saved"), "v1")
        assert found == pull(repository(settings, f"{peer.host}/pushed"), "v1")

    def test_gzip_layers_in_an_archive_are_recognized(self, settings: Settings, peer: Registry, tmp_path: Path) -> None:
        (tmp_path / "image.tar").write_bytes(replace(self.IMAGE, compression="gzip").saved())
        converted(settings, f"docker-archive:{tmp_path / 'image.tar'}", f"{peer.host}/gear:v1")
        found = pull(repository(settings, f"{peer.host}/gear"), "v1")
        assert contents_of(found.tars[1], open_remote(settings)) == contents_of(TOP)

    def test_zstd_layers_in_an_archive_are_recognized(self, settings: Settings, peer: Registry, tmp_path: Path) -> None:
        (tmp_path / "image.tar").write_bytes(replace(self.IMAGE, compression="zstd").saved())
        converted(settings, f"docker-archive:{tmp_path / 'image.tar'}", f"{peer.host}/gear:v1")
        found = pull(repository(settings, f"{peer.host}/gear"), "v1")
        assert contents_of(found.tars[1], open_remote(settings)) == contents_of(TOP)

    @pytest.mark.parametrize(
        "link",
        [
            special("1/layer.tar", tarfile.LNKTYPE, linkname="0/layer.tar"),
            special("1/layer.tar", tarfile.SYMTYPE, linkname="../0/layer.tar"),
        ],
        ids=["hard", "symbolic"],
    )
    def test_a_layer_in_an_archive_may_be_a_link_to_another(
        self, settings: Settings, peer: Registry, tmp_path: Path, link: tarfile.TarInfo
    ) -> None:
        twice = Image([BASE, BASE], compression="")
        with tarfile.open(fileobj=io.BytesIO(twice.saved())) as tar:
            members = [(info.name, file.read()) for info in tar if (file := tar.extractfile(info))]
        linked = [link if name == link.name else (name, data) for name, data in members]
        (tmp_path / "image.tar").write_bytes(tar_of(linked))
        report = converted(settings, f"docker-archive:{tmp_path / 'image.tar'}", f"{peer.host}/gear:v1")
        assert report.layers == 1

    @pytest.mark.parametrize("layer", ["../outside", "/dev/zero", "pipe"])
    def test_only_regular_files_inside_an_unpacked_archive_are_read(
        self, settings: Settings, tmp_path: Path, layer: str
    ) -> None:
        (tmp_path / "outside").write_bytes(BASE)
        directory = tmp_path / "archive"
        directory.mkdir()
        os.mkfifo(directory / "pipe")
        (directory / "config.json").write_bytes(Image([BASE], compression="").config)
        (directory / "manifest.json").write_text(json.dumps([{"Config": "config.json", "Layers": [layer]}]))
        with pytest.raises(InvalidInput, match=layer):
            converted(settings, f"docker-archive:{directory}", "localhost/gear")

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("name", ["", ":v1", ":host.org/image:v1"])
    def test_an_oci_layout_is_converted(
        self, settings: Settings, peer: Registry, tmp_path: Path, packed: bool, name: str
    ) -> None:
        path = tmp_path / "layout"
        replace(self.IMAGE, oci=True).write_layout(path, [name.removeprefix(":")] if name else [])
        if packed:
            with tarfile.open(tmp_path / "layout.tar", "w") as tar:
                tar.add(path, ".")
            path = tmp_path / "layout.tar"
        converted(settings, f"oci:{path}{name}", f"{peer.host}/gear:v1")
        found = pull(repository(settings, f"{peer.host}/gear"), "v1")
        assert contents_of(found.tars[0], open_remote(settings)) == contents_of(BASE)

    def test_a_layout_with_several_images_requires_a_tag(
        self, settings: Settings, peer: Registry, tmp_path: Path
    ) -> None:
        self.IMAGE.write_layout(tmp_path / "layout", ["v1", "v2"])
        with pytest.raises(InvalidInput, match=r"2 images.*v1, v2"):
            converted(settings, f"oci:{tmp_path / 'layout'}", f"{peer.host}/gear:v1")
        assert converted(settings, f"oci:{tmp_path / 'layout'}:v2", f"{peer.host}/gear:v1")

    def test_a_damaged_layer_fails_the_conversion_and_publishes_no_image(
        self, settings: Settings, peer: Registry, tmp_path: Path
    ) -> None:
        self.IMAGE.write_layout(tmp_path / "layout")
        (tmp_path / "layout/blobs/sha256" / m.digest_of(TOP).removeprefix("sha256:")).write_bytes(TOP[:-1] + b"x")
        with pytest.raises(IntegrityError, match=m.digest_of(TOP)):
            converted(settings, f"oci:{tmp_path / 'layout'}", f"{peer.host}/gear:v1")
        with pytest.raises(NotFound):
            repository(settings, f"{peer.host}/gear").manifest("v1")

    @pytest.mark.parametrize("source", ["oci:/missing", "docker-archive:/missing:v1"])
    def test_the_error_for_a_missing_path_names_it(self, settings: Settings, source: str) -> None:
        with pytest.raises(NotFound, match="/missing"):
            converted(settings, source, "localhost/gear")


class TestContentStore:
    def test_an_image_is_read_by_its_digest(self, settings: Settings, peer: Registry, tmp_path: Path) -> None:
        image = Image([BASE, TOP])
        image.write_layout(tmp_path / "content")
        (tmp_path / "content" / "index.json").unlink()
        source = f"content:{tmp_path / 'content'}@{m.digest_of(image.manifest)}"
        converted(settings, source, f"{peer.host}/stored:v1")
        found = pull(repository(settings, f"{peer.host}/stored"), "v1")
        with closing(open_remote(settings)) as remote:
            assert [contents_of(tar, remote) for tar in found.tars] == [contents_of(tar) for tar in image.tars]

    @pytest.mark.parametrize("digest", ["sha256:" + "0" * 64, "../index.json", ""])
    def test_a_missing_digest_is_an_error(self, tmp_path: Path, digest: str) -> None:
        Image([BASE]).write_layout(tmp_path / "content")
        with pytest.raises((NotFound, InvalidInput)):
            open_source(Settings().registry, f"content:{tmp_path / 'content'}@{digest}")
