"""The labels with which containerd asks for a mount for a container in a user namespace.

containerd names the container's ids at Prepare and View. If it knows that the snapshotter has the capability
``remap-ids``, it expects that the mount maps them. Otherwise it has changed the owners of all files of the parent
itself, in a snapshot that it makes for that, and the mount must not map them once more.

Source: containerd's core/snapshots, "LabelSnapshotUIDMapping"; client, "resolveSnapshotOptions".
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from gearworkers.containerd.client import connected
from gearworkers.containerd.config import REMAP_IDS, SNAPSHOTTER, SNAPSHOTTER_TYPE
from gearworkers.errors import FailedPrecondition, InvalidInput, NotFound
from gearworkers.layers.idmap import IdMaps, IdRange, parse_ranges
from gearworkers.layers.index.probe import check_idmapped
from gearworkers.mounts.probe import run_check

UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"


def id_maps(labels: Mapping[str, str]) -> IdMaps:
    """Return the maps in a snapshot's labels; without a label, ids of its kind are unchanged.

    Raises:
        InvalidInput: A label is malformed, or does not map the container's root.
    """
    uids, gids = (_ranges(labels, label) for label in (UID_LABEL, GID_LABEL))
    maps = IdMaps(uids, gids)
    try:
        maps.root  # noqa: B018 (raises)
    except InvalidInput:
        raise InvalidInput(f"labels {UID_LABEL} and {GID_LABEL}: no range contains the container's id 0") from None
    return maps


def without_id_maps(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the other labels."""
    return {key: value for key, value in labels.items() if key not in (UID_LABEL, GID_LABEL)}


def only_id_maps(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the two labels, as far as they exist."""
    return {key: value for key, value in labels.items() if key in (UID_LABEL, GID_LABEL)}


class UserNamespaces:
    """Knows whether containerd expects mapped mounts, and whether this host can make them.

    Args:
        root: GEAR_ROOT.
        address: containerd's socket.
    """

    def __init__(self, root: Path, address: Path) -> None:
        self._root = root
        self._address = address
        self._lock = threading.Lock()
        self._are_supported = False

    def accepted(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Return the labels to store for a new snapshot: without the maps if its mounts must not map ids.

        Raises:
            InvalidInput: As `id_maps`.
            Unavailable: containerd does not answer whether it expects mapped mounts.
            FailedPrecondition: It does, but this host cannot make them.
        """
        if not id_maps(labels):
            return dict(labels)
        if not self._expected():
            return without_id_maps(labels)
        self._require_support()
        return dict(labels)

    def _expected(self) -> bool:
        try:
            with connected(self._address) as client:
                return REMAP_IDS in client.plugin(SNAPSHOTTER_TYPE, SNAPSHOTTER).capabilities
        except NotFound:
            return False

    def _require_support(self) -> None:
        with self._lock:
            if self._are_supported:
                return
            check = run_check(check_idmapped, self._root)
            if not check.ok:
                raise FailedPrecondition(
                    f"cannot map the ids of a user namespace: {check.found}; remove {REMAP_IDS} from the capabilities "
                    f"of {SNAPSHOTTER} in containerd's configuration"
                )
            self._are_supported = True


def _ranges(labels: Mapping[str, str], label: str) -> tuple[IdRange, ...]:
    text = labels.get(label)
    if not text:
        return ()
    try:
        return parse_ranges(text)
    except InvalidInput as exc:
        raise InvalidInput(f"label {label}: {exc}") from None
