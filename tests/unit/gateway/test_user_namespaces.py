"""Labels for user namespaces on hosts that cannot map ids, and the checks of containerd's capability."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.cli.containerd_config import remap_check
from gearworkers.containerd.config import Version, snippet
from gearworkers.errors import FailedPrecondition
from gearworkers.layers.index.probe import check_idmapped
from gearworkers.mounts.overlay import OverlaySpec, mount, unmount
from gearworkers.mounts.probe import run_check
from gearworkers.util.check import Check
from plugin_gateway.containerd.user_namespaces import GID_LABEL, UID_LABEL, UserNamespaces
from tests.support.fake_containerd import FakeContainerd

LABELS = {UID_LABEL: "0:100000:65536", GID_LABEL: "0:100000:65536", "other": "1"}
SUPPORTED = Check("user namespaces", True, False, "supported")
UNSUPPORTED = Check("user namespaces", False, False, "Invalid argument", "use ext4")


@pytest.fixture
def containerd(tmp_path: Path) -> Iterator[FakeContainerd]:
    fake = FakeContainerd(tmp_path / "containerd.sock", tmp_path / "content")
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def unsupported_root(tmp_path: Path) -> Iterator[Path]:
    """A root on a file system without idmapped mounts: an overlay."""
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for path in (lower, upper, work, merged):
        path.mkdir()
    mount(OverlaySpec((lower,), (), upper, work), merged)
    yield merged
    unmount(merged)


def test_the_probe_finds_support_and_its_absence(tmp_path: Path, unsupported_root: Path) -> None:
    assert run_check(check_idmapped, tmp_path).ok
    check = run_check(check_idmapped, unsupported_root)
    assert not check.ok and not check.needed and check.advice
    assert not list(unsupported_root.iterdir())


def test_a_mapping_that_containerd_expects_is_refused_without_support(
    tmp_path: Path, containerd: FakeContainerd, unsupported_root: Path
) -> None:
    namespaces = UserNamespaces(unsupported_root, tmp_path / "containerd.sock")
    with pytest.raises(FailedPrecondition, match=r"cannot map the ids of a user namespace: .*; remove remap-ids"):
        namespaces.accepted(LABELS)
    containerd.capabilities = []
    assert namespaces.accepted(LABELS) == {"other": "1"}, "containerd has changed the owners"
    assert namespaces.accepted({"other": "1"}) == {"other": "1"}


def test_a_mapping_that_containerd_expects_is_accepted_with_support(tmp_path: Path, containerd: FakeContainerd) -> None:
    assert UserNamespaces(tmp_path, tmp_path / "containerd.sock").accepted(LABELS) == LABELS


@pytest.mark.parametrize("version", [Version(1, 7), Version(2, 1)])
@pytest.mark.parametrize("remap_ids", [True, False])
def test_the_printed_configuration_claims_what_the_host_supports(version: Version, remap_ids: bool) -> None:
    text = snippet(version, Path("/run/gear/containerd.sock"), Path("/var/lib/gear"), cri=True, remap_ids=remap_ids)
    claim = 'address = "/run/gear/containerd.sock"\n  capabilities = ["remap-ids"]\n'
    assert (claim in text) == remap_ids == ("remap-ids" in text)


@pytest.mark.parametrize(
    ("idmapped", "is_claimed", "ok", "words"),
    [
        (SUPPORTED, True, True, "map the ids"),
        (SUPPORTED, False, False, "gear containerd-config"),
        (UNSUPPORTED, True, False, "Invalid argument; remove the capability"),
        (UNSUPPORTED, False, True, "Invalid argument"),
    ],
)
def test_the_check_compares_the_capability_with_the_host(
    idmapped: Check, is_claimed: bool, ok: bool, words: str
) -> None:
    check = remap_check(idmapped, is_claimed)
    assert check.ok == ok and words in f"{check.found}; {check.advice}"
