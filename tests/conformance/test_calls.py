"""Malformed, repeated and out-of-order calls, and the results of the light calls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gearworkers.layers.idmap import IdRange
from tests.conformance.drivers import Driver, DriverError, new_layer_id
from tests.conformance.layers import apply_layer, committed, container, directory, file, mounted, shown, tar

BAD_IDS = ["../x", "..", ".", "", "a/b", "/etc", "a" * 201, "nul\0", "new\nline", "-\N{BULLET}"]


@pytest.mark.parametrize("id", BAD_IDS, ids=repr)
def test_an_invalid_id_never_becomes_a_path(driver: Driver, id: str) -> None:
    for call in (driver.create, driver.create_read_write, driver.get, driver.put, driver.remove, driver.get_metadata):
        with pytest.raises(DriverError, match="layer id"):
            call(id)


def test_calls_for_a_missing_layer_fail_or_do_nothing(driver: Driver) -> None:
    id = new_layer_id()
    assert not driver.exists(id)
    driver.remove(id)
    driver.put(id)
    for call in (driver.get, driver.get_metadata, driver.changes, driver.diff_size, driver.diff):
        with pytest.raises(DriverError, match=f"layer {id} does not exist"):
            call(id)
    with pytest.raises(DriverError, match=f"layer {id} does not exist"):
        driver.apply_diff(id, "", tar())


def test_the_driver_reproduces_exact_diffs(driver: Driver) -> None:
    assert driver.capabilities() == {"ReproducesExactDiffs": True}


def test_the_error_for_an_unknown_option_names_the_known_options(driver: Driver) -> None:
    with pytest.raises(DriverError, match=r"gear.size=1G.*gear.root=….*gear.broker=…"):
        driver.init(["gear.size=1G"])
    with pytest.raises(DriverError, match="absolute"):
        driver.init(["gear.root=relative"])


def test_unsupported_container_options_are_rejected(driver: Driver) -> None:
    id = new_layer_id()
    for option, reason in (({"size": "1M"}, "without project quotas"), ({"nope": "1"}, "unknown option nope")):
        with pytest.raises(DriverError, match=reason):
            driver.create_read_write(id, storage_opt=option)
    for option, reason in (({"size": "1M"}, "containers only"), ({"nope": "1"}, "unknown option nope")):
        with pytest.raises(DriverError, match=reason):
            driver.create(id, storage_opt=option)
    with pytest.raises(DriverError, match="512M or 10G"):
        driver.create_read_write(id, storage_opt={"size": "much"})
    assert not driver.exists(id)
    driver.create_read_write(id, storage_opt={})


def test_get_metadata_has_overlay2s_keys(driver: Driver) -> None:
    base = apply_layer(driver, file("a", b"a"))
    middle = apply_layer(driver, file("b", b"b"), parent=base)
    id = new_layer_id()
    driver.create_read_write(id, middle)
    metadata = driver.get_metadata(id)
    assert set(metadata) == {"LowerDir", "UpperDir", "WorkDir", "MergedDir"}
    assert [sorted(os.listdir(path)) for path in metadata["LowerDir"].split(":")] == [["b"], ["a"]]
    with mounted(driver, id) as merged:
        assert str(merged) == metadata["MergedDir"]
        (merged / "new").touch()
        assert os.listdir(metadata["UpperDir"]) == ["new"]
    assert set(driver.get_metadata(base)) == {"UpperDir", "WorkDir", "MergedDir"}


def test_status_shows_the_root_directory_and_counters(driver: Driver) -> None:
    status = driver.status()
    assert status["Root Dir"] == str(driver.settings.gear_root)
    assert {"Backing Filesystem", "Kernel Mode", "Objects", "Logical Bytes", "Stored Bytes"} <= set(status)
    driver.restart()
    assert driver.status()["Kernel Mode"] == status["Kernel Mode"]


def test_a_layer_accepts_one_diff(driver: Driver) -> None:
    id = apply_layer(driver, file("a", b"a"))
    with pytest.raises(DriverError, match="has content"):
        driver.apply_diff(id, "", tar(file("b", b"b")))
    assert set(shown(driver, id)) == {b"a"}


def test_an_incomplete_layer_rejects_all_calls_but_remove(driver: Driver) -> None:
    id = new_layer_id()
    driver.create(id)
    complete = tar(file("a", b"a" * 5000))
    with pytest.raises(DriverError, match="ends early"):
        driver.apply_diff(id, "", complete[:3000])
    for call in (
        lambda: driver.apply_diff(id, "", complete),
        lambda: driver.get(id),
        lambda: driver.create_read_write(new_layer_id(), id),
    ):
        with pytest.raises(DriverError, match="pull or build again"):
            call()
    driver.remove(id)
    assert not driver.exists(id)
    driver.create(id)
    driver.apply_diff(id, "", complete)
    assert set(shown(driver, id)) == {b"a"}


@pytest.mark.parametrize("empty_tar", [b"", bytes(512), bytes(1024), bytes(10240)])
def test_an_empty_tar_makes_an_empty_layer(driver: Driver, empty_tar: bytes) -> None:
    base, id = apply_layer(driver, file("a", b"a")), new_layer_id()
    driver.create(id, base)
    assert driver.apply_diff(id, base, empty_tar) == 0
    assert driver.diff(id, base) == empty_tar
    assert shown(driver, id) == shown(driver, base)


def test_the_rest_of_an_interrupted_tar_is_rejected(driver: Driver) -> None:
    id = new_layer_id()
    driver.create(id)
    complete = tar(file("a", b"a" * 5000))
    with pytest.raises(DriverError, match="ends early"):
        driver.apply_diff(id, "", complete[:3000])
    for rest in (b"", bytes(1024), tar(file("b", b"b"))):
        with pytest.raises(DriverError, match="a part of its tar may be lost"):
            driver.apply_diff(id, "", rest)


@pytest.mark.parametrize("used", [False, True])
def test_a_layer_created_before_a_restart_is_mounted_but_rejects_a_diff(driver: Driver, used: bool) -> None:
    id = new_layer_id()
    driver.create(id)
    if used:
        with mounted(driver, id):
            pass
    driver.restart()
    with pytest.raises(DriverError, match="the gateway was restarted"):
        driver.apply_diff(id, "", b"")
    with mounted(driver, id) as merged:
        (merged / "a").touch()
    assert set(shown(driver, id)) == {b"a"}


def test_a_diff_with_another_parent_than_create_is_rejected(driver: Driver) -> None:
    base, id = apply_layer(driver, file("a", b"a")), new_layer_id()
    driver.create(id)
    with pytest.raises(DriverError, match="parent"):
        driver.apply_diff(id, base, tar())


def test_a_written_layer_rejects_a_diff(driver: Driver) -> None:
    id = new_layer_id()
    driver.create(id)
    with mounted(driver, id) as merged:
        (merged / "a").touch()
    with pytest.raises(DriverError, match="has content"):
        driver.apply_diff(id, "", tar())


def test_diff_and_changes_work_for_any_pair_of_layers(driver: Driver) -> None:
    base = apply_layer(driver, directory("d"), file("d/a", b"a"), file("d/b", b"bb"))
    one = apply_layer(driver, file("d/a", b"other"), parent=base)
    two = apply_layer(driver, file("d/c", b"ccc"), parent=base)
    assert driver.changes(two, one) == [("/d", 0), ("/d/a", 0), ("/d/c", 1)]
    assert driver.diff_size(two, one) == len(b"a") + len(b"ccc")
    again = new_layer_id()
    driver.create(again, one)
    driver.apply_diff(again, one, driver.diff(two, one))
    assert shown(driver, again) == shown(driver, two)
    whole = new_layer_id()
    driver.create(whole)
    driver.apply_diff(whole, "", driver.diff(two))
    assert set(shown(driver, whole)) >= {b"d/c"}


def test_a_mount_label_reaches_the_kernel(driver: Driver) -> None:
    """A kernel without SELinux rejects the label; one with SELinux shows it in mountinfo."""
    base, id = apply_layer(driver, file("a", b"a")), new_layer_id()
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    driver.create_read_write(id, base, label)
    if Path("/sys/fs/selinux/enforce").exists():
        merged = driver.get(id, label)
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        assert any(f" {merged} " in line and label in line for line in lines)
    else:
        with pytest.raises(DriverError, match="context"):
            driver.get(id, label)
    driver.remove(id)
    assert not driver.exists(id), "Remove leaves nothing"


MAPS = [IdRange(0, 100_000, 65_536)]


@pytest.fixture
def remapped(driver: Driver) -> Driver:
    """Return the driver of a dockerd with --userns-remap."""
    driver.init([], MAPS, MAPS)
    return driver


def test_remapped_owners_are_host_ids_in_the_tree_and_container_ids_in_the_diff(remapped: Driver) -> None:
    data = tar(directory("d", uid=5, gid=6), file("d/a", b"a", 0o4755, 1000, 1001), file("e/implied", b"b"))
    id = new_layer_id()
    remapped.create(id)
    remapped.apply_diff(id, "", data)
    nodes = shown(remapped, id)
    assert (nodes[b"d"].uid, nodes[b"d"].gid) == (100_005, 100_006)
    assert (nodes[b"d/a"].uid, nodes[b"d/a"].gid, nodes[b"d/a"].mode & 0o7777) == (101_000, 101_001, 0o4755)
    assert (nodes[b"e"].uid, nodes[b"e"].gid) == (100_000, 100_000), (
        "an implied parent belongs to the root user of the container"
    )
    assert remapped.diff(id) == data


def test_a_remapped_container_is_committed_and_read_back(remapped: Driver) -> None:
    base, id = apply_layer(remapped, file("a", b"a", 0o644, 7, 7)), new_layer_id()
    remapped.create_read_write(id, base)
    with mounted(remapped, id) as merged:
        root = merged.lstat()
        assert (root.st_uid, root.st_gid) == (100_000, 100_000)
        os.chown(merged / "a", 100_033, 100_034)
        (merged / "new").write_text("new")
        os.chown(merged / "new", 165_535, 100_000)
    seen = shown(remapped, id)
    assert b"165535" not in remapped.diff(id, base)
    assert shown(remapped, committed(remapped, id, base)) == seen


def test_the_error_for_an_unmapped_owner_names_the_file(remapped: Driver) -> None:
    id = new_layer_id()
    remapped.create(id)
    with pytest.raises(DriverError, match=r"far.*70000"):
        remapped.apply_diff(id, "", tar(file("far", b"", uid=70_000)))
    base = apply_layer(remapped, file("a", b"a"))
    with container(remapped, base, id := new_container(remapped, base)) as merged:
        (merged / "hosts").touch()
        with pytest.raises(DriverError, match="hosts"):
            remapped.diff(id, base)


def new_container(driver: Driver, parent: str) -> str:
    id = new_layer_id()
    driver.create_read_write(id, parent)
    return id
