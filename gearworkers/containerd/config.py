"""containerd's configuration for gearworkers: the text to add, and checks of a running containerd.

Source: containerd's docs/PLUGINS.md "Proxy Plugins", docs/cri/config.md and docs/transfer.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from gearworkers.errors import FailedPrecondition, InvalidInput
from gearworkers.util.architecture import go_architecture

SNAPSHOTTER = "gear"
SNAPSHOTTER_TYPE = "io.containerd.snapshotter.v1"
DIFFER = "gear-diff"
REMAP_IDS = "remap-ids"
"""The capability of a snapshotter whose mounts map ids, so that containerd need not change the owners of files."""
FIRST_VERSION = (1, 7)
"""containerd 1.6 crashes at its start if a proxy plugin is a differ."""


class Version(NamedTuple):
    """The version of a containerd."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> Version:
        """Return the version of text such as ``1.7.24~ds1`` or ``v2.1.9``.

        Raises:
            InvalidInput: The text is not a version.
        """
        found = re.match(r"v?(\d+)\.(\d+)", text)
        if found is None:
            raise InvalidInput(f"containerd reports the version {text!r}")
        return cls(int(found[1]), int(found[2]))


def require_supported(version: Version) -> None:
    """Check that this containerd can use gearworkers.

    Raises:
        FailedPrecondition: It is too old.
    """
    if version < FIRST_VERSION:
        raise FailedPrecondition(
            f"containerd {version.major}.{version.minor} crashes with a differ as proxy plugin; use 1.7 or later"
        )


def snippet(version: Version, socket: Path, root: Path, *, cri: bool, remap_ids: bool = True) -> str:
    """Return the text for containerd's config.toml.

    Args:
        version: The version of containerd.
        socket: Where the gateway listens.
        root: GEAR_ROOT.
        cri: Whether the configuration is for Kubernetes' CRI; otherwise it is for Docker, ctr and nerdctl.
        remap_ids: Whether this host can make mounts that map ids: `check_idmapped`.

    Raises:
        FailedPrecondition: containerd is too old.
    """
    require_supported(version)
    parts = [_proxy_plugins(version, socket, root, remap_ids), _diff_service()]
    if cri:
        parts.append(_cri(version))
    if version >= (2, 0):
        parts.append(_unpack_config())
    return "\n".join(parts)


def _proxy_plugins(version: Version, socket: Path, root: Path, remap_ids: bool) -> str:
    capabilities = f'\n  capabilities = ["{REMAP_IDS}"]' if remap_ids else ""
    annotations = '\n    enable_remote_snapshot_annotations = "true"' if version >= (2, 0) else ""
    return f"""version = {3 if version >= (2, 0) else 2}

[proxy_plugins.{SNAPSHOTTER}]
  type = "snapshot"
  address = "{socket}"{capabilities}
  [proxy_plugins.{SNAPSHOTTER}.exports]
    root = "{root}"{annotations}
[proxy_plugins.{DIFFER}]
  type = "diff"
  address = "{socket}"
"""


def _diff_service() -> str:
    """Name the differs for all unpacking outside of the transfer service.

    Docker, nerdctl and CRI 1.7 pull that way. CRI of every version does so for an image that is not unpacked for the
    snapshotter of a new container, such as an imported one. The other order does not work: for a mount that it does not
    know, containerd's own differ returns an error that ends the search.
    """
    name = "io.containerd.service.v1.diff-service"
    return f"""[plugins."{name}"]
  default = ["{DIFFER}", "walking"]
"""


def _cri(version: Version) -> str:
    if version >= (2, 0):
        return f"""[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{SNAPSHOTTER}"
"""
    return f"""[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{SNAPSHOTTER}"
  disable_snapshot_annotations = false
"""


def _unpack_config() -> str:
    entry = """[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "{platform}"
  snapshotter = "{snapshotter}"
  differ = "{differ}"
"""
    platform = f"linux/{go_architecture()}"
    pairs = ((SNAPSHOTTER, DIFFER), ("overlayfs", "walking"))
    return "".join(entry.format(platform=platform, snapshotter=name, differ=differ) for name, differ in pairs)
