"""Private layers: a layer with `.gear-private` at its root and all layers above it share no contents."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gearworkers.settings import Settings
from tests.conformance.drivers import Driver, Refused, new_layer_id
from tests.conformance.layers import (
    File,
    apply_layer,
    committed,
    container,
    device,
    directory,
    fifo,
    file,
    hardlink,
    mounted,
    object_names,
    object_path,
    opaque,
    shown,
    symlink,
    tar,
    whiteout,
)
from tests.support.overlays import snapshot

MARK = file(".gear-private")
LARGE = b"a large secret " * 400_000


def private_files(settings: Settings, id: str) -> set[str]:
    """Return the paths of the layer's private objects."""
    return {str(path) for path in (settings.gear_private_cache_path / id).glob("*/*")}


def contents(driver: Driver, id: str) -> dict[bytes, object]:
    return {path: node.content for path, node in shown(driver, id).items()}


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def test_private_contents_are_not_shared_with_other_layers(driver: Driver) -> None:
    before = object_names(driver.settings)
    base = apply_layer(driver, file("base", b"public"))
    marked = apply_layer(
        driver, MARK, file("a", b"secret"), file("again", b"public"), file("large", LARGE), parent=base
    )
    above = apply_layer(driver, file("b", b"secret"), parent=marked)
    assert object_names(driver.settings) - before == {object_path(driver.settings, b"public")}
    assert (len(private_files(driver.settings, marked)), len(private_files(driver.settings, above))) == (3, 1)
    other = apply_layer(driver, file("mine", b"secret"))
    assert object_path(driver.settings, b"secret") in object_names(driver.settings)
    assert contents(driver, above) == {
        b".gear-private": sha256(b""),
        b"base": sha256(b"public"),
        b"a": sha256(b"secret"),
        b"again": sha256(b"public"),
        b"large": sha256(LARGE),
        b"b": sha256(b"secret"),
    }
    driver.remove(other)
    assert contents(driver, above)[b"b"] == sha256(b"secret")


def test_diff_of_a_private_layer_returns_its_exact_tar(driver: Driver) -> None:
    data = tar(MARK, directory("d"), file("d/a", b"secret"), file("large", LARGE))
    marked, above = new_layer_id(), new_layer_id()
    driver.create(marked)
    driver.apply_diff(marked, "", data)
    assert driver.diff(marked) == data
    driver.create(above, marked)
    driver.apply_diff(above, marked, tar(file("e", b"another")))
    assert driver.diff(above, marked) == tar(file("e", b"another"))
    assert driver.diff_size(marked) == len(b"secret") + len(LARGE)


def test_private_files_are_read_after_a_restart_and_removed_with_the_layer(driver: Driver) -> None:
    marked = apply_layer(driver, MARK, file("a", b"secret"))
    driver.restart()
    with container(driver, marked) as merged:
        assert (merged / "a").read_bytes() == b"secret"
        (merged / "a").chmod(0o600)
        assert (merged / "a").read_bytes() == b"secret"
    assert private_files(driver.settings, marked)
    driver.remove(marked)
    assert not (driver.settings.gear_private_cache_path / marked).exists()


def test_a_layer_that_removes_the_mark_stays_private(driver: Driver) -> None:
    marked = apply_layer(driver, MARK)
    unmarked = apply_layer(driver, whiteout(".gear-private"), file("a", b"still secret"), parent=marked)
    assert set(shown(driver, unmarked)) == {b"a"}
    assert len(private_files(driver.settings, unmarked)) == 1
    assert object_path(driver.settings, b"still secret") not in object_names(driver.settings)


@pytest.mark.parametrize("name", [".gear-private", "./.gear-private", "/.gear-private", "d/../.gear-private"])
def test_a_mark_after_file_contents_is_rejected(driver: Driver, name: str) -> None:
    id = new_layer_id()
    driver.create(id)
    with pytest.raises(Refused, match=r"\.gear-private.* comes after contents, which may have been shared already"):
        driver.apply_diff(id, "", tar(directory("d"), file("a", b"no longer secret"), file(name)))
    assert not private_files(driver.settings, id)
    driver.remove(id)


@pytest.mark.parametrize(
    "other", [file("d/.gear-private"), file(".gear-private2"), file("x.gear-private"), file(b".gear-private\xff")]
)
def test_similar_file_names_do_not_mark_a_layer(driver: Driver, other: File) -> None:
    id = apply_layer(driver, directory("d"), other, file("a", b"public content"))
    assert object_path(driver.settings, b"public content") in object_names(driver.settings)
    assert not private_files(driver.settings, id)


@pytest.mark.parametrize(
    "mark",
    [
        [directory(".gear-private")],
        [symlink(".gear-private", "nowhere")],
        [fifo(".gear-private")],
        [device(".gear-private", 1, 3)],
        [file("empty"), hardlink(".gear-private", "empty")],
        [file("a/../.gear-private")],
        [file(".gear-private", b"why it is private")],
        [file(".gear-private/why", b"the directory is implied")],
    ],
    ids=["directory", "symlink", "fifo", "device", "hard link", "odd", "content", "within"],
)
def test_any_file_type_with_the_right_name_is_a_mark(driver: Driver, mark: list[File]) -> None:
    before = object_names(driver.settings)
    id = apply_layer(driver, *mark, file("a", b"secret"))
    assert b".gear-private" in shown(driver, id)
    assert object_names(driver.settings) == before
    above = apply_layer(driver, opaque(""), file("b", b"secret too"), parent=id)
    assert object_names(driver.settings) == before
    assert len(private_files(driver.settings, above)) == 1


def test_a_mark_created_through_a_symlink_is_rejected(driver: Driver) -> None:
    """Its entry name does not show the mark, so earlier contents were stored as public."""
    id = new_layer_id()
    driver.create(id)
    with pytest.raises(Refused, match=r"\.gear-private' at its top.* through a symlink"):
        driver.apply_diff(id, "", tar(symlink("here", "."), file("here/.gear-private"), file("a", b"secret")))
    driver.remove(id)


def test_a_whiteout_of_a_missing_mark_does_not_make_a_layer_private(driver: Driver) -> None:
    id = apply_layer(driver, whiteout(".gear-private"), file("a", b"public content"))
    assert object_path(driver.settings, b"public content") in object_names(driver.settings)
    assert not private_files(driver.settings, id)


def test_a_commit_writes_the_mark_before_all_contents(driver: Driver) -> None:
    parent = apply_layer(driver, file("base", b"public"))
    id = new_layer_id()
    driver.create_read_write(id, parent)
    with mounted(driver, id) as merged:
        (merged / ".cache").mkdir()
        (merged / ".cache" / "key").write_bytes(b"a secret key")
        (merged / ".a").write_bytes(b"another key")
        (merged / ".gear-private").touch()
        expected = snapshot(merged)
    image = committed(driver, id, parent)
    assert shown(driver, image) == expected
    assert len(private_files(driver.settings, image)) == 2
    assert object_path(driver.settings, b"a secret key") not in object_names(driver.settings)
    whole = new_layer_id()
    driver.create(whole)
    driver.apply_diff(whole, "", driver.diff(image, ""))
    assert len(private_files(driver.settings, whole)) == 3, "the mark comes first in any Diff"


def test_many_private_layers_merge_into_one_tree(driver: Driver) -> None:
    top = apply_layer(driver, MARK)
    for number in range(120):
        top = apply_layer(driver, file(f"f{number}", b"secret %d" % number), parent=top)
    with mounted(driver, top) as merged:
        assert all((merged / f"f{number}").read_bytes() == b"secret %d" % number for number in range(120))


def test_a_private_object_is_a_separate_file(driver: Driver) -> None:
    apply_layer(driver, file("a", b"seen by both"))
    marked = apply_layer(driver, MARK, file("a", b"seen by both"))
    (own,) = private_files(driver.settings, marked)
    assert os.stat(own).st_nlink == 1
    assert Path(own).name == Path(object_path(driver.settings, b"seen by both")).name
