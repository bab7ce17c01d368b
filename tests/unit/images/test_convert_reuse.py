"""Reuse converted layers; a conversion always gives the same bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from gearworkers.errors import IntegrityError
from gearworkers.images.convert import convert_layer
from gearworkers.images.layer_records import read_record, record_name
from gearworkers.images.manifest import digest_of
from gearworkers.images.plan import plan_conversion
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from tests.support import registries
from tests.support.conversions import (
    AMD64,
    BASE,
    MIDDLE,
    TOP,
    converted,
    noise,
    pushed,
    repository,
)
from tests.support.images import Image, pull, tar_of
from tests.support.registry import Registry

pytestmark = pytest.mark.slow


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

    def test_a_layer_is_converted_again_if_its_index_is_missing(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE]))
        first = converted(settings, source, f"{peer.host}/gear:v1")
        _stored(settings, first.converted[0].digest).unlink()
        report = converted(settings, source, f"{peer.host}/gear:v1")
        assert (report.reused_layers, report.new_objects) == (0, 0)
        assert _stored(settings, first.converted[0].digest).exists()

    def test_a_layer_is_converted_again_if_its_index_is_damaged(
        self, settings: Settings, peer: Registry, tmp_path: Path
    ) -> None:
        source = pushed(settings, peer, Image([BASE]))
        first = converted(settings, source, f"{peer.host}/gear:v1")
        stored = _stored(settings, first.converted[0].digest)
        stored.chmod(0o600)
        stored.write_bytes(stored.read_bytes()[:-1] + b"x")
        with registries.registry(tmp_path / "other") as other:
            assert converted(settings, source, f"{other.host}/gear:v1").reused_layers == 0
            assert pull(repository(settings, f"{other.host}/gear"), "v1")

    def test_a_layer_that_is_too_large_for_an_index_is_reused_in_its_repository_only(
        self, settings: Settings, peer: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gearworkers.images.convert.MAX_INDEX_BYTES", 100)
        source = pushed(settings, peer, Image([BASE]))
        first = converted(settings, source, f"{peer.host}/gear:v1")
        assert not _stored(settings, first.converted[0].digest).exists()
        assert converted(settings, source, f"{peer.host}/gear:v1").reused_layers == 1
        assert converted(settings, source, f"{peer.host}/other:v1").reused_layers == 0

    def test_a_malformed_record_is_ignored(self, settings: Settings, peer: Registry) -> None:
        plan = plan_conversion(settings.registry, pushed(settings, peer, Image([BASE])), f"{peer.host}/gear", AMD64)
        open_remote(settings).put_document(record_name(plan.jobs()[0].digest), b"nonsense")
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

    def test_again_converts_a_layer_that_was_converted_before(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE]))
        first = converted(settings, source, f"{peer.host}/gear:v1")
        second = converted(settings, source, f"{peer.host}/gear:v1", again=True)
        assert (second.reused_layers, second.digest) == (0, first.digest)


class TestIndexes:
    def test_an_index_is_stored_without_a_push(self, settings: Settings, peer: Registry) -> None:
        image = Image([BASE, TOP])
        source = pushed(settings, peer, image)
        report = converted(settings, source, "")
        assert (report.target, report.layers, report.reused_layers) == ("", 2, 0)
        assert report.digest == digest_of(repository(settings, source).manifest("v1")[0])
        remote = open_remote(settings)
        diff_ids = {f"sha256:{hashlib.sha256(tar).hexdigest()}": len(tar) for tar in (BASE, TOP)}
        for made in report.converted:
            record = read_record(remote.document, made.source_digest)
            assert record is not None and record.has_index
            assert record.source_tar_bytes == diff_ids.pop(record.source_diff_id)
            assert sum(map(len, remote.fetch(made.object_digest))) == made.size_bytes

    def test_an_indexed_image_is_not_converted_again(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE, TOP]))
        converted(settings, source, "")
        assert converted(settings, source, f"{peer.host}/gear:v1").reused_layers == 2
        assert len(pull(repository(settings, f"{peer.host}/gear"), "v1").tars) == 2

    def test_a_converted_image_is_indexed(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE]))
        converted(settings, source, f"{peer.host}/gear:v1")
        assert converted(settings, source, "").reused_layers == 1

    def test_private_layers_are_not_indexed(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE, tar_of([(".gear-private", b""), ("secret", MIDDLE)]), TOP]))
        report = converted(settings, source, "")
        assert report.private_layers == 2
        records = [read_record(open_remote(settings).document, layer.source_digest) for layer in report.converted]
        assert sum(record is not None for record in records) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"source_diff_id": "sha256:1"},
            {"converted": {"digest": "../etc/passwd"}},
            {"converted": {"size_bytes": 0}},
            {"converted": {"source_digest": f"sha256:{'0' * 64}"}},
            {"source_tar_bytes": "many"},
        ],
    )
    def test_an_invalid_record_is_ignored(self, settings: Settings, peer: Registry, change: dict[str, object]) -> None:
        made = converted(settings, pushed(settings, peer, Image([BASE])), "").converted[0]
        remote, name = open_remote(settings), record_name(made.source_digest)
        stored = json.loads(remote.document(name) or b"")
        assert read_record(remote.document, made.source_digest) is not None
        nested = change.get("converted", {})
        assert isinstance(nested, dict)
        remote.put_document(name, json.dumps(stored | change | {"converted": stored["converted"] | nested}).encode())
        assert read_record(remote.document, made.source_digest) is None


def _stored(settings: Settings, digest: str) -> Path:
    """The file of an object in the remote, a directory."""
    name = digest.removeprefix("sha256:")
    return Path(settings.remote.url) / "objects" / name[:2] / name
