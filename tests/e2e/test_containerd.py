"""containerd and a current Docker use gearworkers as their snapshotter and differ."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.digest import METACOPY_XATTR
from gearworkers.settings import RegistrySettings
from tests.conformance.layers import file, tar
from tests.support import rootfs
from tests.support.containerd_host import Containerd, ContainerdDocker, stack_for_containerd
from tests.support.images import Image
from tests.support.plugin import read_metrics
from tests.support.processes import wait_until
from tests.support.registry import Registry
from tests.support.registry_client import repository
from tests.support.stack import Stack
from tests.support.tiny import tar_of, tiny_tar

FILES = {"etc/hello": b"hello\n" * 1000, "data/large": bytes(range(256)) * 40_000}
NAME = "docker.io/library/two:1"
TREE = "find / -xdev -type f -exec sha256sum {} + | sort -k2"


@pytest.fixture(scope="module")
def stack(disk: Path) -> Iterator[Stack]:
    with stack_for_containerd(disk / "containerd-stack", "gearc") as stack:
        yield stack


@pytest.fixture(scope="module")
def containerd(disk: Path, stack: Stack) -> Iterator[Containerd]:
    containerd = Containerd(disk / "containerd", stack)
    containerd.start()
    yield containerd
    containerd.stop()


@pytest.fixture(scope="module")
def session_docker(containerd: Containerd) -> Iterator[ContainerdDocker]:
    docker = ContainerdDocker(containerd)
    docker.start()
    yield docker
    docker.stop()


@pytest.fixture
def docker(session_docker: ContainerdDocker) -> Iterator[ContainerdDocker]:
    yield session_docker
    session_docker.remove_everything()


@pytest.fixture(autouse=True)
def _running(stack: Stack, containerd: Containerd) -> None:
    """Start what an earlier test has left stopped."""
    stack.start("gateway")
    if not containerd.daemon.is_running():
        containerd.start()


@pytest.fixture(scope="module")
def archive(disk: Path) -> Path:
    """An archive of an image with two layers."""
    path = disk / "two.tar"
    path.write_bytes(Image([tiny_tar(), tar_of(FILES)]).saved(NAME))
    return path


@pytest.fixture
def imported(containerd: Containerd, archive: Path) -> Iterator[str]:
    """The image in containerd's namespace `default`."""
    containerd.ctr("images", "import", "--snapshotter", "gear", str(archive))
    yield NAME
    containerd.ctr("images", "rm", "--sync", NAME)


def layers(stack: Stack) -> list[str]:
    """The layers of snapshots in the store."""
    parents = (stack.root / "images", stack.root / "containers")
    return sorted(path.name for parent in parents for path in parent.iterdir() if path.name.startswith("snapshot-"))


# -- ctr


def test_ctr_imports_and_runs_an_image(containerd: Containerd, imported: str) -> None:
    shown = containerd.ctr("run", "--rm", "--snapshotter", "gear", imported, "one", "cat", "/etc/hello")
    assert shown == (FILES["etc/hello"]).decode().strip()


def test_the_layers_are_applied_by_a_worker(containerd: Containerd, stack: Stack, imported: str) -> None:
    status = stack.gear("status").stdout
    assert "Degraded:            no" in status, status
    assert len(layers(stack)) == 2


def test_layers_are_applied_before_containerd_asks_for_them(containerd: Containerd, stack: Stack, disk: Path) -> None:
    def applies(how: str) -> float:
        text = read_metrics(stack.run_dir / "metrics.sock").decode()
        name = f'gear_containerd_applies_total{{how="{how}"}} '
        return sum(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))

    tars = [tar_of({f"file{number}": os.urandom(4 << 20)}) for number in range(6)]
    archive, name = disk / "many.tar", "docker.io/library/many:1"
    archive.write_bytes(Image(tars).saved(name))
    before = applies("early"), applies("requested")
    containerd.ctr("images", "import", "--snapshotter", "gear", str(archive))
    early, requested = applies("early") - before[0], applies("requested") - before[1]
    assert early + requested == 6 and early >= 1, (early, requested)
    assert not list((stack.root / "images").glob("early-*"))
    shown = containerd.ctr("snapshots", "--snapshotter", "gear", "usage")
    assert shown.count("4.0 MiB") == 6, shown
    containerd.ctr("images", "rm", "--sync", name)


def test_two_namespaces_have_the_same_image(containerd: Containerd, stack: Stack, archive: Path, imported: str) -> None:
    containerd.ctr("images", "import", "--snapshotter", "gear", str(archive), namespace="other")
    indexes = [path.stat() for path in (stack.root / "images").glob("snapshot-*/index.erofs")]
    assert len(indexes) == 4 and {index.st_nlink for index in indexes} == {2}, "a layer was applied twice"
    shown = containerd.ctr("run", "--rm", "--snapshotter", "gear", NAME, "one", "cat", "/etc/hello", namespace="other")
    assert shown.startswith("hello")
    containerd.ctr("images", "rm", "--sync", NAME, namespace="other")
    assert containerd.snapshots("other") == []
    assert containerd.ctr("run", "--rm", "--snapshotter", "gear", imported, "two", "cat", "/etc/hello")


def test_a_container_survives_a_killed_gateway(containerd: Containerd, stack: Stack, imported: str) -> None:
    containerd.ctr("run", "-d", "--snapshotter", "gear", imported, "lives", "sleep", "1000")
    stack.daemons["gateway"].kill()
    # The exit code, not the output: ctr may close an exec's pipes before it has read them.
    reads = ("lives", "sh", "-c", 'test "$(head -n 1 /etc/hello)" = hello')
    containerd.ctr("task", "exec", "--exec-id", "a", *reads)
    stack.start("gateway")
    containerd.wait_for_gateway()
    containerd.ctr("task", "exec", "--exec-id", "b", *reads)
    containerd.ctr("task", "kill", "-s", "KILL", "lives")
    wait_until(lambda: "STOPPED" in containerd.ctr("task", "ls"), "the container has stopped")
    containerd.ctr("task", "rm", "lives")
    containerd.ctr("container", "rm", "lives")


@pytest.fixture(scope="module")
def pullable(registry: Registry) -> str:
    """Push the image of `archive` to a registry; return its name."""
    target = repository(registry.host, RegistrySettings().docker_config, "two")
    Image([tiny_tar(), tar_of(FILES)]).push(target, "1")
    return f"{registry.host}/two:1"


@pytest.mark.parametrize("how", ["stopped", "killed", "hanging"])
def test_overlayfs_works_while_the_gateway_is_away(
    containerd: Containerd, stack: Stack, archive: Path, pullable: str, how: str
) -> None:
    """containerd 1.7 cannot unpack images meanwhile, since it has one list of differs for all snapshotters."""
    pull = ("images", "pull", "--plain-http", "--snapshotter", "overlayfs", pullable)
    run = ("run", "--rm", "--snapshotter", "overlayfs")
    containerd.ctr("images", "import", "--snapshotter", "overlayfs", str(archive))
    with ThreadPoolExecutor(1) as pool:
        with stack.away(how):
            containerd.stop()
            containerd.start()
            assert containerd.ctr(*run, NAME, "one", "cat", "/etc/hello").startswith("hello")
            containerd.ctr("images", "rm", "--sync", NAME)
            pulling = pool.submit(containerd.call, *pull)
            if containerd.version >= (2, 0):
                assert pulling.result().returncode == 0
                assert containerd.ctr(*run, pullable, "two", "cat", "/etc/hello").startswith("hello")
            elif how != "hanging":
                assert b"while dialing" in pulling.result().stderr
            if how != "hanging":
                probe = containerd.call("snapshots", "--snapshotter", "gear", "prepare", "probe")
                assert b"while dialing" in probe.stderr
        assert pulling.result().returncode == 0 or how != "hanging", "a pull waits for a gateway that hangs"
    containerd.wait_for_gateway()
    containerd.ctr(*pull)
    assert containerd.ctr(*run, pullable, "three", "cat", "/etc/hello").startswith("hello")
    containerd.ctr("images", "rm", "--sync", pullable)


def test_ctr_pulls_changes_and_exports_an_image(containerd: Containerd, pullable: str, tmp_path: Path) -> None:
    containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "gear", pullable)
    change = "echo new > /new; rm /etc/hello"
    containerd.ctr("run", "--snapshotter", "gear", pullable, "changed", "sh", "-c", change)
    snapshots = ("snapshots", "--snapshotter", "gear")
    containerd.ctr(*snapshots, "commit", "committed", "changed")
    done = containerd.call(*snapshots, "diff", "--media-type", "application/vnd.oci.image.layer.v1.tar", "committed")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert {"new", "etc/.wh.hello"} <= {name.removeprefix("./") for name in tar.getnames()}
    containerd.ctr("images", "export", str(tmp_path / "exported.tar"), pullable)
    containerd.ctr("container", "rm", "changed")
    containerd.ctr(*snapshots, "rm", "committed")
    containerd.ctr("images", "rm", "--sync", pullable)
    containerd.ctr("images", "import", "--snapshotter", "gear", str(tmp_path / "exported.tar"))
    shown = containerd.ctr("run", "--rm", "--snapshotter", "gear", pullable, "one", "cat", "/etc/hello")
    assert shown.startswith("hello")
    containerd.ctr("images", "rm", "--sync", pullable)


def test_removing_the_image_removes_its_layers_and_objects(containerd: Containerd, stack: Stack, archive: Path) -> None:
    containerd.ctr("images", "import", "--snapshotter", "gear", str(archive))
    assert layers(stack) and containerd.snapshots()
    containerd.ctr("images", "rm", "--sync", NAME)
    assert (layers(stack), containerd.snapshots()) == ([], [])
    wait_until(lambda: not any(path.is_file() for path in (stack.root / "public").rglob("*")), "no object is left")


# -- user namespaces

MAPPED = ("--snapshotter", "gear", "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536")


@pytest.fixture
def owned(containerd: Containerd, disk: Path) -> Iterator[str]:
    """An image with files of several owners and modes."""
    name, archive = "docker.io/library/owned:1", disk / "owned.tar"
    files = tar(
        file("roots", b"roots" * 1000),
        file("secret", b"secret", 0o600, 1000, 1001),
        file("setuid", b"#!/bin/sh", 0o4755, 33, 34),
    )
    archive.write_bytes(Image([tiny_tar(), files]).saved(name))
    containerd.ctr("images", "import", "--snapshotter", "gear", str(archive))
    yield name
    containerd.ctr("images", "rm", "--sync", name)


@pytest.mark.parametrize("labels", [("--remap-labels",), ()], ids=["mapped mounts", "owners changed by containerd"])
def test_a_container_in_a_user_namespace_sees_its_own_ids(
    containerd: Containerd, stack: Stack, owned: str, labels: tuple[str, ...]
) -> None:
    before, snapshots = set(layers(stack)), set(containerd.snapshots())
    script = "echo new > /new; chmod 640 /roots; cat /secret; stat -c ' %n %u:%g %a' /new /roots /secret /setuid"
    shown = containerd.ctr("run", *MAPPED, *labels, owned, "mapped", "sh", "-c", script)
    try:
        *others, setuid = [line.strip() for line in shown.splitlines()]
        assert others == ["secret /new 0:0 644", "/roots 0:0 640", "/secret 1000:1001 600"]
        assert setuid == "/setuid 33:34 4755" or not labels, "the chown of containerd 1.7 clears the bit"
        made = sorted(set(layers(stack)) - before, key=lambda id: int(id.rpartition("-")[2]))
        assert len(made) == (1 if labels else 2), "containerd makes a layer with the owners only without labels"
        upper = stack.root / "containers" / made[-1] / "upper"
        assert (upper / "new").stat().st_uid == (upper / "roots").stat().st_uid == 100_000
        if labels:
            assert METACOPY_XATTR in os.listxattr(upper / "roots")
            check_mapped_diff(containerd)
    finally:
        containerd.ctr("container", "rm", "mapped")
        for snapshot in set(containerd.snapshots()) - snapshots:  # unless containerd has collected it meanwhile
            containerd.call("snapshots", "--snapshotter", "gear", "rm", snapshot)
        assert set(containerd.snapshots()) <= snapshots


def check_mapped_diff(containerd: Containerd) -> None:
    """Check that the container's changes have its own ids."""
    blob = containerd.call("snapshots", "--snapshotter", "gear", "diff", "mapped")
    assert blob.returncode == 0, blob.stderr
    with tarfile.open(fileobj=io.BytesIO(blob.stdout)) as found:
        owners = {member.name: (member.uid, member.gid) for member in found}
    assert owners["new"] == owners["roots"] == (0, 0) and "secret" not in owners


def test_containerd_knows_that_mounts_map_ids(containerd: Containerd, stack: Stack) -> None:
    printed = stack.gear("containerd-config").stdout
    assert 'capabilities = ["remap-ids"]' in printed
    found = stack.gear("doctor").stdout
    assert "containerd user namespaces: mounts map the ids" in found, found
    assert "containerd mounts: containerd is in the gateway's mount namespace" in found, found


# -- Docker on containerd's image store


def test_docker_runs_a_real_image_with_the_right_files(docker: ContainerdDocker) -> None:
    docker.docker("import", "-", "debian", stdin=rootfs.debian())
    with tarfile.open(rootfs.debian()) as tar:
        names = {member.name.removeprefix(".") for member in tar if member.isreg() or member.islnk()}
    shown = docker.run("debian", "sh", "-c", TREE)
    found = {line.split(None, 1)[1] for line in shown.splitlines()}
    made_by_docker = {"/.dockerenv", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}
    assert found - made_by_docker == names - made_by_docker


def test_docker_diff_cp_commit_save_and_export_show_a_containers_changes(docker: ContainerdDocker, disk: Path) -> None:
    docker.docker("import", "-", "tiny", stdin=tiny_tar({"etc/old": b"old"}))
    docker.run("tiny", "sh", "-c", "echo new > /etc/new; rm /etc/old; mkdir /d", options=("--name", "changed"))
    diff = set(docker.docker("diff", "changed").splitlines())
    assert {"A /etc/new", "D /etc/old", "A /d"} <= diff
    docker.docker("cp", "changed:/etc/new", str(disk / "copied"))
    assert (disk / "copied").read_bytes() == b"new\n"
    docker.docker("commit", "changed", "committed")
    assert docker.run("committed", "sh", "-c", "cat /etc/new; ls /etc/old /d 2>&1 || true").startswith("new")
    exported = docker.call("export", "changed").stdout
    with tarfile.open(fileobj=io.BytesIO(exported)) as tar:
        assert {"etc/new", "d"} <= {name.rstrip("/") for name in tar.getnames()} - {"etc/old"}
    saved = docker.call("save", "committed").stdout
    docker.remove_everything()
    docker.docker("load", stdin=saved)
    assert docker.run("committed", "cat", "/etc/new") == "new"


@pytest.mark.parametrize("buildkit", [False, True], ids=["classic", "buildkit"])
def test_docker_builds_an_image(docker: ContainerdDocker, tmp_path: Path, buildkit: bool) -> None:
    docker.docker("import", "-", "tiny", stdin=tiny_tar())
    steps = ["FROM tiny AS one", "RUN mkdir /made && echo a > /made/a", "COPY x /x", "RUN mv /made /moved", "RUN rm /x"]
    steps += ["FROM tiny", "COPY --from=one /moved /copied", "COPY x /y", "RUN echo b >> /copied/a"]
    (tmp_path / "Dockerfile").write_text("\n".join(steps))
    (tmp_path / "x").write_text("x")
    docker.docker("build", "--network", "host", "-t", "built", str(tmp_path), buildkit=buildkit)
    assert docker.run("built", "sh", "-c", "cat /copied/a /y; ls /moved 2>&1 || true").splitlines()[:2] == ["a", "b"]


def test_buildkit_mounts_links_and_outputs(docker: ContainerdDocker, tmp_path: Path) -> None:
    docker.docker("import", "-", "tiny", stdin=tiny_tar())
    context, out = tmp_path / "context", tmp_path / "out"
    context.mkdir()
    (context / "x").write_text("x")
    cache = "--mount=type=cache,target=/cache"
    steps = ["FROM tiny AS made", "RUN --mount=type=bind,target=/src cp /src/x /bound"]
    steps += [f"RUN {cache} echo cached > /cache/c", f"RUN {cache} cp /cache/c /c && mkdir /d && cp /bound /d/old"]
    steps += [
        "FROM tiny AS linked",
        "COPY --link --from=made /d /d",
        "COPY --link --from=made /c /d/",
        "COPY --link x /d/",
    ]
    steps += ["RUN ls /d > /listed && rm /d/old", "FROM scratch", "COPY --from=linked /d /listed /"]
    (context / "Dockerfile").write_text("\n".join(steps))
    build = ("build", "--network", "host")
    docker.docker(*build, "--output", f"type=local,dest={out}", str(context))
    found = {path.name: path.read_text().split() for path in out.iterdir() if path.is_file()}
    assert found == {"c": ["cached"], "x": ["x"], "listed": ["c", "old", "x"]}
    docker.docker(*build, "--output", f"type=tar,dest={tmp_path / 'out.tar'}", str(context))
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert {name.removeprefix("./") for name in tar.getnames()} >= {"c", "x", "listed"}
    docker.docker(*build, "--target", "linked", "-t", "linked", str(context))
    assert docker.run("linked", "sh", "-c", "cat /d/c /d/x; ls /d") == "cached\nxc\nx"


def test_files_that_a_build_writes_become_objects(docker: ContainerdDocker, stack: Stack, tmp_path: Path) -> None:
    docker.docker("import", "-", "tiny", stdin=tiny_tar())
    steps = ["FROM tiny", "RUN seq 100000 > /one && cp /one /two", "RUN cat /one /two | wc -l > /lines"]
    (tmp_path / "Dockerfile").write_text("\n".join(steps))
    docker.docker("build", "--network", "host", "-t", "built", str(tmp_path))
    content = b"".join(b"%d\n" % number for number in range(1, 100_001))
    digest = hashlib.sha256(content).digest()
    wait_until(lambda: ObjectStore(stack.root / "public").has(digest), "the file is an object")
    uppers = (stack.root / "containers").glob("*/upper/one")
    wait_until(lambda: all(path.lstat().st_blocks == 0 for path in uppers), "the layer holds no copy")
    assert docker.run("built", "sh", "-c", "sort -n /one /two | wc -l; cat /lines").split() == ["200000", "200000"]


def test_docker_pushes_and_pulls_an_image_with_the_same_digest(docker: ContainerdDocker, disk: Path) -> None:
    registry = Registry(disk / "containerd-registry", 5010)
    registry.start()
    try:
        name = f"{registry.host}/tiny:1"
        docker.docker("import", "-", name, stdin=tiny_tar(FILES))
        docker.docker("push", name)
        digest = json.loads(docker.docker("image", "inspect", name))[0]["RepoDigests"]
        docker.remove_everything()
        docker.docker("pull", name)
        assert json.loads(docker.docker("image", "inspect", name))[0]["RepoDigests"] == digest
        assert docker.run(name, "cat", "/etc/hello").startswith("hello")
    finally:
        registry.stop()


def test_twenty_containers_run_at_once(docker: ContainerdDocker) -> None:
    docker.docker("import", "-", "tiny", stdin=tiny_tar())
    started = [
        docker.run("tiny", "sh", "-c", f"echo {number} > /number; sleep 1000", options=("-d",)) for number in range(20)
    ]
    for number, container in enumerate(started):
        shown = docker.docker("exec", container, "cat", "/number")
        assert shown == str(number)


def test_pruning_leaves_no_layer(docker: ContainerdDocker, stack: Stack) -> None:
    docker.docker("import", "-", "tiny", stdin=tiny_tar())
    docker.run("tiny", "true", options=())
    docker.remove_everything()
    wait_until(lambda: layers(stack) == [], "all layers are removed")


@pytest.mark.parametrize("order", list(itertools.permutations(("gateway", "containerd", "docker")))[::2], ids="-".join)
def test_containers_survive_the_death_of_all_daemons(
    docker: ContainerdDocker, stack: Stack, order: Sequence[str]
) -> None:
    """SIGKILL all daemons and start them in *order*, none of them waiting for another.

    Docker 28 starts last: if containerd cannot reach the gateway then, `docker exec` fails in running containers.
    """
    is_docker_last = docker.containerd.version >= (2, 0)
    docker.docker("import", "-", "tiny", stdin=tiny_tar())
    container = docker.run("tiny", "sleep", "1000", options=("-d",))
    docker.docker("exec", container, "touch", "/before")
    gateway, containerd = stack.daemons["gateway"], docker.containerd.daemon
    daemons = {"gateway": gateway, "containerd": containerd, "docker": docker.daemon}
    for daemon in daemons.values():
        daemon.kill()
    for name in sorted(order, key=lambda name: is_docker_last and name == "docker"):
        if is_docker_last and name == "docker":
            docker.containerd.wait_for_gateway()
        {"docker": docker.begin_start}.get(name, daemons[name].start)()
    wait_until(lambda: docker.call("exec", container, "touch", "/after").returncode == 0, "exec works")
    docker.containerd.wait_for_gateway()
    assert {"A /before", "A /after"} <= set(docker.docker("diff", container).splitlines())
    assert docker.run("tiny", "echo", "new") == "new"


def test_containers_survive_restarts_of_all_daemons(docker: ContainerdDocker, stack: Stack) -> None:
    docker.docker("import", "-", "tiny", stdin=tiny_tar())
    container = docker.run("tiny", "sleep", "1000", options=("-d",))
    for stop, start in (
        (docker.stop, docker.start),
        (docker.containerd.stop, docker.containerd.start),
        (stack.daemons["gateway"].kill, lambda: stack.start("gateway")),
    ):
        stop()
        start()
        wait_until(lambda: docker.call("exec", container, "touch", "/touched").returncode == 0, "exec works")
    assert "A /touched" in docker.docker("diff", container)
