"""Convert each kind of file, layer, manifest and source, with real registries and a real remote."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from gearworkers.errors import FailedPrecondition, GearError, IntegrityError, InvalidInput, NotFound, ResourceExhausted
from gearworkers.images import manifest as m
from gearworkers.images.convert import ConvertedLayer, convert_layer, record_name
from gearworkers.images.convert_local import convert_locally
from gearworkers.images.gear_layer import INLINE_BYTES, READ_BUFFER_BYTES
from gearworkers.images.gear_manifest import ConversionReport, finish_conversion
from gearworkers.images.plan import LayerJob, plan_conversion
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.images.upload import SMALL_BYTES
from gearworkers.remote.factory import open_remote
from gearworkers.settings import RegistrySettings, RemoteSettings, Settings
from gearworkers.tar import writer
from gearworkers.tar.entry import TarEntry
from tests.support import registries
from tests.support.images import Image, Pulled, contents_of, pull, push_index, tar_of
from tests.support.registry import Registry

pytestmark = pytest.mark.slow

AMD64 = m.Platform("amd64", "linux")


def noise(seed: str, size_bytes: int) -> bytes:
    """Return bytes that do not compress."""
    return hashlib.shake_256(seed.encode()).digest(size_bytes)


def special(name: str, kind: bytes, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


SMALL = noise("small", INLINE_BYTES)
MIDDLE = noise("middle", INLINE_BYTES + 1)
LARGE = noise("large", 3 * SMALL_BYTES)
BASE = tar_of(
    [
        special("dir/", tarfile.DIRTYPE, mode=0o1777, uid=5, mtime=1_600_000_000),
        ("dir/empty", b""),
        ("dir/small", SMALL),
        ("dir/middle", MIDDLE),
        ("dir/large", LARGE),
        ("dir/again", LARGE),
        ("dir/" + "long" * 60, MIDDLE[::-1]),
        ("dir/naïve", MIDDLE * 2),
        special("dir/link", tarfile.SYMTYPE, linkname="small"),
        special("dir/hard", tarfile.LNKTYPE, linkname="dir/large"),
        special("dir/fifo", tarfile.FIFOTYPE, mode=0o600),
        special("dir/null", tarfile.CHRTYPE, devmajor=1, devminor=3),
    ]
)
TOP = tar_of([("dir/.wh.small", b""), ("other/.wh..wh..opq", b""), ("other/middle", MIDDLE)])


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Registry]:
    with registries.registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("remote", "other-remote", "empty"):
        (tmp_path / name).mkdir()
    return Settings(
        remote=RemoteSettings(url=str(tmp_path / "remote")),
        registry=RegistrySettings(docker_config=tmp_path / "docker"),
        gear_root=tmp_path / "gear",
    )


def repository(settings: Settings, name: str) -> Repository:
    return Repository.of(settings.registry, Reference.parse(name))


def converted(
    settings: Settings,
    source: str,
    target: str,
    platform: m.Platform | None = AMD64,
    *,
    all_platforms: bool = False,
    again: bool = False,
) -> ConversionReport:
    """Convert in this process, one layer after another."""
    wanted = None if all_platforms else platform
    plan = plan_conversion(settings.registry, source, target, wanted, all_platforms=all_platforms, again=again)
    remote = open_remote(settings)
    done = [convert_layer(settings, remote, job, lambda _: None) for job in plan.jobs()]
    return finish_conversion(settings.registry, plan, done)


def pushed(settings: Settings, peer: Registry, image: Image, name: str = "source") -> str:
    image.push(repository(settings, f"{peer.host}/{name}"), "v1")
    return f"{peer.host}/{name}:v1"


def converted_image(settings: Settings, peer: Registry, image: Image) -> Pulled:
    target = f"{peer.host}/gear:v1"
    converted(settings, pushed(settings, peer, image), target)
    return pull(repository(settings, target), "v1")


class TestImages:
    def test_a_gear_image_has_the_same_files_and_contents(self, settings: Settings, peer: Registry) -> None:
        image = Image([BASE, TOP])
        found = converted_image(settings, peer, image)
        remote = open_remote(settings)
        assert [contents_of(tar, remote) for tar in found.tars] == [contents_of(tar) for tar in image.tars]

    def test_only_small_contents_stay_in_the_layer(self, settings: Settings, peer: Registry) -> None:
        (tar,) = converted_image(settings, peer, Image([BASE])).tars
        assert SMALL in tar
        assert MIDDLE not in tar and LARGE[:1000] not in tar

    def test_small_contents_are_intact_at_every_offset_of_a_large_layer(
        self, settings: Settings, peer: Registry
    ) -> None:
        layer = tar_of([(f"file{number}", noise(str(number), 40 + number % 200)) for number in range(9000)])
        assert len(layer) > 2 * READ_BUFFER_BYTES
        (tar,) = converted_image(settings, peer, Image([layer])).tars
        assert contents_of(tar) == contents_of(layer)

    def test_tar_fails_at_the_guard_entry_and_shows_the_reason(
        self, settings: Settings, peer: Registry, tmp_path: Path
    ) -> None:
        for tar in converted_image(settings, peer, Image([BASE, TOP])).tars:
            with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
                first = opened.next()
            assert first is not None and first.islnk()
            done = subprocess.run(["tar", "-x"], input=tar, cwd=tmp_path, capture_output=True)
            assert done.returncode != 0
            assert b"this is a Gear image, without file contents" in done.stderr

    @pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
    @pytest.mark.parametrize("oci", [False, True])
    def test_every_schema_and_compression_is_converted(
        self, settings: Settings, peer: Registry, compression: str, oci: bool
    ) -> None:
        image = Image([BASE, TOP], compression, oci)
        found = converted_image(settings, peer, image)
        assert found.manifest["mediaType"] == image.media_type
        layer_type = m.OCI_LAYER_GZIP if oci else m.DOCKER_LAYER_GZIP
        assert {layer["mediaType"] for layer in found.manifest["layers"]} == {layer_type}
        assert contents_of(found.tars[1], open_remote(settings)) == contents_of(TOP)

    def test_config_and_history_are_kept_and_the_mark_is_added(self, settings: Settings, peer: Registry) -> None:
        history = ({"created_by": "one"}, {"created_by": "ENV", "empty_layer": True}, {"created_by": "two"})
        image = Image([BASE, TOP], labels={"a": "b"}, history=history, oci=True)
        found = converted_image(settings, peer, image)
        expected = json.loads(image.config)
        expected["config"]["Labels"] = {"a": "b", m.GEAR_MARK: "1"}
        expected["rootfs"]["diff_ids"] = [m.digest_of(tar) for tar in found.tars]
        assert found.config == expected
        assert found.manifest["annotations"] == {m.GEAR_MARK: "1"}

    def test_a_repeated_layer_is_converted_once(self, settings: Settings, peer: Registry) -> None:
        target = f"{peer.host}/gear:v1"
        report = converted(settings, pushed(settings, peer, Image([BASE, TOP, BASE])), target)
        assert report.layers == 2
        assert len(pull(repository(settings, target), "v1").tars) == 3

    def test_converting_a_gear_image_changes_nothing(self, settings: Settings, peer: Registry) -> None:
        first = converted_image(settings, peer, Image([BASE, TOP]))
        converted(settings, f"{peer.host}/gear:v1", f"{peer.host}/twice:v1")
        assert pull(repository(settings, f"{peer.host}/twice"), "v1") == first

    def test_layers_added_to_a_gear_image_are_converted(self, settings: Settings, peer: Registry) -> None:
        base = converted_image(settings, peer, Image([BASE]))
        image = Image([*base.tars, TOP])
        found = converted_image(settings, peer, image)
        assert found.tars[0] == base.tars[0]
        assert contents_of(found.tars[1], open_remote(settings)) == contents_of(TOP)

    def test_the_report_counts_layers_objects_and_bytes(self, settings: Settings, peer: Registry) -> None:
        image = Image([BASE, TOP])
        report = converted(settings, pushed(settings, peer, image), f"{peer.host}/gear:v1")
        contents = {MIDDLE, LARGE, MIDDLE[::-1], MIDDLE * 2}
        manifest = json.loads(image.manifest)
        assert report.bytes_before == sum(layer["size"] for layer in manifest["layers"])
        assert (report.new_objects, report.new_bytes) == (len(contents), sum(map(len, contents)))
        assert (report.objects, report.layers, report.reused_layers) == (len(contents) + 1, 2, 0)
        found = pull(repository(settings, f"{peer.host}/gear"), "v1")
        assert report.bytes_after == sum(layer["size"] for layer in found.manifest["layers"])
        assert report.digest == m.digest_of(msgspec.json.encode(found.manifest))


class TestReproducibility:
    def test_two_conversions_give_the_same_digest(self, settings: Settings, peer: Registry, tmp_path: Path) -> None:
        source = pushed(settings, peer, Image([BASE, TOP]))
        first = converted(settings, source, f"{peer.host}/one:v1")
        elsewhere = replace(settings, remote=replace(settings.remote, url=str(tmp_path / "other-remote")))
        second = converted(elsewhere, source, f"{peer.host}/two:v1")
        assert first.digest == second.digest
        assert second.reused_layers == 0

    @pytest.mark.parametrize("oci", [False, True])
    def test_the_source_compression_does_not_change_the_digest(
        self, settings: Settings, peer: Registry, oci: bool
    ) -> None:
        digests = {
            json.dumps(pull(repository(settings, f"{peer.host}/gear"), "v1").manifest["layers"])
            for compression in ("", "gzip", "zstd")
            if converted(settings, pushed(settings, peer, Image([BASE], compression, oci)), f"{peer.host}/gear:v1")
        }
        assert len(digests) == 1


class TestConvertedLayers:
    def test_a_converted_layer_is_reused(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE, TOP]))
        first = converted(settings, source, f"{peer.host}/gear:v1")
        second = converted(settings, source, f"{peer.host}/gear:v2")
        assert (second.digest, second.reused_layers, second.new_objects) == (first.digest, 2, 0)

    def test_reusing_a_layer_does_not_read_its_source(self, settings: Settings, peer: Registry) -> None:
        image = Image([BASE])
        job = plan_conversion(settings.registry, pushed(settings, peer, image), f"{peer.host}/gear", AMD64).jobs()[0]
        convert_layer(settings, open_remote(settings), job, lambda _: None)
        missing = msgspec.structs.replace(job, source=f"{peer.host}/missing")
        assert convert_layer(settings, open_remote(settings), missing, lambda _: None).reused

    def test_a_layer_is_reused_from_another_repository(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE]))
        converted(settings, source, f"{peer.host}/one:v1")
        assert converted(settings, source, f"{peer.host}/two:v1").reused_layers == 1
        assert pull(repository(settings, f"{peer.host}/two"), "v1").tars

    def test_a_layer_is_copied_from_another_registry(self, settings: Settings, peer: Registry, tmp_path: Path) -> None:
        source = pushed(settings, peer, Image([BASE]))
        converted(settings, source, f"{peer.host}/gear:v1")
        with registries.registry(tmp_path / "second") as second:
            assert converted(settings, source, f"{second.host}/gear:v1").reused_layers == 1
            assert pull(repository(settings, f"{second.host}/gear"), "v1").tars

    def test_a_layer_is_converted_again_if_its_blob_is_missing(
        self, settings: Settings, peer: Registry, tmp_path: Path
    ) -> None:
        image = Image([BASE])
        with registries.registry(tmp_path / "second") as second:
            converted(settings, pushed(settings, second, image), f"{second.host}/gear:v1")
        report = converted(settings, pushed(settings, peer, image), f"{peer.host}/gear:v1")
        assert (report.reused_layers, report.new_objects) == (0, 0)

    def test_a_layer_is_converted_again_if_its_blob_is_damaged(
        self, settings: Settings, peer: Registry, tmp_path: Path
    ) -> None:
        source = pushed(settings, peer, Image([BASE]))
        converted(settings, source, f"{peer.host}/gear:v1")
        layer = pull(repository(settings, f"{peer.host}/gear"), "v1").manifest["layers"][0]["digest"]
        (stored,) = peer.directory.glob(f"storage/**/{layer.removeprefix('sha256:')}/data")
        stored.write_bytes(stored.read_bytes()[:-1] + b"x")
        with registries.registry(tmp_path / "other") as other:
            assert converted(settings, source, f"{other.host}/gear:v1").reused_layers == 0
            assert pull(repository(settings, f"{other.host}/gear"), "v1")

    def test_a_malformed_record_is_ignored(self, settings: Settings, peer: Registry) -> None:
        plan = plan_conversion(settings.registry, pushed(settings, peer, Image([BASE])), f"{peer.host}/gear", AMD64)
        open_remote(settings).put_document(record_name(plan.jobs()[0]), b"nonsense")
        done = convert_layer(settings, open_remote(settings), plan.jobs()[0], lambda _: None)
        assert not done.reused

    @pytest.mark.parametrize("large", [False, True])
    def test_again_replaces_a_damaged_blob_that_was_removed_from_the_remote(
        self, settings: Settings, peer: Registry, large: bool
    ) -> None:
        content = noise("content", 3 << 20) if large else MIDDLE
        source, target = pushed(settings, peer, Image([tar_of([("file", content)])])), f"{peer.host}/gear:v1"
        converted(settings, source, target)
        digest = hashlib.sha256(content).digest()
        remote = open_remote(settings)
        damaged = [digest, *(chunk.digest for chunk in (remote.layout(digest) or [])[:1])]
        files = [next((Path(settings.remote.url) / "objects").glob(f"*/{name.hex()}")) for name in damaged]
        files[-1].chmod(0o600)
        files[-1].write_bytes(b"Rdamaged")
        with pytest.raises(IntegrityError, match=damaged[-1].hex()):
            list(remote.fetch(digest))
        for path in files:
            path.unlink()
        converted(settings, source, target, again=True)
        assert b"".join(remote.fetch(digest)) == content

    def test_again_converts_a_converted_layer_anew(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE]))
        first = converted(settings, source, f"{peer.host}/gear:v1")
        second = converted(settings, source, f"{peer.host}/gear:v1", again=True)
        assert (second.reused_layers, second.digest) == (0, first.digest)


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
    def test_an_unpacked_archive_gives_only_regular_files_inside_it(
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


class TestErrors:
    def test_a_layer_with_contents_missing_in_the_remote_is_rejected(
        self, settings: Settings, peer: Registry, tmp_path: Path
    ) -> None:
        base = converted_image(settings, peer, Image([BASE]))
        empty = replace(settings, remote=replace(settings.remote, url=str(tmp_path / "empty")))
        with pytest.raises(FailedPrecondition, match="gear push"):
            converted(empty, pushed(settings, peer, Image(base.tars), "again"), f"{peer.host}/gear:v2")

    def test_a_target_with_a_digest_is_rejected(self, settings: Settings) -> None:
        with pytest.raises(InvalidInput, match="tag"):
            converted(settings, "localhost/a", f"localhost/b@sha256:{'0' * 64}")

    def test_a_layer_whose_tar_differs_from_its_diff_id_is_rejected(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE]))
        job = plan_conversion(settings.registry, source, f"{peer.host}/gear", AMD64).jobs()[0]
        wrong = msgspec.structs.replace(job, diff_id=m.digest_of(b""))
        with pytest.raises(IntegrityError, match="config"):
            convert_layer(settings, open_remote(settings), wrong, lambda _: None)

    def test_a_layer_that_is_not_a_tar_is_rejected(self, settings: Settings, peer: Registry) -> None:
        with pytest.raises(InvalidInput):
            converted(settings, pushed(settings, peer, Image([b"not a tar" * 1000])), f"{peer.host}/gear:v1")

    def test_a_sparse_file_larger_than_the_disk_is_rejected(self, settings: Settings, peer: Registry) -> None:
        records = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.numblocks": "0"}
        bomb = special("bomb", tarfile.REGTYPE, pax_headers=records | {"GNU.sparse.size": str(1 << 62)})
        with pytest.raises(ResourceExhausted, match="bomb"):
            converted(settings, pushed(settings, peer, Image([tar_of([bomb])])), f"{peer.host}/gear:v1")

    def test_the_error_for_an_unusable_converting_directory_names_it(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE]))
        settings.gear_root.mkdir()
        (settings.gear_root / "converting").touch()
        with pytest.raises(GearError, match=f"store a layer in {settings.gear_root}/converting, below GEAR_ROOT"):
            converted(settings, source, f"{peer.host}/gear:v1")

    def test_a_conversion_requires_a_remote(self, settings: Settings) -> None:
        with pytest.raises(FailedPrecondition, match="GEAR_REMOTE"):
            open_remote(replace(settings, remote=replace(settings.remote, url="")))


@pytest.mark.parametrize(
    ("requested", "found", "runs"),
    [
        ("linux/arm64/v8", "linux/arm64", True),
        ("linux/arm64", "linux/arm64/v8", True),
        ("linux/arm/v7", "linux/arm", True),
        ("linux/arm/v6", "linux/arm/v7", False),
        ("linux/arm/v6", "linux/arm", False),
        ("linux/amd64", "linux/arm64", False),
    ],
)
def test_an_image_without_a_variant_has_the_default_one(requested: str, found: str, runs: bool) -> None:
    assert m.Platform.parse(requested).runs(m.Platform.parse(found)) is runs


def test_sparse_files_become_ordinary_files(settings: Settings, peer: Registry, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for offset in (0, 1 << 20, 5 << 20):
            file.seek(offset)
            file.write(MIDDLE)
        file.truncate(9 << 20)
    tar = sparse_tar(path)
    assert len(tar) < 1 << 20
    (found,) = converted_image(settings, peer, Image([tar])).tars
    ((entry, content),) = contents_of(found, open_remote(settings))
    assert (entry.name, entry.size_bytes, content) == (b"sparse", 9 << 20, path.read_bytes())


def test_conversions_do_not_use_the_systems_temporary_directory(
    settings: Settings, peer: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/tmp may be memory, and copied layers, converted layers and large contents have any size."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(9 << 20)
        file.write(MIDDLE)
    private = tar_of([(".gear-private", b""), ("secret", LARGE)])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    found = converted_image(settings, peer, Image([tar_of([("large", LARGE)]), sparse_tar(path), private]))
    assert len(found.tars) == 3 and found.tars[2] == private
    assert list((settings.gear_root / "converting").iterdir()) == []


def sparse_tar(path: Path) -> bytes:
    command = ["tar", "--sparse", "--format=pax", "-C", str(path.parent), "-cf", "-", path.name]
    return subprocess.run(command, check=True, capture_output=True).stdout


def test_extended_attributes_times_and_unusual_names_are_kept(settings: Settings, peer: Registry) -> None:
    entries = [
        TarEntry(b"caps", mode=0o4755, uid=1 << 30, mtime_ns=1_700_000_000_123_456_789, size_bytes=len(MIDDLE)),
        TarEntry(b"\xff\xfe name", gid=7, mtime_ns=-5_000_000_001, size_bytes=len(MIDDLE)),
    ]
    entries[0].xattrs = {b"security.capability": b"\x01\0\0\x02" + bytes(16), b"user.empty": b""}
    tar = io.BytesIO()
    for entry in entries:
        tar.write(writer.header(entry) + MIDDLE + writer.padding(len(MIDDLE)))
    tar.write(writer.END)
    (found,) = converted_image(settings, peer, Image([tar.getvalue()])).tars
    assert contents_of(found, open_remote(settings)) == contents_of(tar.getvalue())


def test_local_processes_convert_all_layers_and_report_progress(settings: Settings, peer: Registry) -> None:
    image = Image([BASE, TOP, tar_of([("third", LARGE[::-1])])])
    plan = plan_conversion(settings.registry, pushed(settings, peer, image), f"{peer.host}/gear:v1", AMD64)
    read: dict[str, int] = {}

    report = convert_locally(settings, plan, 2, read.__setitem__)
    assert report.layers == 3
    assert read == {job.digest: job.size_bytes for job in plan.jobs()}
    assert len(pull(repository(settings, f"{peer.host}/gear"), "v1").tars) == 3


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
        assert m.GEAR_MARK not in found.config["config"]["Labels"]

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


def test_an_error_in_a_local_process_is_raised_with_its_reason(settings: Settings, peer: Registry) -> None:
    broken = tar_of([("a", MIDDLE)])[:1024] + b"not a tar" * 1000
    plan = plan_conversion(
        settings.registry, pushed(settings, peer, Image([broken, BASE])), f"{peer.host}/gear:v1", AMD64
    )
    with pytest.raises(InvalidInput, match="checksum"):
        convert_locally(settings, plan, 1, lambda *_: None)


def test_jobs_and_results_survive_json() -> None:
    job = LayerJob("source", "target", "sha256:1", 1, "sha256:2", True)
    done = ConvertedLayer("sha256:1", "sha256:3", 1, "sha256:4", 1, 2, 3, 4, 5, True)
    assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(job))), LayerJob) == job
    assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(done))), ConvertedLayer) == done
