"""Automatic upgrade of a store from gearworkers 0.1, whose indexes each number their inodes from 1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gearworkers.cli.doctor import inode_numbers_check
from gearworkers.engine.engine import Engine
from gearworkers.layers.index.erofs import ImageWriter
from gearworkers.layers.index.erofs_format import SLOTS_PER_BLOCK
from gearworkers.layers.index.inode_numbers import InodeNumbers
from gearworkers.layers.index.renumber import has_own_inode_numbers
from gearworkers.settings import Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.drivers import InProcess
from tests.conformance.layers import (
    File,
    apply_layer,
    device,
    directory,
    fifo,
    file,
    hardlink,
    mounted,
    opaque,
    shown,
    symlink,
    whiteout,
    with_xattrs,
)
from tests.faults.crashes import Report, killed_at_every_step

ACL = bytes.fromhex("0200000001000600ffffffff02000400e803000004000400ffffffff10000600ffffffff20000400ffffffff")
FIRST: tuple[File, ...] = (
    directory("d", 0o1777, 3, 4),
    file("d/a1", b"first layer", 0o4755, 5, 6),
    hardlink("d/a2", "d/a1", 0o4755, 5, 6),
    with_xattrs(file("d/acl", b"acl"), **{"user.x": b"y", "system.posix_acl_access": ACL}),
    symlink("d/link", "a1"),
    symlink("long", "x" * 4000),
    device("d/null", 1, 3),
    fifo("d/fifo"),
    file("d/empty"),
    directory("gone"),
    *(file(f"many/file-{number:04d}", b"%d" % number) for number in range(200)),
)
SECOND: tuple[File, ...] = (
    directory("d", 0o1777, 3, 4),
    file("d/b1", b"SECOND LAYER"),
    hardlink("d/b2", "d/b1"),
    whiteout("gone"),
    directory("many"),
    opaque("many"),
)


def write_old(_: InodeNumbers, image: ImageWriter, path: Path) -> None:
    """Write an index as 0.1 did: low inode numbers, no label after the superblock."""
    with open(path, "xb") as file:
        image.write(file, 1000 * SLOTS_PER_BLOCK)
        file.seek(2048)
        file.write(bytes(64))


@contextmanager
def old_program() -> Iterator[None]:
    """Make the code write old indexes and skip their upgrade in this context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InodeNumbers, "write_index", write_old)
        patch.setattr("gearworkers.layers.store.renumber", lambda *_: None)
        yield


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run", node="test")


@pytest.fixture
def layers(settings: Settings) -> list[str]:
    """Return two layers of an old store."""
    with old_program():
        driver = InProcess(settings)
        first = apply_layer(driver, *FIRST)
        second = apply_layer(driver, *SECOND, parent=first)
        with mounted(driver, second) as merged:
            assert numbers(merged / "d/a1", merged / "d/b1") & set(range(200_000)), "the layers share inode numbers"
        driver.cleanup()
    return [first, second]


def numbers(*paths: Path) -> set[int]:
    return {path.stat().st_ino for path in paths}


def have_numbers(settings: Settings, layers: list[str]) -> list[bool]:
    return [has_own_inode_numbers(settings.gear_images_path / id / "index.erofs") for id in layers]


def test_old_layers_keep_their_trees_and_get_new_inode_numbers(settings: Settings, layers: list[str]) -> None:
    with old_program():
        before = [shown(InProcess(settings), id) for id in layers]
    assert have_numbers(settings, layers) == [False, False]
    driver = InProcess(settings)
    assert [shown(driver, id) for id in layers] == before
    assert have_numbers(settings, layers) == [True, True]
    with mounted(driver, layers[1]) as merged:
        assert len(numbers(*(merged / "d").glob("[ab]?"))) == 2
    assert not list(Engine.of(settings).faults(read_data=True, repair=False))


def test_a_running_container_keeps_its_mount_and_doctor_names_it_until_it_ends(
    settings: Settings, layers: list[str]
) -> None:
    with old_program():
        before = InProcess(settings)
        before.create_read_write("running", layers[1])
        merged = Path(before.get("running"))
    with open(merged / "d/a1", "rb") as opened:
        driver = InProcess(settings)
        driver.create_read_write("new", layers[1])
        with mounted(driver, "new") as other:
            assert len(numbers(*(other / "d").glob("[ab]?"))) == 2
        assert opened.read() == (merged / "d/a2").read_bytes() == b"first layer"
    InProcess(settings)  # a second start does not change it
    named = inode_numbers_check(settings)
    assert not named.ok and "layer running" in named.found and "new" not in named.found
    driver.put("running")
    assert inode_numbers_check(settings).ok
    merged = Path(driver.get("running"))
    assert len(numbers(*(merged / "d").glob("[ab]?"))) == 2
    driver.put("running")


def test_an_upgrade_killed_at_any_step_leaves_the_old_or_the_new_index(settings: Settings, layers: list[str]) -> None:
    old = {id: (settings.gear_images_path / id / "index.erofs").read_bytes() for id in layers}
    with old_program():
        wanted = shown(InProcess(settings), layers[1])

    def work(report: Report) -> None:
        driver = GearDriver(settings)
        driver.prepare()
        driver.get(layers[1])
        report(b"mounted")

    states = []
    for outcome in killed_at_every_step(work):
        states.append(have_numbers(settings, layers))
        driver = InProcess(settings)
        assert not list(settings.gear_build_path.iterdir())
        assert shown(driver, layers[1]) == wanted
        assert have_numbers(settings, layers) == [True, True]
        assert not list(Engine.of(settings).faults(read_data=True, repair=False))
        driver.cleanup()
        assert outcome.was_killed or outcome.reported
        for id, image in old.items():
            path = settings.gear_images_path / id / "index.erofs"
            path.unlink()
            path.write_bytes(image)
    assert ([False, False] in states and [True, False] in states) or [False, True] in states


def test_a_damaged_old_index_is_kept_and_reported(settings: Settings, layers: list[str]) -> None:
    path = settings.gear_images_path / layers[0] / "index.erofs"
    os.truncate(path, 4096)
    faults = list(Engine.of(settings).faults(read_data=False, repair=False))
    assert any(layers[0] in fault and "index.erofs" in fault for fault in faults)
