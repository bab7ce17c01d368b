"""Companions: files that arrive with a missing one, in images without a profile."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.layers.object_list import ObjectList
from gearworkers.lazyfs import client
from gearworkers.profiles import document
from gearworkers.profiles.document import Profile
from gearworkers.profiles.resolve import profile_name
from tests.support.lazynode import LazyNode, lazy_node
from tests.support.processes import wait_until
from tests.unit.lazyfs.test_elf import linked

pytestmark = pytest.mark.slow

MODULES = {f"lib/{name}.py": name.encode() * 400 for name in "abcdefghij"}
SOURCES = {f"lib/{name}.txt": b"text " + name.encode() * 400 for name in "abcdefghij"}
BOTH = dict(sorted((MODULES | SOURCES).items()))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LazyNode]:
    with lazy_node(tmp_path) as one:
        yield one


def stored(node: LazyNode, files: Mapping[str, bytes]) -> set[str]:
    """Return the names of the files whose contents are on the node."""
    store = ObjectStore(node.settings.gear_public_cache_path)
    return {name for name, content in files.items() if store.has(hashlib.sha256(content).digest())}


def wait_for(node: LazyNode, files: Mapping[str, bytes], names: set[str]) -> None:
    """Wait until these files have arrived, and check that no other has."""
    wait_until(lambda: stored(node, files) >= names, "the companions have arrived")
    assert stored(node, files) == names


def run(node: LazyNode) -> Path:
    """Start a container; return its root directory after the server knows that it has no profile."""
    root = node.run("c1")
    wait_until(lambda: node.status().profiles_absent == 1, "the profile is looked for")
    return root


def test_a_miss_brings_neighbours_with_the_same_suffix(node: LazyNode) -> None:
    node.pull(BOTH)
    root = run(node)
    assert (root / "lib/c.py").read_bytes() == MODULES["lib/c.py"]
    wait_for(node, BOTH, set(MODULES))
    assert node.status().on_demand == 1


def test_a_block_of_neighbours_grows_while_the_other_half_was_read(node: LazyNode) -> None:
    bytes_of = random.Random(1).randbytes
    files = {f"lib/{number:02}.py": bytes_of(128 << 10) for number in range(20)}
    files["lib/05a.py"] = bytes_of(200 << 10)
    node.pull(dict(sorted(files.items())))
    root = run(node)
    for read, numbers in ((1, {*range(4)}), (10, {*range(4), *range(8, 12)}), (6, {*range(16)})):
        (root / f"lib/{read:02}.py").read_bytes()
        wait_for(node, files, {f"lib/{number:02}.py" for number in numbers})


def test_a_profile_decides(node: LazyNode) -> None:
    node.pull(BOTH)
    layers = node.driver.engine.layers
    named = document.opened_object(hashlib.sha256(MODULES["lib/a.py"]).digest(), len(MODULES["lib/a.py"]), ())
    path = node.source.root / "documents" / profile_name(layers, "image")
    path.parent.mkdir(parents=True)
    path.write_bytes(document.pack(Profile((named,))))
    root = node.run("c1")
    wait_until(lambda: node.status().profiles_found == 1, "the profile is found")
    (root / "lib/c.py").read_bytes()
    wait_until(lambda: stored(node, BOTH) == {"lib/a.py", "lib/c.py"}, "the files of the profile have arrived")


def test_a_program_brings_its_libraries_and_theirs(node: LazyNode) -> None:
    program = Path("/usr/bin/redis-server")
    libraries = {f"usr/lib/{path.resolve().name}": path.read_bytes() for path in linked(program).values()}
    files = {"usr/bin/redis-server": program.read_bytes(), **libraries, "usr/lib/libother.so.1": b"other" * 100}
    node.pull(files)
    root = run(node)
    with (root / "usr/bin/redis-server").open("rb") as file:
        file.read(4096)
    objects = ObjectList.open(node.settings.gear_images_path / "image/objects")
    assert objects is not None
    small = {name for name, content in libraries.items() if len(content) < 1 << 20}
    assert len(small) > 3
    wait_until(lambda: stored(node, libraries) >= small, "the libraries have arrived")
    assert "usr/lib/libother.so.1" not in stored(node, files)


def test_programs_start_with_companions_as_without(node: LazyNode) -> None:
    """Run a real program in the image: all that it loads arrives through companions or on demand."""
    program = Path("/bin/ls")
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    names = {path.name: path for path in linked(program).values()}
    files = {"bin/ls": program.read_bytes(), "lib64/ld-linux-x86-64.so.2": loader.read_bytes()}
    files |= {f"lib/x86_64-linux-gnu/{name}": path.read_bytes() for name, path in names.items()}
    node.pull(files)
    done = subprocess.run(["chroot", run(node), "/bin/ls", "/"], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["bin", "lib", "lib64"], "")


def test_a_command_brings_its_script_and_the_programs_that_this_names(node: LazyNode) -> None:
    programs = {
        "usr/bin/dash": b"\x7fELF dash" * 100,
        "usr/bin/server": b"\x7fELF server" * 100,
        "usr/bin/other": b"\x7fELF other" * 100,
        "usr/bin/entry.sh": b"#!/bin/sh\n# other\n" + b": " * 200 + b'\nexec "$dir/server" -x\n',
    }
    node.pull(programs, links={"usr/bin/sh": "dash"})
    client.report_image(node.settings.lazyfs_socket, "image", starts=False, command="entry.sh -v")
    wait_for(node, programs, {"usr/bin/dash", "usr/bin/server", "usr/bin/entry.sh"})


def test_a_plugin_brings_the_plugins_around_it_and_startup_files_come_first(node: LazyNode) -> None:
    plugins = {f"usr/lib/app/{name}.so": b"\x7fELF plugin " + name.encode() * 100 for name in "abc"}
    startup = {"etc/ld.so.cache": b"cache" * 100, "etc/passwd": b"root" * 100}
    others = {"usr/lib/app/lib.so.1": b"\x7fELF lib" * 100, "etc/fstab": b"fstab" * 100}
    files = plugins | startup | others
    node.pull(files)
    root = run(node)
    wait_for(node, files, set(startup))
    (root / "usr/lib/app/b.so").read_bytes()
    wait_for(node, files, {*startup, *plugins})
