"""A blob that was applied before is not applied again: the layer is copied by hard links."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gearworkers.engine.engine import Engine
from gearworkers.errors import AlreadyExists
from gearworkers.layers.incomplete import IncompleteLayers
from gearworkers.settings import Settings
from plugin_gateway.containerd.snapshot_table import AppliedBlob
from plugin_gateway.containerd.snapshots import Snapshots
from tests.conformance.layers import File, directory, file, opaque, tar, whiteout
from tests.support.lazynode import gear_tar

DIGEST = "sha256:" + "0" * 64
FILES = (directory("d"), file("d/new", b"new"), whiteout("lower"))


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = Engine.of(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test"))
    engine.prepare()
    return engine


@pytest.fixture
def snapshots(engine: Engine) -> Iterator[Snapshots]:
    with closing(Snapshots(engine)) as snapshots:
        snapshots.open()
        yield snapshots
    engine.close()


def prepared(snapshots: Snapshots, word: str, parent: str = "") -> str:
    """Prepare a snapshot that waits for Apply; return its layer."""
    (mount,) = snapshots.prepare(key(word), parent, {})
    layer = snapshots.layer_of([mount])
    assert layer
    return layer


def key(word: str) -> str:
    return f"test/1/extract-{word}"


def fill(engine: Engine, snapshots: Snapshots, word: str, *files: File, parent: str = "") -> AppliedBlob:
    """Apply a tar to a new snapshot as a worker does, commit it as *word*, and return the blob."""
    layer = prepared(snapshots, word, parent)
    engine.apply_diff(layer, snapshots.prepare_apply(layer), io.BytesIO(tar(*files)))
    blob = AppliedBlob(DIGEST, layer, "sha256:of-the-tar", 10)
    snapshots.commit(key(word), word, {})
    return blob


def copy(snapshots: Snapshots, word: str, parent: str = "") -> AppliedBlob | None:
    """Copy the layer of DIGEST to a new snapshot and commit that as *word*; None if there is nothing to copy."""
    layer = prepared(snapshots, word, parent)
    snapshots.prepare_apply(layer)
    copied = snapshots.copy_applied(layer, DIGEST)
    if copied is None:
        return None
    snapshots.note_applied(copied)
    snapshots.commit(key(word), word, {})
    assert copied.layer == layer
    return copied


def files(snapshots: Snapshots, name: str) -> set[str]:
    (mount,) = snapshots.view("test/1/view", name, {})
    top = Path(mount.source)
    found = list(top.rglob("*"))
    for path in found:
        assert path.is_dir() or path.read_bytes() is not None, "its object is present"
    snapshots.remove("test/1/view")
    return {str(path.relative_to(top)) for path in found}


def test_a_copy_has_the_files_under_another_parent(engine: Engine, snapshots: Snapshots) -> None:
    fill(engine, snapshots, "base", file("lower"), file("other"))
    first = fill(engine, snapshots, "first", *FILES)
    snapshots.note_applied(first)
    copied = copy(snapshots, "second", "base")
    assert copied is not None and (copied.diff_id, copied.tar_bytes) == (first.diff_id, first.tar_bytes)
    assert files(snapshots, "first") == {"d", "d/new"}
    assert files(snapshots, "second") == {"d", "d/new", "other"}
    assert snapshots.usage("second") == snapshots.usage("first")
    assert not list(engine.faults(read_data=True, repair=False))


def test_a_chain_may_have_one_blob_twice(engine: Engine, snapshots: Snapshots) -> None:
    snapshots.note_applied(fill(engine, snapshots, "first", directory("d"), opaque("d"), file("d/a", b"a")))
    fill(engine, snapshots, "between", directory("d"), file("d/b", b"b"), parent="first")
    assert copy(snapshots, "last", "between")
    assert files(snapshots, "between") == {"d", "d/a", "d/b"}
    assert files(snapshots, "last") == {"d", "d/a"}
    snapshots.prepare("test/1/active", "last", {})
    (Path(snapshots.mounts("test/1/active")[0].source) / "d/a").write_bytes(b"changed")
    assert files(snapshots, "first") == {"d", "d/a"}


def test_a_copy_survives_the_first_layer(engine: Engine, snapshots: Snapshots) -> None:
    snapshots.note_applied(fill(engine, snapshots, "first", *FILES))
    assert copy(snapshots, "second")
    snapshots.remove("first")
    engine.collect_garbage()
    assert files(snapshots, "second") == {"d", "d/new"}
    assert copy(snapshots, "third"), "the second layer takes its place"
    assert not list(engine.faults(read_data=True, repair=False))


def test_nothing_is_copied_from_removed_or_unknown_layers(engine: Engine, snapshots: Snapshots) -> None:
    assert copy(snapshots, "unknown") is None
    first = fill(engine, snapshots, "first", *FILES)
    snapshots.note_applied(first)
    snapshots.remove("first")
    snapshots.note_applied(first)  # by an Apply that ended after the removal
    assert copy(snapshots, "second") is None
    layer = snapshots.layer_of(snapshots.mounts(key("second")))
    assert layer
    engine.apply_diff(layer, "", io.BytesIO(tar(*FILES)), again=True)
    snapshots.commit(key("second"), "second", {})
    assert files(snapshots, "second") == {"d", "d/new"}


def test_private_layers_are_not_copied(engine: Engine, snapshots: Snapshots) -> None:
    fill(engine, snapshots, "private", file(".gear-private"), file("secret", b"secret"))
    public = fill(engine, snapshots, "public", *FILES)
    snapshots.note_applied(public)
    assert copy(snapshots, "below a private parent", "private") is None
    snapshots.remove("public")
    snapshots.note_applied(fill(engine, snapshots, "other", file(".gear-private"), file("secret", b"secret")))
    assert copy(snapshots, "of a private layer") is None


def test_the_copy_of_an_incomplete_layer_is_incomplete_until_its_objects_arrive(
    engine: Engine, snapshots: Snapshots
) -> None:
    content = b"content" * 1000
    layer = prepared(snapshots, "first")
    engine.apply_diff(layer, "", io.BytesIO(gear_tar({"file": content})))
    snapshots.note_applied(AppliedBlob(DIGEST, layer, "sha256:of-the-tar", 10))
    snapshots.commit(key("first"), "first", {})
    copied = copy(snapshots, "second")
    assert copied is not None and not engine.layers.is_complete(copied.layer)
    snapshots.remove("first")
    fill(engine, snapshots, "with the content", file("file", content))
    snapshots.remove("with the content")
    engine.collect_garbage()
    incomplete = IncompleteLayers(engine.settings.gear_images_path)
    assert incomplete.newly_complete(engine.objects) == [copied.layer]
    assert incomplete.mark_complete(copied.layer, engine.objects)
    assert files(snapshots, "second") == {"file"}


def test_a_filled_layer_is_not_filled_by_a_copy(engine: Engine, snapshots: Snapshots) -> None:
    snapshots.note_applied(fill(engine, snapshots, "first", *FILES))
    layer = prepared(snapshots, "second")
    engine.apply_diff(layer, "", io.BytesIO(tar(file("own"))))
    with pytest.raises(AlreadyExists, match="content"):
        snapshots.copy_applied(layer, DIGEST)
    snapshots.commit(key("second"), "second", {})
    assert files(snapshots, "second") == {"own"}
