"""`docker run --storage-opt size=…`: the file system enforces the size, or the call is rejected.

Project quotas need CONFIG_XFS_QUOTA, or CONFIG_QFMT_V2 for ext4. On a kernel without them, the tests that need them are
skipped; the tests with a fake of the kernel's limits and real project numbers still run. All pass with the kernel of
Debian 13, which has both options.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gearworkers.errors import FailedPrecondition, InvalidInput
from gearworkers.layers import quotas
from gearworkers.mounts import quotactl
from gearworkers.settings import Settings
from gearworkers.util.fs import opened_directory
from plugin_gateway.graphdriver import options
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.drivers import DriverError, InProcess
from tests.conformance.layers import apply_layer, file, mounted
from tests.faults.crashes import Report, killed_at_every_step
from tests.support.disk import QUOTA_OPTIONS, mount_small

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("1M", MIB), ("10g", 10 << 30), ("1.5 KiB", 1536), ("4096", 4096), ("7b", 7), ("2tb", 2 << 40), ("0", 0)],
)
def test_sizes_are_parsed_as_docker_does(text: str, size: int) -> None:
    assert options.container_size({"size": text}) == options.container_size({"Size": text}) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1e6", "1 0", "1X", "١M", "9" * 400, "9" * 18 + "P"])
def test_a_malformed_size_is_rejected(text: str) -> None:
    with pytest.raises(InvalidInput, match="512M or 10G"):
        options.container_size({"size": text})


def test_the_size_is_none_without_the_option() -> None:
    assert options.container_size(None) is options.container_size({}) is None


def driver_on(disk: Path) -> InProcess:
    return InProcess(Settings(gear_root=disk / "gear", run_dir=disk / "run", node="test"))


def project_of(directory: Path) -> quotactl.Project:
    with opened_directory(directory) as dir_fd:
        return quotactl.project_of(dir_fd)


@contextmanager
def small_disk(directory: Path, fs: str, options: str) -> Iterator[Path]:
    disk = mount_small(directory, fs, options)
    yield disk
    subprocess.run(["umount", "--recursive", str(disk)], check=True)
    disk.with_suffix(".img").unlink()


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that counts projects but enforces no limits."""
    with small_disk(tmp_path, "xfs", "noquota") as disk:
        yield disk


def test_new_files_belong_to_the_project_of_their_directory(xfs: Path) -> None:
    (xfs / "directory").mkdir()
    assert project_of(xfs / "directory") == (0, False)
    with opened_directory(xfs / "directory") as dir_fd:
        quotactl.assign(dir_fd, 1 << 20)
    (xfs / "directory/a/b").mkdir(parents=True)
    assert project_of(xfs / "directory/a/b") == (1 << 20, True)
    (xfs / "directory").rename(xfs / "renamed")
    with pytest.raises(OSError, match="cross-device"):
        (xfs / "file").write_bytes(b"")
        os.rename(xfs / "file", xfs / "renamed/file")


def test_a_size_is_rejected_with_advice_on_a_file_system_without_limits(xfs: Path) -> None:
    driver = driver_on(xfs)
    for id in ("container", "container-init"):
        with pytest.raises(DriverError, match=r"on xfs without project quotas; use xfs mounted with pquota, or ext4"):
            driver.create_read_write(id, storage_opt={"size": "1M"})
        assert not driver.exists(id)


class FakeKernel:
    """A fake of the kernel's limits; the projects are real."""

    def __init__(self, disk: Path) -> None:
        self.limits: dict[int, int] = {}
        self._disk = disk

    def is_enforced(self, dir_fd: int) -> bool:
        return True

    def is_used(self, dir_fd: int, id: int) -> bool:
        directories = (Path(path) for path, _, _ in os.walk(self._disk))
        return any(project_of(directory).id == id for directory in directories)

    def limit(self, dir_fd: int, id: int, size_bytes: int) -> None:
        self.limits[id] = size_bytes


@pytest.fixture
def kernel(xfs: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel(xfs)
    for name in ("is_enforced", "is_used", "limit"):
        monkeypatch.setattr(quotactl, name, getattr(kernel, name))
    return kernel


def limited(driver: InProcess, id: str, size: str = "1M") -> int:
    """Create a container with a size; return its project."""
    driver.create_read_write(id, storage_opt={"size": size})
    return project_of(driver.settings.gear_containers_path / id).id


def test_each_container_has_a_project_until_it_is_removed(xfs: Path, kernel: FakeKernel) -> None:
    driver = driver_on(xfs)
    one, two = limited(driver, "one"), limited(driver, "two", "2M")
    assert kernel.limits == {one: MIB, two: 2 * MIB}
    for directory in ("upper", "work"):
        assert project_of(driver.settings.gear_containers_path / "one" / directory) == (one, True)
    driver.remove("one")
    assert kernel.limits == {one: 0, two: 2 * MIB}
    restarted = driver_on(xfs)
    three, four = limited(restarted, "three"), limited(restarted, "four")
    assert three == one and len({two, three, four}) == 3


def test_init_layers_and_containers_without_a_size_belong_to_no_project(xfs: Path, kernel: FakeKernel) -> None:
    driver = driver_on(xfs)
    assert limited(driver, "container-init") == limited(driver, "unlimited", "0") == 0
    driver.create_read_write("plain")
    assert project_of(driver.settings.gear_containers_path / "plain").id == 0
    for id in ("container-init", "unlimited", "plain"):
        driver.remove(id)
    assert not kernel.limits


def test_a_limit_that_a_crash_left_is_replaced(xfs: Path, kernel: FakeKernel) -> None:
    driver = driver_on(xfs)
    one = limited(driver, "one")
    kernel.limits[one + 1] = 5
    assert limited(driver_on(xfs), "two") == one + 1
    assert kernel.limits == {one: MIB, one + 1: MIB}


def test_project_numbers_in_use_are_skipped(xfs: Path, kernel: FakeKernel) -> None:
    (xfs / "other").mkdir()
    with opened_directory(xfs / "other") as dir_fd:
        quotactl.assign(dir_fd, quotas.FIRST_PROJECT)
    assert limited(driver_on(xfs), "one") == quotas.FIRST_PROJECT + 1


def test_a_size_is_rejected_with_advice_if_gear_root_is_in_one_project(xfs: Path, kernel: FakeKernel) -> None:
    with opened_directory(xfs) as dir_fd:
        quotactl.assign(dir_fd, 7)
    with pytest.raises(DriverError, match=r"project 7; .*chattr -P"):
        limited(driver_on(xfs), "one")


@pytest.fixture(params=sorted(QUOTA_OPTIONS))
def limiting(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system that enforces the limits of projects."""
    with small_disk(tmp_path, request.param, QUOTA_OPTIONS[request.param]) as disk:
        yield disk


def fill(directory: Path, size_bytes: int) -> int:
    """Write up to *size_bytes*; return the number of bytes written."""
    written = 0
    with (directory / "filler").open("wb", buffering=0) as filler:
        try:
            while written < size_bytes:
                written += filler.write(bytes(64 << 10))
        except OSError as exc:
            assert exc.errno in (errno.ENOSPC, errno.EDQUOT)
    return written


def test_a_container_cannot_write_more_than_its_size(limiting: Path) -> None:
    driver = driver_on(limiting)
    base = apply_layer(driver, file("large", os.urandom(2 * MIB)), file("small", b"small"))
    driver.create_read_write("limited", base, storage_opt={"size": "1M"})
    driver.create_read_write("free", base)
    with mounted(driver, "limited") as merged:
        assert MIB // 2 < fill(merged, 2 * MIB) <= MIB
        with pytest.raises(OSError) as refused, (merged / "large").open("ab"):
            pass
        assert refused.value.errno in (errno.ENOSPC, errno.EDQUOT), "a copy-up counts"
        os.chmod(merged / "large", 0o600)
        assert MIB // 2 < fill(merged, 2 * MIB) <= MIB, "truncated space is free again"
        assert os.statvfs(merged).f_blocks * os.statvfs(merged).f_frsize == MIB, "df in the container"
        with mounted(driver, "free") as other:
            assert fill(other, 4 * MIB) == 4 * MIB
    driver.restart()
    with mounted(driver, "limited") as merged:
        assert (merged / "filler").stat().st_size > MIB // 2
        assert fill(merged, 2 * MIB) <= MIB, "also after a restart"
    driver.remove("limited")
    limited(driver_on(limiting), "next", "8M")  # xfs may not have released the number yet
    with mounted(driver, "next") as merged:
        assert 7 * MIB < fill(merged, 10 * MIB) <= 8 * MIB


@pytest.mark.parametrize("call", ["create_read_write", "get", "remove"])
def test_a_call_killed_at_any_step_leaves_the_size_enforced(limiting: Path, call: str) -> None:
    settings = driver_on(limiting).settings
    arguments = ("", "", {"size": "1M"}) if call == "create_read_write" else ()

    def work(report: Report) -> None:
        getattr(GearDriver(settings), call)("limited", *arguments)

    if not arguments:
        limited(driver_on(limiting), "limited")
    for _ in killed_at_every_step(work):
        driver = driver_on(limiting)
        if not driver.exists("limited"):
            limited(driver, "limited")
        with mounted(driver, "limited") as merged:
            assert fill(merged, 2 * MIB) <= MIB
        driver.remove("limited")
        if not arguments:
            limited(driver, "limited")


def test_a_file_system_that_counts_projects_without_limits_is_recognized(limiting: Path) -> None:
    with opened_directory(limiting) as dir_fd:
        assert quotactl.is_enforced(dir_fd)
        assert not quotactl.is_used(dir_fd, 5)
    counting = {"xfs": "pqnoenforce", "ext4": "noquota"}[limiting.name]
    image = limiting.with_suffix(".img")
    subprocess.run(["umount", str(limiting)], check=True)
    subprocess.run(["mount", "-o", f"loop,{counting}", str(image), str(limiting)], check=True)
    with opened_directory(limiting) as dir_fd:
        assert not quotactl.is_enforced(dir_fd)
    with pytest.raises(DriverError, match="without project quotas"):
        limited(driver_on(limiting), "one")


def test_a_container_is_not_mounted_if_its_size_is_not_enforced(
    xfs: Path, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = driver_on(xfs)
    limited(driver, "one")
    monkeypatch.setattr(quotactl, "is_enforced", lambda _: False)
    with pytest.raises(DriverError, match="without project quotas; use xfs mounted with pquota"):
        driver.get("one")
    driver.remove("one")


def test_an_image_layer_with_a_size_is_rejected(tmp_path: Path) -> None:
    driver = GearDriver(Settings(gear_root=tmp_path / "gear", run_dir=tmp_path / "run"))
    driver.prepare()
    with pytest.raises(InvalidInput, match="containers only"):
        driver.create("layer", "", "", {"size": "1M"})
    with pytest.raises(FailedPrecondition, match="without project quotas"):
        driver.create_read_write("container", "", "", {"size": "1M"})
