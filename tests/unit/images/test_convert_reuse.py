"""Reuse converted layers; a conversion always gives the same bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from gearworkers.errors import IntegrityError
from gearworkers.images.convert import convert_layer, record_name
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

    def test_again_converts_a_layer_that_was_converted_before(self, settings: Settings, peer: Registry) -> None:
        source = pushed(settings, peer, Image([BASE]))
        first = converted(settings, source, f"{peer.host}/gear:v1")
        second = converted(settings, source, f"{peer.host}/gear:v1", again=True)
        assert (second.reused_layers, second.digest) == (0, first.digest)
