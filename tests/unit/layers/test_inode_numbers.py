"""Inode numbers of indexes: no other layer and no file of the file system has the same number."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from gearworkers.errors import ResourceExhausted
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.index.erofs_format import END_OF_NUMBERS, SLOTS_PER_BLOCK
from gearworkers.layers.index.erofs_label import read_label
from gearworkers.layers.index.inode_numbers import NUMBERS_FILE, InodeNumbers, number_window
from gearworkers.layers.index.mount import mount_index
from gearworkers.layers.index.tree import LayerTree
from gearworkers.mounts.overlay import unmount
from gearworkers.tar.entry import TarEntry

MIN_NUMBER = 1 << 31


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path


def numbers_of(root: Path) -> InodeNumbers:
    return InodeNumbers(root, (root / "build", root / "images"))


def index_of(files: int) -> LayerTree:
    index = LayerTree(IdMaps(), time_ns=0)
    for number in range(files):
        index.add(TarEntry(b"d%d/file%d" % (number % 7, number)), None)
    return index


def written(root: Path, name: str, files: int = 3) -> range:
    """Write the index of a new layer; return its inode numbers."""
    (root / "images" / name).mkdir()
    path = root / "images" / name / "index.erofs"
    numbers_of(root).write_index(index_of(files).image(bytes(16)), path)
    label = read_label(path)
    assert label is not None
    return range(label.first, label.first + label.slots)


def are_disjoint(ranges: list[range]) -> bool:
    ordered = sorted(ranges, key=lambda one: one.start)
    return all(before.stop <= after.start for before, after in itertools.pairwise(ordered))


@contextmanager
def mounted(layer: Path) -> Iterator[Path]:
    (layer / "tree").mkdir(exist_ok=True)
    mount_index(layer / "index.erofs", layer / "tree")
    try:
        yield layer / "tree"
    finally:
        unmount(layer / "tree")


def test_every_file_has_a_number_in_its_layers_range(root: Path) -> None:
    for name in ("a", "b"):
        taken = written(root, name, 2000)
        with mounted(root / "images" / name) as tree:
            found = [path.lstat().st_ino for path in tree.rglob("*")]
        assert len(found) == len(set(found)) == 2007
        assert all(number in taken for number in found)


@pytest.mark.slow
def test_ranges_of_more_than_a_thousand_layers_are_disjoint_and_below_2_to_the_32(root: Path) -> None:
    ranges = [written(root, str(number)) for number in range(1100)]
    assert are_disjoint(ranges)
    assert all(one.start >= MIN_NUMBER and one.stop <= 1 << 32 for one in ranges)


def write_some(root: Path, prefix: str) -> list[range]:
    return [written(root, f"{prefix}-{number}") for number in range(40)]


@pytest.mark.slow
def test_concurrent_processes_write_disjoint_ranges(root: Path) -> None:
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        ranges = [one for done in pool.map(write_some, [root] * 4, "abcd") for one in done]
    assert len(ranges) == 160 and are_disjoint(ranges)


@pytest.mark.parametrize("lost", [b"", b"garbage", b"5 9\n", b"9 5\n"])
def test_ranges_in_use_are_read_from_labels_if_the_record_of_the_gap_is_lost(root: Path, lost: bytes) -> None:
    ranges = [written(root, str(number)) for number in range(3)]
    (root / NUMBERS_FILE).write_bytes(lost)
    assert are_disjoint([*ranges, written(root, "new")])


def test_numbers_of_removed_layers_are_reused_when_the_gap_is_used_up(root: Path) -> None:
    first, second, third = (written(root, name, 5000) for name in ("first", "second", "third"))
    (root / "images/second/index.erofs").unlink()
    room = (third.stop, third.stop + SLOTS_PER_BLOCK)
    (root / NUMBERS_FILE).write_text(f"{room[0]} {room[1]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gearworkers.layers.index.inode_numbers.number_window", lambda _: (first.start, room[1]))
        assert written(root, "fourth", 4000).start == second.start
        with pytest.raises(ResourceExhausted, match=r"needs .* consecutive inode numbers.* remove images"):
            written(root, "fifth", 5000)


def test_a_layer_being_built_keeps_its_numbers(root: Path) -> None:
    (root / "build/x").mkdir(parents=True)
    numbers_of(root).write_index(index_of(9).image(bytes(16)), root / "build/x/index.erofs")
    label = read_label(root / "build/x/index.erofs")
    assert label is not None
    (root / NUMBERS_FILE).unlink()
    assert are_disjoint([range(label.first, label.first + label.slots), written(root, "new")])


@pytest.mark.parametrize(
    ("kind", "make", "min_number"),
    [
        ("ext4", ("mkfs.ext4", "-q", "-F"), MIN_NUMBER),
        ("xfs", ("mkfs.xfs", "-q", "-f"), 1 << 33),
        ("btrfs", ("mkfs.btrfs", "-q"), END_OF_NUMBERS // 2),
    ],
)
def test_the_file_system_uses_none_of_the_numbers(
    tmp_path: Path, kind: str, make: tuple[str, ...], min_number: int
) -> None:
    disk, place = tmp_path / "disk", tmp_path / "place"
    disk.touch()
    os.truncate(disk, 2 << 40 if kind == "xfs" else 1 << 30)
    subprocess.run([*make, str(disk)], check=True, stdout=subprocess.DEVNULL)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", str(disk), str(place)], check=True)
    try:
        start, end = number_window(place)
        assert start == min_number
        highest = 0
        for number in range(600):
            (place / f"d{number}").mkdir()  # XFS spreads directories over the disk
            (place / f"d{number}/file").touch()
            highest = max(highest, (place / f"d{number}/file").stat().st_ino)
        assert highest < start
        (place / "images").mkdir()
        taken = written(place, "layer", 100)
        assert start <= taken.start and taken.stop <= end
        with mounted(place / "images/layer") as tree:
            assert all(path.lstat().st_ino in taken for path in tree.rglob("*"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_layer_of_a_million_files_gets_numbers(root: Path) -> None:
    gc.disable()  # as an import does
    try:
        taken = written(root, "million", 1_000_000)
    finally:
        gc.enable()
    assert taken.stop <= 1 << 32
    with mounted(root / "images/million") as tree:
        seen = {entry.inode() for entry in os.scandir(tree / "d3")}
    assert len(seen) == 142_857 and min(seen) >= taken.start and max(seen) < taken.stop
    stored = (root / "images/million/index.erofs").stat().st_blocks * 512
    assert stored < 160_000_000, "the hole takes no space"
