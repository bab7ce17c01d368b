"""Gear images on a host without their files: listing, fetching, building, saving and removing."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gearworkers.lazyfs.client import request_prefetch
from tests.support import rootfs
from tests.support.dockerd import Dockerd
from tests.support.lazyhost import FILES, LARGE, LazyHost
from tests.support.processes import wait_until

AT_ONCE = 20
REPLACED = {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}


def test_listing_files_shows_their_real_sizes_and_fetches_nothing(host: LazyHost) -> None:
    """The first listing fetches the programs themselves; the second must fetch nothing."""
    container = host.start()
    listing = (
        "stat -c '%n %s' /app/*; ls -lR / > /dev/null; du -s --apparent-size -k /app /usr/share; find / -xdev -size +1M"
    )
    first = host.dockerd.docker("exec", container, "sh", "-c", listing)
    fetched = host.stack.lazy_status().fetched_objects
    again = host.dockerd.docker("exec", container, "sh", "-c", listing)
    assert again == first
    assert host.stack.lazy_status().fetched_objects == fetched < 80
    sizes = dict(line.split() for line in first.splitlines()[: len(FILES)])
    assert {f"/{name}": str(len(content)) for name, content in FILES.items()}.items() <= sizes.items()


def test_images_and_history_show_the_real_sizes(host: LazyHost) -> None:
    with tarfile.open(rootfs.debian()) as tar:
        base_bytes = sum(info.size for info in tar if info.isreg())
    app_bytes = sum(map(len, FILES.values()))
    shown = json.loads(host.dockerd.docker("image", "inspect", host.image))[0]["Size"]
    assert abs(shown - base_bytes - app_bytes) < 0.02 * base_bytes  # overlay2 counts symlinks too
    history = host.dockerd.docker("history", "--human=false", "--format", "{{.Size}}", host.image).splitlines()
    assert [int(size) for size in history[:2]] == [app_bytes, 0]
    assert abs(int(history[2]) - base_bytes) < 0.02 * base_bytes


def test_twenty_containers_on_an_empty_host_fetch_each_object_once(host: LazyHost) -> None:
    before, inline, inline_bytes = host.stack.lazy_status(), host.object_count(), host.object_bytes()
    script = "cat /app/small* | sha256sum; sha256sum /app/large0"
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outputs = set(pool.map(lambda _: host.dockerd.run(host.image, "sh", "-c", script), range(AT_ONCE)))
    assert len(outputs) == 1
    assert hashlib.sha256(LARGE["app/large0"]).hexdigest() in outputs.pop()
    wait_until(lambda: host.stack.lazy_status().arriving == 0, "all files have arrived", 60.0)
    after = host.stack.lazy_status()
    assert after.fetched_objects - before.fetched_objects == host.object_count() - inline
    assert after.received_bytes - before.received_bytes == host.object_bytes() - inline_bytes
    assert after.failures == {}


def test_a_saved_gear_image_equals_the_pulled_one_byte_for_byte(host: LazyHost, tmp_path: Path) -> None:
    fetched = host.stack.lazy_status().fetched_objects
    host.dockerd.docker("save", "-o", str(tmp_path / "saved.tar"), host.image)
    with tarfile.open(tmp_path / "saved.tar") as tar:
        manifest = json.loads(_read(tar, "manifest.json"))[0]
        assert [_read(tar, layer) for layer in manifest["Layers"]] == host.tars
    assert host.stack.lazy_status().fetched_objects == fetched
    image_id = host.dockerd.docker("image", "inspect", "-f", "{{.Id}}", host.image)
    host.dockerd.docker("rmi", host.image)
    host.dockerd.docker("load", "-i", str(tmp_path / "saved.tar"))
    assert host.dockerd.docker("image", "inspect", "-f", "{{.Id}}", host.image) == image_id
    assert host.dockerd.run(host.image, "cat", "/app/small.1") == FILES["app/small.1"].decode().strip()


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None
    return file.read()


def test_commit_and_build_on_a_gear_image_make_ordinary_layers(host: LazyHost) -> None:
    dockerd = host.dockerd
    change = "(echo; echo more) >> /app/small.1; rm /app/small.2; chmod 600 /app/small.3; mv /app/small.4 /app/moved"
    dockerd.run(host.image, "sh", "-c", change, options=("--name", "changed"))
    dockerd.docker("commit", "changed", "committed")
    dockerfile = f"FROM {host.image}\nRUN echo built > /app/built && chown 7:8 /app/large1\nRUN rm /app/small.5\n"
    dockerd.docker("build", "-t", "built", "--network", "none", "-", stdin=dockerfile.encode())
    for image, added in (
        ("committed", {"app/small.1", "app/.wh.small.2"}),
        ("built", {"app/built", "app/.wh.small.5"}),
    ):
        tops = _layers_above(dockerd, image, len(host.tars))
        assert added <= set().union(*tops)
        assert all("GEAR.sha256" not in info.pax_headers for top in tops for info in top.values())
    sizes = {info.name: info.size for top in _layers_above(dockerd, "built", 2) for info in top.values()}
    assert sizes["app/large1"] == len(LARGE["app/large1"])  # the changed owner puts the whole file into the tar
    check = "tail -n1 /app/small.1; ls /app/small.2 2>/dev/null; stat -c %a /app/small.3; sha256sum < /app/moved"
    words = dockerd.run("committed", "sh", "-c", check).split()
    assert words[:2] == ["more", "600"]
    assert words[2] == hashlib.sha256(FILES["app/small.4"]).hexdigest()
    shown = dockerd.run(
        "built", "sh", "-c", "stat -c %u:%g /app/large1; sha256sum < /app/large1; ls /app/small.5 || true"
    )
    assert shown.split()[:2] == ["7:8", hashlib.sha256(LARGE["app/large1"]).hexdigest()]
    dockerd.docker("rm", "changed")


def _layers_above(dockerd: Dockerd, image: str, below: int) -> list[dict[str, tarfile.TarInfo]]:
    saved = dockerd.call("save", image).stdout
    with tarfile.open(fileobj=io.BytesIO(saved)) as tar:
        layers = json.loads(_read(tar, "manifest.json"))[0]["Layers"][below:]
        found = []
        for layer in layers:
            with tarfile.open(fileobj=io.BytesIO(_read(tar, layer))) as inner:
                found.append({info.name.removeprefix("./"): info for info in inner})
        return found


def test_all_files_match_the_image_and_complete_layers_do_not_use_the_lazy_file_system(
    host: LazyHost,
) -> None:
    """The image is a real root file system, and a prefetch runs while the container reads all files."""
    lazy = host.start()
    assert "/lazy/fetch" in _mounts(host)
    layers = [path.name for path in (host.stack.root / "images").iterdir()]
    request_prefetch(host.stack.lazyfs_socket, layers)
    expected = _debian_files()
    sums = host.dockerd.docker("exec", lazy, "sh", "-c", "find / -xdev -type f -exec sha256sum {} +")
    found = {path: digest for digest, _, path in (line.partition("  ") for line in sums.splitlines())}
    assert {name: found.get(name) for name in expected} == expected
    assert host.stack.lazy_status().failures == {}
    wait_until(lambda: host.stack.lazy_status().incomplete_layers == 0, "both layers are complete", 120.0)
    host.dockerd.docker("rm", "-f", lazy)
    complete = host.start()
    assert "/lazy/fetch" not in _mounts(host)
    host.stack.stop("lazyfs")
    assert host.dockerd.docker("exec", complete, "cat", "/app/small.7") == FILES["app/small.7"].decode().strip()
    assert host.dockerd.run(host.image, "sha256sum", "/app/large2").split()[0] == _digest("app/large2")
    host.stack.start("lazyfs")


def _debian_files() -> dict[str, str]:
    """Return SHA-256 by path, without the files that Docker replaces in a container."""
    expected = {}
    with tarfile.open(rootfs.debian()) as tar:
        for info in tar:
            if info.isreg():
                expected[info.name.removeprefix(".")] = hashlib.sha256(_read(tar, info.name)).hexdigest()
    assert len(expected) > 5000
    return {name: digest for name, digest in expected.items() if name not in REPLACED}


def _digest(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()


def _mounts(host: LazyHost) -> str:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return "\n".join(line for line in lines if str(host.stack.root / "containers") in line)


def test_removing_an_incomplete_image_leaves_no_object(host: LazyHost) -> None:
    container = host.start()
    host.dockerd.docker("exec", container, "sh", "-c", "cat /app/small* /app/large0 > /dev/null")
    assert host.object_count() > 40
    assert any((host.stack.root / "arrivals").glob("*/*"))
    host.dockerd.docker("rm", "-f", container)
    host.dockerd.docker("rmi", host.image)
    wait_until(lambda: host.object_count() == 0, "the objects are collected", 60.0, lambda: str(host.object_count()))
    wait_until(lambda: not any((host.stack.root / "arrivals").glob("*/*")), "arrivals is empty", 60.0)
    assert host.stack.lazy_status().incomplete_layers == 0
    assert not any((host.stack.root / "images").iterdir())
