"""Images: import, save and load, push and pull, removal."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from gearworkers.images import manifest as m
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import RegistrySettings
from tests.support import rootfs
from tests.support.disk import tree_bytes
from tests.support.dockerd import Dockerd
from tests.support.images import Image
from tests.support.processes import wait_until
from tests.support.registry import Registry
from tests.support.stack import Stack
from tests.support.tiny import tar_of, tiny_tar

Member = tuple[bytes, int, int, int, int, str, str, str]


def members(path: Path) -> dict[str, Member]:
    """Return type, mode, owner, mtime, link and content of each file in a tar, without the times of directories."""
    with tarfile.open(path) as tar:
        return {info.name.removeprefix("./").rstrip("/"): _member(tar, info) for info in tar}


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    mtime_s = 0 if info.isdir() else int(info.mtime)
    content = ""
    if info.isreg() or info.islnk():
        file = tar.extractfile(info)
        assert file is not None
        content = hashlib.sha256(file.read()).hexdigest()
    kind = tarfile.REGTYPE if info.islnk() else info.type
    link = "" if info.islnk() else info.linkname
    device = f"{info.devmajor}:{info.devminor}"
    return kind, info.mode & 0o7777, info.uid, info.gid, mtime_s, link, device, content


def test_a_container_contains_exactly_the_imported_files(dockerd: Dockerd, tmp_path: Path) -> None:
    container = dockerd.docker("create", "debian", "true")
    dockerd.docker("export", "-o", str(tmp_path / "export.tar"), container)
    expected, found = members(rootfs.debian()), members(tmp_path / "export.tar")
    made_by_docker = {".dockerenv", "etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/mtab", "", "."}
    made_by_docker |= {"dev", "proc", "sys"} | {name for name in found if name.startswith("dev/")}
    common = set(expected) - made_by_docker
    assert len(common) > 5000
    assert set(found) - made_by_docker == common
    assert {name: found[name] for name in common} == {name: expected[name] for name in common}


def test_an_image_is_unchanged_after_save_and_load(dockerd: Dockerd, tmp_path: Path) -> None:
    dockerd.docker("build", "-t", "layered", "-", stdin=b"FROM debian\nRUN echo a > /a\nRUN rm -r /usr/share/doc\n")
    image_id = dockerd.docker("image", "inspect", "-f", "{{.Id}}", "layered")
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    dockerd.docker("save", "-o", str(first), "layered")
    dockerd.docker("rmi", "layered")
    assert dockerd.call("image", "inspect", image_id).returncode != 0
    dockerd.docker("load", "-i", str(first))
    assert dockerd.docker("image", "inspect", "-f", "{{.Id}}", "layered") == image_id
    dockerd.docker("save", "-o", str(second), "layered")
    assert saved_layers(first) == saved_layers(second)
    assert dockerd.run("layered", "sh", "-c", "cat /a; ls -d /usr/share/doc || true") == "a"
    dockerd.docker("rmi", "layered")


def saved_layers(path: Path) -> list[str]:
    """Return the SHA-256 of each layer's tar in an archive of `docker save`; check it against the image's config."""
    with tarfile.open(path) as tar:

        def read(name: str) -> bytes:
            file = tar.extractfile(name)
            assert file is not None
            return file.read()

        manifest = json.loads(read("manifest.json"))[0]
        digests = ["sha256:" + hashlib.sha256(read(layer)).hexdigest() for layer in manifest["Layers"]]
        assert json.loads(read(manifest["Config"]))["rootfs"]["diff_ids"] == digests
        return digests


def test_a_pushed_image_is_pulled_again_with_the_same_digest(dockerd: Dockerd, registry: Registry) -> None:
    name = f"{registry.host}/pushed:1"
    dockerd.docker("build", "-t", name, "-", stdin=b"FROM debian\nRUN echo pushed > /b\n")
    image_id = dockerd.docker("image", "inspect", "-f", "{{.Id}}", name)
    dockerd.docker("push", name)
    digest = dockerd.docker("image", "inspect", "-f", "{{index .RepoDigests 0}}", name)
    dockerd.docker("rmi", name)
    dockerd.docker("pull", digest)
    assert dockerd.docker("image", "inspect", "-f", "{{.Id}}", digest) == image_id
    assert dockerd.run(digest, "cat", "/b") == "pushed"
    dockerd.docker("rmi", digest)


def test_an_image_with_a_single_layer_is_pulled(dockerd: Dockerd, registry: Registry) -> None:
    name = f"{registry.host}/alone:1"
    dockerd.docker("import", "-", name, stdin=tar_of({"only": b"here"}))
    dockerd.docker("push", name)
    dockerd.docker("rmi", name)
    dockerd.docker("pull", name)
    container = dockerd.docker("create", name, "none")
    assert dockerd.call("cp", f"{container}:/only", "-").stdout.count(b"here") == 1
    dockerd.docker("rm", container)
    dockerd.docker("rmi", name)


EMPTY_LAYERS = {"no bytes": b"", "one zero block": bytes(512), "twenty zero blocks": bytes(10240)}
"""Empty tars, which Docker's own drivers accept as empty layers."""


@pytest.mark.parametrize("compression", ["", "gzip"])
def test_empty_layers_are_loaded_saved_and_pulled_unchanged(
    dockerd: Dockerd, registry: Registry, tmp_path: Path, compression: str
) -> None:
    image = Image((tiny_tar(), *EMPTY_LAYERS.values(), tar_of({"after": b"it"})), compression)
    name, loaded = f"{registry.host}/nothing:1", tmp_path / "loaded.tar"
    dockerd.docker("load", stdin=image.saved(name))
    assert dockerd.run(name, "cat", "/after") == "it"
    dockerd.docker("save", "-o", str(loaded), name)
    assert saved_layers(loaded) == [m.digest_of(tar) for tar in image.tars]
    dockerd.docker("rmi", name)
    image.push(Repository.of(RegistrySettings(), Reference.parse(name)), "1")
    dockerd.docker("pull", name)
    assert dockerd.run(name, "cat", "/after") == "it"
    dockerd.docker("rmi", name)


def test_a_tar_that_ends_early_leaves_no_image(dockerd: Dockerd) -> None:
    whole = tiny_tar()
    done = dockerd.call("import", "-", "short", stdin=whole[: len(whole) // 2])
    assert done.returncode != 0
    assert dockerd.call("image", "inspect", "short").returncode != 0
    assert dockerd.run("tiny", "echo", "still here") == "still here"


def test_pruning_removes_unused_images_and_keeps_the_rest(dockerd: Dockerd) -> None:
    dockerd.docker("build", "-t", "pruned", "-", stdin=b"FROM tiny\nRUN echo 1 > /one\nRUN echo 2 > /two\n")
    image_id = dockerd.docker("image", "inspect", "-f", "{{.Id}}", "pruned")
    dockerd.run("pruned", "true", options=())
    dockerd.docker("rmi", "-f", "pruned")
    dockerd.docker("system", "prune", "-f")
    assert dockerd.call("image", "inspect", image_id).returncode != 0
    assert dockerd.docker("ps", "-aq") == ""
    assert dockerd.run("tiny", "echo", "kept") == "kept"
    assert dockerd.run("debian", "cat", "/etc/hostname") is not None


def test_a_second_image_adds_only_the_differences(dockerd: Dockerd, stack: Stack) -> None:
    before = tree_bytes(stack.root)
    dockerd.docker("import", "-", "variant", stdin=rootfs.debian_variant())
    added = tree_bytes(stack.root) - before
    assert added < before * 0.25
    assert dockerd.run("variant", "sh", "-c", "cat /etc/debian_version") != ""
    dockerd.docker("rmi", "variant")


def test_contents_of_a_removed_image_are_collected_within_a_minute(dockerd: Dockerd, stack: Stack) -> None:
    dockerd.docker("import", "-", "removed", stdin=tar_of({"big": b"only in this image " * 500_000}))
    before = tree_bytes(stack.root / "public")
    dockerd.docker("rmi", "removed")
    wait_until(lambda: tree_bytes(stack.root / "public") < before - 9_000_000, "the contents are collected", 60)
    assert dockerd.run("tiny", "echo", "kept") == "kept"


def test_gear_gc_removes_the_contents_of_a_removed_image_at_once(dockerd: Dockerd, stack: Stack) -> None:
    dockerd.docker("import", "-", "removed", stdin=tar_of({"big": b"for gear gc " * 500_000}))
    before = tree_bytes(stack.root / "public")
    dockerd.docker("rmi", "removed")
    done = subprocess.run(["gear", "gc"], env=stack.environ(), capture_output=True, text=True)
    assert (done.returncode, done.stdout[:7]) == (0, "removed"), done.stderr
    assert tree_bytes(stack.root / "public") < before - 5_000_000
    assert dockerd.run("tiny", "echo", "kept") == "kept"
