"""dockerd's options --storage-opt and --userns-remap, and the output of `docker info`."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import sandbox
from tests.support.disk import QUOTA_OPTIONS, mount_small
from tests.support.dockerd import NO_NETWORK, Dockerd
from tests.support.processes import NotReady, wait_until
from tests.support.stack import Stack
from tests.support.tiny import tiny_tar

REMAPPED = 231_000
"""Host id of the containers' root user."""


@pytest.fixture(scope="module")
def own(disk: Path) -> Iterator[Stack]:
    """Run a second stack, since an option applies to all users of a plugin; its workers use database 1 of Redis."""
    own = Stack(disk / "own", "gear3")
    own.start("redis", "gateway")
    own.settings["GEAR_BROKER_URL"] = other_broker(own)
    for name in ("import", "push"):
        own.daemons[name].environ = own.environ()
    own.start("import", "push")
    yield own
    own.stop()


def other_broker(stack: Stack) -> str:
    """Return the URL of a Redis database other than the one that the gateway starts with."""
    return f"redis+socket://{stack.redis_socket}?virtual_host=1"


def info(dockerd: Dockerd) -> dict[str, str]:
    """Return the driver's status in `docker info`."""
    return dict(json.loads(dockerd.docker("info", "-f", "{{json .DriverStatus}}")))


def is_imported_by_worker(dockerd: Dockerd) -> bool:
    """Import an image; return whether a worker did it. On a busy machine the gateway may do it instead."""
    dockerd.docker("import", "-", "taken", stdin=tiny_tar())
    return info(dockerd)["Degraded"] == "no"


def test_docker_info_shows_root_kernel_mode_and_counters(dockerd: Dockerd, stack: Stack) -> None:
    wait_until(lambda: is_imported_by_worker(dockerd), "a worker takes an import")
    dockerd.docker("rmi", "taken")
    shown = info(dockerd)
    assert shown["Root Dir"] == str(stack.root)
    assert (shown["Backing Filesystem"], shown["Degraded"]) == ("extfs", "no")
    assert "data-only" in shown["Kernel Mode"]
    assert int(shown["Objects"]) > 5000
    assert min(int(shown["Logical Bytes"]), int(shown["Stored Bytes"])) > 100_000_000
    assert {"Layers", "Queue", "At Work", "Awaiting Push"} <= set(shown)


def test_dockerd_rejects_an_unknown_option_and_names_the_known_ones(own: Stack, disk: Path) -> None:
    dockerd = Dockerd("d3", disk / "unknown", "gear3", ("--storage-opt", "gear.size=1G"))
    with pytest.raises(NotReady, match=r"gear\.size=1G.*expected gear\.root=…, gear\.broker=…"):
        dockerd.start()


def test_options_set_root_and_broker(own: Stack, disk: Path) -> None:
    options = ("--storage-opt", f"gear.root={disk}/elsewhere", "--storage-opt", f"gear.broker={other_broker(own)}")
    dockerd = Dockerd("d3", disk / "options", "gear3", options)
    dockerd.start()
    try:
        wait_until(lambda: is_imported_by_worker(dockerd), "a worker takes an import")
        assert dockerd.run("taken", "echo", "works") == "works"
        assert info(dockerd)["Root Dir"] == f"{disk}/elsewhere"
        assert len(list((disk / "elsewhere" / "images").iterdir())) == 1
        assert not list(own.root.glob("images/*"))
    finally:
        dockerd.stop()


def test_an_unenforceable_size_and_an_unknown_option_are_rejected(dockerd: Dockerd, stack: Stack) -> None:
    for option, reason in (("size=1M", "extfs without project quotas"), ("nope=1", "unknown option nope")):
        done = dockerd.call("create", "--storage-opt", option, "tiny", "true")
        assert done.returncode and reason in done.stderr.decode()
    assert not dockerd.docker("ps", "-aq")


@pytest.mark.parametrize("fs", sorted(QUOTA_OPTIONS))
def test_a_container_cannot_write_more_than_its_size(own: Stack, disk: Path, tmp_path: Path, fs: str) -> None:
    limiting = mount_small(tmp_path, fs, QUOTA_OPTIONS[fs])
    dockerd = Dockerd("d3", disk / f"limited-{fs}", "gear3", ("--storage-opt", f"gear.root={limiting}/gear"))
    dockerd.start()
    try:
        dockerd.docker("import", "-", "limited", stdin=tiny_tar())
        fill = ("sh", "-c", "dd if=/dev/zero of=/f bs=64k count=32 2>&1; stat -c %s /f")
        *messages, written = dockerd.run("limited", *fill, options=("--rm", "--storage-opt", "size=1M")).splitlines()
        assert any("No space left" in line or "quota exceeded" in line.lower() for line in messages), messages
        assert 1 << 19 < int(written) <= 1 << 20
        assert dockerd.run("limited", *fill).splitlines()[-1] == str(2 << 20)
    finally:
        dockerd.stop()


@pytest.fixture
def remapped(own: Stack, disk: Path) -> Iterator[Dockerd]:
    """Run a dockerd with --userns-remap, with the id ranges of the sandbox."""
    for directory in (sandbox.scratch(), own.directory, own.root):
        directory.chmod(0o711)  # the remapped root must reach its root directory
    ranges = sandbox.scratch() / "ranges"
    ranges.write_text(f"daemon:{REMAPPED}:65536\n")
    for path in ("/etc/subuid", "/etc/subgid"):
        subprocess.run(["mount", "--bind", str(ranges), path], check=True)
    dockerd = Dockerd("d3", disk / "remapped", "gear3", ("--userns-remap", "daemon"))
    dockerd.start()
    yield dockerd
    dockerd.stop()
    for path in ("/etc/subuid", "/etc/subgid"):
        subprocess.run(["umount", path], check=True)


def test_files_of_a_remapped_container_have_remapped_owners_on_the_host(remapped: Dockerd, own: Stack) -> None:
    remapped.docker("import", "-", "tiny", stdin=tiny_tar({"etc/owned": b"owned"}))
    text = b"FROM tiny\nRUN chown 7:8 /etc/owned && echo new > /etc/new && chmod 4755 /etc/new\n"
    remapped.docker("build", *NO_NETWORK, "-t", "built", "-", stdin=text)
    output = remapped.run("built", "stat", "-c", "%u:%g:%a", "/bin/busybox", "/etc/owned", "/etc/new")
    assert output.split() == ["0:0:755", "7:8:644", "0:0:4755"]
    container = remapped.run(
        "built", "sh", "-c", "cat /proc/self/uid_map; echo 1 > /etc/mine; sleep 1000", options=("-d",)
    )
    merged = Path(remapped.docker("inspect", "-f", "{{.GraphDriver.Data.MergedDir}}", container))
    wait_until(lambda: str(REMAPPED) in remapped.docker("logs", container), "the container's map is the range")
    wait_until((merged / "etc/mine").exists, "the container has written")
    assert (merged / "etc/mine").stat().st_uid == REMAPPED
    assert (merged / "etc/owned").stat().st_gid == REMAPPED + 8
    assert merged.stat().st_uid == REMAPPED
    remapped.docker("rm", "-f", container)
    assert saved_owners(remapped.call("save", "built").stdout)["etc/owned"] == (7, 8)


def saved_owners(archive: bytes) -> dict[str, tuple[int, int]]:
    """Return owner and group of every file in the layers of a `docker save`."""
    owners: dict[str, tuple[int, int]] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        for layer in json.load(outer.extractfile("manifest.json") or io.BytesIO())[0]["Layers"]:
            with tarfile.open(fileobj=outer.extractfile(layer)) as inner:
                owners |= {info.name: (info.uid, info.gid) for info in inner}
    return owners
