"""The lazy file server on the real kernel: FUSE, overlays, and a source that misbehaves."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gearworkers.cas.locks import GarbageLock
from gearworkers.cas.store import ObjectStore
from gearworkers.digest import object_path
from gearworkers.fetch.read_ahead import BLOCK_BYTES
from gearworkers.layers.incomplete import mark_incomplete
from gearworkers.layers.pins import Pin, Pins
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import request_prefetch
from tests.support.lazynode import CHUNK_BYTES, LazyNode, gear_tar, lazy_node
from tests.support.processes import wait_until

pytestmark = pytest.mark.slow

LARGE = random.Random(1).randbytes(5 << 20)
SMALL = {f"etc/file{number}": b"content %d" % number * 50 for number in range(30)}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LazyNode]:
    with lazy_node(tmp_path) as one:
        yield one


def lose(node: LazyNode, id: str, digest: bytes) -> None:
    """Remove an object of a layer and mark the layer as incomplete, in the order of `gear fsck --repair`."""
    with GarbageLock(node.settings.gear_root).exclusive():
        assert mark_incomplete(node.settings.gear_images_path, id)
        ObjectStore(node.settings.gear_public_cache_path).remove(digest)


def fetches(node: LazyNode, kind: str) -> list[str]:
    """Return the digests of the source's requests of this kind."""
    return [line.split()[1] for line in node.source.requests() if line.split()[0] == kind]


def test_listing_files_fetches_nothing_and_shows_true_sizes(node: LazyNode) -> None:
    node.pull({**SMALL, "lib/large": LARGE})
    root = node.run("c1")
    sizes = {path.name: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    assert sizes["large"] == len(LARGE)
    subprocess.run(["ls", "-lR", root], check=True, capture_output=True)
    subprocess.run(["find", root, "-size", "+1k"], check=True, capture_output=True)
    subprocess.run(["du", "-a", root], check=True, capture_output=True)
    assert node.source.requests() == []


def test_opened_files_have_the_content_of_the_image(node: LazyNode) -> None:
    node.pull({**SMALL, "lib/large": LARGE})
    root = node.run("c1")
    for name, content in {**SMALL, "lib/large": LARGE}.items():
        assert (root / name).read_bytes() == content


def test_a_root_behind_a_symlink_is_served(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with lazy_node(tmp_path / "link") as node:
        node.pull({**SMALL, "lib/large": LARGE})
        root = node.run("c1")
        node.stop()
        node.start()
        assert (root / "etc/file1").read_bytes() == SMALL["etc/file1"]
        assert (root / "lib/large").read_bytes() == LARGE


def test_an_object_is_fetched_once_for_all_its_readers(node: LazyNode) -> None:
    node.pull({"one": b"one" * 1000, "lib/large": LARGE})
    node.source.set_faults(delay_s=0.02)
    roots = [node.run(f"c{number}") for number in range(20)]
    with ThreadPoolExecutor(40) as readers:
        ones = list(readers.map(lambda root: (root / "one").read_bytes(), roots))
        larges = list(readers.map(lambda root: hashlib.sha256((root / "lib/large").read_bytes()).digest(), roots))
    assert set(ones) == {b"one" * 1000}
    assert set(larges) == {hashlib.sha256(LARGE).digest()}
    assert len(fetches(node, "fetch")) == 1
    chunks = fetches(node, "chunk")
    assert len(chunks) == len(set(chunks)) == len(LARGE) >> 16


def test_the_first_page_of_a_large_file_does_not_wait_for_the_last(node: LazyNode) -> None:
    node.pull({"large": LARGE})
    node.source.set_faults(delay_s=1.0)
    root = node.run("c1")
    fd = os.open(root / "large", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        assert os.pread(fd, 4096, 3 << 20) == LARGE[3 << 20 : (3 << 20) + 4096]
        requested = fetches(node, "chunk")  # the block around it, and maybe a part of the rest, which fills idle time
        block = requested[: BLOCK_BYTES // CHUNK_BYTES + 1]
        assert hashlib.sha256(LARGE[3 << 20 : (3 << 20) + CHUNK_BYTES]).hexdigest() in block
        assert len(requested) < len(LARGE) // CHUNK_BYTES
    finally:
        os.close(fd)
        node.source.set_faults()
    wait_until(lambda: node.status().fetched_objects == 1, "the rest has arrived")
    assert len(fetches(node, "chunk")) == len(LARGE) >> 16


def test_large_files_are_read_at_random_mapped_and_executed(node: LazyNode) -> None:
    program = Path("/bin/bash").resolve().read_bytes()
    assert len(program) > 1 << 20
    node.pull({"large": LARGE, "bin/program": program})
    root = node.run("c1")
    output = subprocess.run([root / "bin/program", "-c", "echo executed"], capture_output=True, check=True).stdout
    assert output == b"executed\n"
    with open(root / "large", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        chooser = random.Random(2)
        for _ in range(200):
            at = chooser.randrange(len(LARGE))
            assert mapped[at : at + 5000] == LARGE[at : at + 5000]
        for _ in range(200):
            at = chooser.randrange(len(LARGE))
            assert os.pread(file.fileno(), 70000, at) == LARGE[at : at + 70000]


def test_a_complete_layer_is_mounted_without_the_trap(node: LazyNode) -> None:
    node.pull(SMALL)
    root = node.run("c1")
    for name in SMALL:
        (root / name).read_bytes()
    layer = node.settings.gear_images_path / "image" / "layer.json"
    wait_until(lambda: b'"complete":false' not in layer.read_bytes(), "the layer is marked complete")
    node.stop()
    second = node.run("c2")
    assert {name: (second / name).read_bytes() for name in SMALL} == SMALL
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    assert str(node.settings.gear_arrivals_path) in next(line for line in mounts if "containers/c1/" in line)
    assert str(node.settings.gear_arrivals_path) not in next(line for line in mounts if "containers/c2/" in line)


def test_a_prefetched_layer_is_fetched_by_batch_requests(node: LazyNode) -> None:
    node.pull({**SMALL, "lib/large": LARGE})
    assert request_prefetch(node.settings.lazyfs_socket, ["image"]) == len(SMALL) + 1
    wait_until(lambda: node.status().incomplete_layers == 0, "all objects have arrived")
    assert len(fetches(node, "many")) == len(SMALL)
    assert fetches(node, "fetch") == []


def test_reading_an_object_that_no_source_has_fails_and_the_status_names_it(node: LazyNode) -> None:
    content = b"in no source"
    node.apply(gear_tar({"file": content}), "image")
    root = node.run("c1")
    with pytest.raises(OSError) as caught:
        (root / "file").read_bytes()
    assert caught.value.errno == errno.EIO
    assert list(node.status().failures) == [hashlib.sha256(content).hexdigest()]
    node.source.put(content)
    assert (root / "file").read_bytes() == content
    assert node.status().failures == {}


def test_an_unreachable_remote_is_used_again_when_it_is_reachable(node: LazyNode) -> None:
    node.pull({**SMALL, "lib/large": LARGE})
    root = node.run("c1")
    node.source.set_faults(unreachable=True)
    for name in ("etc/file1", "lib/large"):
        with pytest.raises(OSError) as caught:
            (root / name).read_bytes()
        assert caught.value.errno == errno.EIO
    node.source.set_faults()
    assert (root / "etc/file1").read_bytes() == SMALL["etc/file1"]
    assert (root / "lib/large").read_bytes() == LARGE


def test_wrong_bytes_are_neither_read_nor_stored(node: LazyNode) -> None:
    node.pull({**SMALL, "lib/large": LARGE})
    root = node.run("c1")
    small = hashlib.sha256(SMALL["etc/file1"]).digest()
    node.source.corrupt(small)
    node.source.corrupt(hashlib.sha256(LARGE[3 << 20 : (3 << 20) + (64 << 10)]).digest())
    with pytest.raises(OSError, match="Input/output"):
        (root / "etc/file1").read_bytes()
    with open(root / "lib/large", "rb") as file:
        assert file.read(4096) == LARGE[:4096]
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), 4096, 3 << 20)
    assert not Path(os.fsdecode(os.fsencode(node.settings.gear_public_cache_path) + object_path(small))).exists()
    assert node.status().corrupt >= 2


def test_another_source_is_asked_when_one_returns_wrong_bytes(tmp_path: Path) -> None:
    with lazy_node(tmp_path, sources=2) as node:
        node.pull({**SMALL, "lib/large": LARGE})
        for content in (*SMALL.values(), LARGE):
            node.sources[1].put(content)
        for content in (SMALL["etc/file1"], LARGE[: 64 << 10]):
            node.source.corrupt(hashlib.sha256(content).digest())
        root = node.run("c1")
        assert (root / "etc/file1").read_bytes() == SMALL["etc/file1"]
        assert (root / "lib/large").read_bytes() == LARGE
        assert node.status().corrupt == 2


def test_an_object_is_fetched_whole_after_its_layout_yielded_other_bytes(node: LazyNode) -> None:
    node.pull({"large": LARGE})
    digest = hashlib.sha256(LARGE).digest()
    other = LARGE[:-1] + bytes([LARGE[-1] ^ 1])
    layout = node.source.root / f"{node.source.put(other).hex()}.layout"
    (node.source.root / f"{digest.hex()}.layout").write_bytes(layout.read_bytes())
    (node.source.root / digest.hex()).write_bytes(LARGE)
    root = node.run("c1")
    with open(root / "large", "rb") as file:
        assert file.read(4096) == LARGE[:4096]
        wait_until(lambda: node.status().corrupt == 1, "the file was verified")
        wait_until(lambda: (root / "large").read_bytes() == LARGE, "the right bytes are read")


def test_copy_file_range_of_a_large_file_fails_with_exdev_until_the_file_has_arrived(node: LazyNode) -> None:
    node.pull({"lib/large": LARGE, "etc/small": b"small" * 100})
    root = node.run("c1")
    with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
        copy_in_kernel(root / "lib/large", root / "copy")
    for command in (["cp", "lib/large", "copied"], ["install", "lib/large", "installed"]):
        subprocess.run(command, cwd=root, check=True)
        assert (root / command[-1]).read_bytes() == LARGE
    with open(root / "lib/large", "rb") as source, open(root / "sent", "wb") as target:
        assert sum(iter(lambda: os.sendfile(target.fileno(), source.fileno(), None, len(LARGE)), 0)) == len(LARGE)
    assert (root / "sent").read_bytes() == LARGE
    copy_in_kernel(root / "etc/small", root / "copy")
    wait_until(lambda: node.status().incomplete_layers == 0, "all objects have arrived")
    node.driver.put("c1")
    root = Path(node.driver.get("c1"))
    copy_in_kernel(root / "lib/large", root / "copy")
    assert (root / "copy").read_bytes() == LARGE


def copy_in_kernel(source: Path, target: Path) -> None:
    """Copy with copy_file_range only."""
    with open(source, "rb") as file, open(target, "wb") as out:
        while os.copy_file_range(file.fileno(), out.fileno(), 1 << 30):
            pass


def test_a_removed_large_object_is_fetched_again_while_an_image_refers_to_it(node: LazyNode) -> None:
    node.pull({"lib/large": LARGE})
    root, store = node.run("c1"), ObjectStore(node.settings.gear_public_cache_path)
    digest = hashlib.sha256(LARGE).digest()
    node.pull({"other": b"keeps the image incomplete"}, "other")
    with open(root / "lib/large", "rb") as file:
        assert file.read() == LARGE
        wait_until(lambda: store.has(digest), "it is whole")
    lose(node, "image", digest)
    assert (node.run("c2") / "lib/large").read_bytes() == LARGE
    wait_until(lambda: store.has(digest), "it was fetched again")


def test_a_large_object_of_a_removed_image_takes_no_space(node: LazyNode) -> None:
    node.pull({"lib/large": LARGE, "other": b"keeps the image incomplete"})
    root, store = node.run("c1"), ObjectStore(node.settings.gear_public_cache_path)
    assert (root / "lib/large").read_bytes() == LARGE
    wait_until(lambda: store.has(hashlib.sha256(LARGE).digest()), "it is whole")
    assert (root / "lib/large").read_bytes() == LARGE
    for id in ("c1", "image"):
        node.driver.remove(id)
    node.driver.engine.collect_garbage()
    assert not store.has(hashlib.sha256(LARGE).digest())
    wait_until(lambda: node.status().serving == 0, "the kernel has forgotten it")


def test_a_large_object_whose_image_is_removed_while_it_arrives_is_not_stored(node: LazyNode) -> None:
    node.pull({"lib/large": LARGE})
    node.source.set_faults(delay_s=0.5)
    root, name = node.run("c1"), hashlib.sha256(LARGE).hexdigest()
    with open(root / "lib/large", "rb") as file:
        assert file.read(4096) == LARGE[:4096]
    wait_until(lambda: len(fetches(node, "chunk")) > 8, "the rest is being fetched")
    for id in ("c1", "image"):
        node.driver.remove(id)
    node.driver.engine.collect_garbage()
    node.source.set_faults()
    wait_until(lambda: not (node.settings.gear_fetching_path / name).exists(), "the partial file is removed")
    wait_until(lambda: node.status().serving == 0, "the kernel has forgotten it")
    assert not ObjectStore(node.settings.gear_public_cache_path).has(bytes.fromhex(name))
    assert node.status().arriving == 0


def test_pinned_objects_that_arrive_after_their_image_was_removed_are_stored(node: LazyNode) -> None:
    content = b"small" * 1000
    node.pull({"lib/large": LARGE, "etc/small": content})
    node.source.set_faults(delay_s=1)
    store = ObjectStore(node.settings.gear_public_cache_path)
    Pins(node.settings, LayerStore(node.settings, store), store).add(Pin("app", "sha256:" + "ab" * 32), "image")
    wait_until(lambda: bool(node.source.requests()), "objects are requested")
    node.driver.remove("image")
    node.source.set_faults()
    wait_until(
        lambda: all(store.has(hashlib.sha256(one).digest()) for one in (LARGE, content)), "all objects have arrived"
    )


def kill_reader(path: Path, is_fetched: Callable[[], bool]) -> None:
    """Start a reader of the file, and kill it while the file is being fetched."""
    reader = subprocess.Popen(["cat", path])
    wait_until(is_fetched, "it is being fetched")
    reader.kill()
    reader.wait(60)


def test_a_killed_reader_does_not_wait_for_its_object(node: LazyNode) -> None:
    node.pull(SMALL)
    node.source.set_faults(delay_s=120)
    root = node.run("c1")
    kill_reader(root / "etc/file1", lambda: len(fetches(node, "fetch")) == 1)
    node.source.set_faults()


def test_a_large_file_is_not_held_open_for_a_killed_reader(node: LazyNode) -> None:
    node.pull({"lib/large": LARGE})
    node.source.set_faults(delay_s=2.0)
    root = node.run("c1")
    kill_reader(root / "lib/large", lambda: len(fetches(node, "layout")) == 1)
    wait_until(lambda: node.status().arriving == 1, "the layout is here")
    wait_until(lambda: node.status().serving == 0, "the file is closed")


def test_names_that_are_not_objects_do_not_exist(node: LazyNode) -> None:
    lazy = node.settings.lazy_mount_path
    for name in (b"a", b"\x01!", b"\x01a/short", b"\x01a/" + b"!" * 20, b"\x01a/" + b"b" * 20, b"\x01a/" + b"b" * 21):
        for tree in (b"fetch", b"failed", b""):
            assert not os.path.exists(os.path.join(os.fsencode(lazy), tree, name))
    assert os.listdir(lazy) == []
    assert node.source.requests() == []
