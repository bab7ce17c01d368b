"""Private layers in push, BuildKit's layers, fsck, usage and lazy fetching."""

from __future__ import annotations

import errno
import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.cli import inspect_image
from gearworkers.cli.local_images import LocalImage
from gearworkers.digest import DIGEST_XATTR
from gearworkers.errors import GearError, ResourceExhausted
from gearworkers.settings import RemoteSettings, Settings
from gearworkers.tar.entry import TarEntry
from gearworkers.tar.private_marker import starts_with_marker
from gearworkers.tar.reader import TarReader
from gearworkers.util import syscalls as kernel
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.layers import file, tar
from tests.support.lazynode import LazyNode, gear_tar, lazy_node
from tests.support.tiny import tar_of

pytestmark = pytest.mark.slow

SECRET = b"a secret " * 100


@pytest.fixture
def driver(tmp_path: Path) -> GearDriver:
    remote = tmp_path / "remote"
    remote.mkdir()
    driver = GearDriver(
        Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", remote=RemoteSettings(url=str(remote)))
    )
    driver.init("", [], [], [])
    return driver


def apply(driver: GearDriver, id: str, parent: str, data: bytes) -> None:
    driver.create(id, parent)
    driver.apply_diff(id, parent, io.BytesIO(data))


def awaiting_push(driver: GearDriver) -> int:
    return len(os.listdir(driver.settings.gear_push_path))


def public_objects(driver: GearDriver) -> list[Path]:
    return list(driver.settings.gear_public_cache_path.glob("*/*"))


def own_object(driver: GearDriver, id: str) -> Path:
    (found,) = (driver.settings.gear_private_cache_path / id).glob("*/*")
    return found


@pytest.mark.parametrize("size", [len(SECRET), 5 << 20])
def test_no_private_object_is_queued_for_push(driver: GearDriver, size: int) -> None:
    content = (SECRET * (size // len(SECRET) + 1))[:size]
    apply(driver, "base", "", tar_of({"base": b"public"}))
    assert awaiting_push(driver) == 1
    apply(driver, "marked", "base", tar_of({".gear-private": b"", "secret": content}))
    apply(driver, "above", "marked", tar_of({"secret2": content + b"2"}))
    assert awaiting_push(driver) == 1
    assert own_object(driver, "marked").stat().st_size == size


def test_many_contents_and_a_sparse_content_of_a_private_layer_are_not_shared(
    driver: GearDriver, tmp_path: Path
) -> None:
    """A second process stores many contents; a sparse content is stored piece by piece."""
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.write(SECRET)
        sparse.seek(3 << 20)
        sparse.write(SECRET)
    sparse_tar = subprocess.run(["tar", "-cS", "-C", tmp_path, "sparse"], check=True, capture_output=True).stdout
    files = {".gear-private": b"", **{f"f{number}": b"secret %d" % number for number in range(1500)}}
    data = tar_of(files)[: 512 * (1 + 2 * 1500)] + sparse_tar
    apply(driver, "marked", "", data)
    assert not public_objects(driver) and not awaiting_push(driver)
    assert len(list((driver.settings.gear_private_cache_path / "marked").glob("*/*"))) == 1501
    out = io.BytesIO()
    driver.diff("marked", "", out)
    assert out.getvalue() == data
    merged = Path(driver.get("marked"))
    assert (merged / "f1499").read_bytes() == b"secret 1499"
    assert (merged / "sparse").read_bytes() == (tmp_path / "sparse").read_bytes()
    driver.put("marked")


def test_a_layer_that_buildkit_writes_on_a_private_layer_is_not_deduplicated(driver: GearDriver) -> None:
    apply(driver, "base", "", tar_of({"base": b"public"}))
    before = public_objects(driver)
    driver.create("step", "base")
    merged = Path(driver.get("step"))
    (merged / ".gear-private").touch()
    (merged / "secret").write_bytes(SECRET)
    driver.put("step")
    driver.create("next", "step")
    merged = Path(driver.get("next"))
    (merged / "secret2").write_bytes(SECRET)
    driver.put("next")
    for id in ("step", "next"):
        assert not driver.engine.can_dedupe(id)
        assert driver.engine.dedupe(id) == 0
    assert public_objects(driver) == before
    assert awaiting_push(driver) == 1
    apply(driver, "above", "next", tar_of({"third": b"secret too"}))
    assert own_object(driver, "above").read_bytes() == b"secret too"


def test_a_private_layer_is_read_from_its_own_objects_not_from_the_public_cache(driver: GearDriver) -> None:
    """The public file may be half-written, because an import is running or has crashed."""
    apply(driver, "marked", "", tar_of({".gear-private": b"", "secret": SECRET}))
    own = own_object(driver, "marked")
    half = driver.settings.gear_public_cache_path / own.parent.name / own.name
    half.write_bytes(SECRET[:10])
    driver.create_read_write("container", "marked")
    for id in ("marked", "container"):
        assert (Path(driver.get(id)) / "secret").read_bytes() == SECRET
        driver.put(id)
    out = io.BytesIO()
    driver.create("unlike", "")
    driver.diff("container", "unlike", out)
    assert SECRET in out.getvalue()


def test_a_private_store_has_only_the_shards_that_it_needs(driver: GearDriver) -> None:
    """An open in a container searches each private store, and a missing shard makes the search short."""
    apply(driver, "marked", "", tar_of({".gear-private": b""}))
    apply(driver, "above", "marked", tar_of({"secret": SECRET}))
    assert not (driver.settings.gear_private_cache_path / "marked").exists()
    assert not (driver.settings.gear_images_path / "marked" / "private").exists()
    assert len(os.listdir(driver.settings.gear_private_cache_path / "above")) == 1
    assert not list(driver.engine.faults(read_data=True, repair=False))


def test_inspect_shows_private_layers_that_buildkit_wrote(driver: GearDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest layer has the marker in its tree but not in its record."""
    apply(driver, "base", "", tar_of({"base": b"public"}))
    driver.create("step", "base")
    (Path(driver.get("step")) / ".gear-private").touch()
    driver.put("step")
    driver.create("next", "step")
    driver.put(Path(driver.get("next")).parent.name)
    apply(driver, "above", "next", tar_of({"secret": SECRET}))
    image = LocalImage(f"sha256:{'0' * 64}", is_gear=False, top_layer="above")
    monkeypatch.setattr(inspect_image, "find_image", lambda *_: image)
    shown = dict(inspect_image.inspect(driver.settings, "private"))
    assert shown["Layers"] == "4 (4 complete)"
    assert shown["Private"] == "3 of the layers, with files of their own: 1, 900 bytes"
    image = LocalImage(image.id, is_gear=False, top_layer="base")
    assert "Private" not in dict(inspect_image.inspect(driver.settings, "base"))


def test_private_objects_are_counted(driver: GearDriver) -> None:
    apply(driver, "marked", "", tar_of({".gear-private": b"", "a": b"one", "b": b"two", "c": b"one"}))
    assert driver.engine.usage.get().objects == 2
    assert driver.engine.usage.get().stored_bytes >= 6


def test_fsck_reports_a_damaged_and_a_missing_private_object(driver: GearDriver) -> None:
    apply(driver, "marked", "", tar_of({".gear-private": b"", "secret": SECRET}))
    assert not list(driver.engine.faults(read_data=True, repair=False))
    path = own_object(driver, "marked")
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    (fault,) = driver.engine.faults(read_data=True, repair=False)
    assert fault.startswith(f"private object {path}") and fault.endswith("remove the image and pull it again")
    removed, missing = driver.engine.faults(read_data=True, repair=True)
    assert "(removed)" in removed
    assert missing.startswith("layer marked: 1 of its private objects are missing")
    assert driver.engine.layers.is_complete("marked"), "no remote has the object, so it must not be requested"


@pytest.mark.parametrize("mark", [{".gear-private": b""}, {}], ids=["private", "public"])
def test_fsck_continues_after_an_object_with_the_wrong_digest(driver: GearDriver, mark: dict[str, bytes]) -> None:
    apply(driver, "layer", "", tar_of({**mark, "secret": SECRET}))
    path = own_object(driver, "layer") if mark else public_objects(driver)[0]
    os.setxattr(path, DIGEST_XATTR, bytes(32))
    wrong, missing = driver.engine.faults(read_data=False, repair=False)
    assert str(path) in wrong and "does not match its name" in wrong
    assert missing.startswith("layer layer: 1 of its ")


def test_garbage_collection_keeps_private_objects(driver: GearDriver) -> None:
    apply(driver, "marked", "", tar_of({".gear-private": b"", "secret": SECRET}))
    assert driver.engine.collect_garbage().removed_objects == 0
    assert own_object(driver, "marked").read_bytes() == SECRET


def test_private_objects_without_a_layer_are_removed_at_the_next_start(driver: GearDriver) -> None:
    """A failed import leaves such objects, or a crash between the renames of contents and layer."""
    driver.create("new", "")
    (driver.settings.gear_private_cache_path / "new").mkdir()
    (driver.settings.gear_private_cache_path / "removed").mkdir()
    GearDriver(driver.settings).prepare()
    assert not list(driver.settings.gear_private_cache_path.iterdir())


def test_an_import_whose_layer_is_removed_leaves_nothing(driver: GearDriver) -> None:
    driver.create("marked", "")

    class Removing(io.BytesIO):
        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
            driver.remove("marked")
            return super().readinto(buffer)

    with pytest.raises(Exception, match="marked"):
        driver.apply_diff("marked", "", Removing(tar_of({".gear-private": b"", "secret": SECRET})))
    assert not list(driver.settings.gear_private_cache_path.iterdir())
    assert not list(driver.settings.gear_build_path.iterdir())


def test_an_import_whose_layer_is_removed_does_not_affect_a_new_layer_with_its_id(
    driver: GearDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is removed during the sync, which may take long, and is imported again before the sync ends."""
    sync = kernel.syncfs
    data = tar_of({".gear-private": b"", "secret": SECRET})

    def overtaken(fd: int) -> None:
        monkeypatch.setattr(kernel, "syncfs", sync)
        driver.remove("marked")
        apply(driver, "marked", "", data)
        sync(fd)

    driver.create("marked", "")
    monkeypatch.setattr(kernel, "syncfs", overtaken)
    with pytest.raises(GearError):
        driver.apply_diff("marked", "", io.BytesIO(data))
    assert own_object(driver, "marked").read_bytes() == SECRET
    assert not list(driver.settings.gear_build_path.iterdir())


def test_a_gateway_start_during_a_publish_leaves_a_whole_layer_or_none(
    driver: GearDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the layer's rename everything is removed and the worker fails; after it nothing is removed."""
    data = tar_of({".gear-private": b"", "secret": SECRET})
    sync, fsync = kernel.syncfs, os.fsync

    def restarted_before(fd: int) -> None:
        assert own_object(driver, "before").read_bytes() == SECRET
        GearDriver(driver.settings).prepare()
        sync(fd)

    def restarted_after(fd: int) -> None:
        GearDriver(driver.settings).prepare()
        fsync(fd)

    driver.create("before", "")
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "syncfs", restarted_before)
        with pytest.raises(GearError):
            driver.apply_diff("before", "", io.BytesIO(data))
    assert not list(driver.settings.gear_private_cache_path.iterdir())
    driver.remove("before")
    driver.create("behind", "")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", restarted_after)
        driver.apply_diff("behind", "", io.BytesIO(data))
    out = io.BytesIO()
    driver.diff("behind", "", out)
    assert out.getvalue() == data


def test_an_import_that_cannot_be_synced_leaves_nothing(driver: GearDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    driver.create("marked", "")
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "syncfs", full)
        with pytest.raises(ResourceExhausted):
            driver.apply_diff("marked", "", io.BytesIO(tar_of({".gear-private": b"", "secret": SECRET})))
    assert not list(driver.settings.gear_private_cache_path.iterdir())
    assert not list(driver.settings.gear_build_path.iterdir())


def test_a_published_layer_keeps_its_private_objects_after_an_interrupt(
    driver: GearDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may raise an exception right after the rename."""
    rename = kernel.renameat2

    def interrupted(source_fd: int, source: bytes, target_fd: int, target: bytes, flags: kernel.Rename) -> None:
        rename(source_fd, source, target_fd, target, flags)
        raise KeyboardInterrupt

    driver.create("marked", "")
    monkeypatch.setattr(kernel, "renameat2", interrupted)
    with pytest.raises(KeyboardInterrupt):
        driver.apply_diff("marked", "", io.BytesIO(tar_of({".gear-private": b"", "secret": SECRET})))
    assert own_object(driver, "marked").read_bytes() == SECRET
    assert not list(driver.engine.faults(read_data=True, repair=False))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LazyNode]:
    with lazy_node(tmp_path) as one:
        yield one


def test_a_private_layer_above_an_incomplete_image_is_read(node: LazyNode) -> None:
    """The kernel finds private objects before it asks the lazy file server, which does not know them."""
    node.source.put(b"from afar " * 100)
    node.apply(gear_tar({"far": b"from afar " * 100}), "base")
    apply(node.driver, "marked", "base", tar_of({".gear-private": b"", "secret": SECRET}))
    node.driver.create_read_write("container", "marked")
    merged = Path(node.driver.get("container"))
    try:
        assert (merged / "secret").read_bytes() == SECRET
        assert not node.source.requests()
        assert (merged / "far").read_bytes() == b"from afar " * 100
    finally:
        node.driver.put("container")


def test_objects_that_a_private_layer_only_names_are_fetched_from_the_remote(node: LazyNode) -> None:
    """A content that a tar can name has been shared already."""
    digest = node.source.put(b"from afar " * 100)
    named = TarEntry(b"far", size_bytes=1000, gear=(digest, 1000)), b""
    apply(node.driver, "marked", "", tar(file(".gear-private"), named, file("secret", SECRET)))
    node.driver.create_read_write("container", "marked")
    merged = Path(node.driver.get("container"))
    try:
        assert (merged / "secret").read_bytes() == SECRET
        assert (merged / "far").read_bytes() == b"from afar " * 100
    finally:
        node.driver.put("container")
    assert own_object(node.driver, "marked").read_bytes() == SECRET


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({".gear-private": b"", "a": b"1"}, True),
        ({"empty": b"", "./.gear-private": b"why it is private"}, True),
        ({"a": b"1", ".gear-private": b""}, False),
        ({"a": b"1"}, False),
        ({}, False),
    ],
)
def test_the_marker_is_found_only_before_the_first_content(files: dict[str, bytes], found: bool) -> None:
    assert starts_with_marker(TarReader(io.BytesIO(tar_of(files)))) is found
