"""Convert each kind of file, layer and manifest, with a real registry and a real remote."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from gearworkers.errors import FailedPrecondition, GearError, IntegrityError, InvalidInput, ResourceExhausted
from gearworkers.images import manifest as m
from gearworkers.images.convert import convert_layer
from gearworkers.images.gear_layer import READ_BUFFER_BYTES
from gearworkers.images.layer_records import ConvertedLayer
from gearworkers.images.plan import LayerJob, plan_conversion
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from gearworkers.tar import writer
from gearworkers.tar.entry import TarEntry
from tests.support.conversions import (
    AMD64,
    BASE,
    LARGE,
    MIDDLE,
    SMALL,
    TOP,
    converted,
    converted_image,
    noise,
    pushed,
    repository,
    sparse_tar,
    special,
)
from tests.support.images import Image, contents_of, pull, tar_of
from tests.support.registry import Registry

pytestmark = pytest.mark.slow


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
        expected["config"]["Labels"] = {"a": "b", m.GEAR_LABEL: "1"}
        expected["rootfs"]["diff_ids"] = [m.digest_of(tar) for tar in found.tars]
        assert found.config == expected
        assert found.manifest["annotations"] == {m.GEAR_LABEL: "1"}

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
def test_an_image_without_a_variant_has_the_default_variant(requested: str, found: str, runs: bool) -> None:
    assert m.Platform.parse(requested).runs(m.Platform.parse(found)) is runs


def test_jobs_and_results_survive_json() -> None:
    job = LayerJob("source", "target", "sha256:1", 1, "sha256:2", True)
    done = ConvertedLayer("sha256:1", "sha256:3", 1, "sha256:4", 1, 2, 3, 4, 5, True)
    assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(job))), LayerJob) == job
    assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(done))), ConvertedLayer) == done
