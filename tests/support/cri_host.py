"""The settings of a containerd that serves pods on a host without a network plugin."""

from __future__ import annotations

import re

from tests.support.containerd_host import Containerd

MIRROR = "registry.test"
"""The registry's part of image names; no such host exists, so pulls need the mirror."""
_V1 = 'plugins."io.containerd.grpc.v1.cri"'
_IMAGES = 'plugins."io.containerd.cri.v1.images"'
_RUNTIME = 'plugins."io.containerd.cri.v1.runtime"'
_NRI = 'plugins."io.containerd.nri.v1.nri"'


def prepare_pods(containerd: Containerd, registry: str, pause: str) -> None:
    """Add the settings that pods need here; containerd is not running yet.

    Args:
        containerd: Its configuration is that of `gear containerd-config --cri`.
        registry: Address of the registry that serves the images of MIRROR over plain HTTP.
        pause: Name of the image of a pod's sandbox.
    """
    hosts = containerd.directory / "hosts"
    (hosts / MIRROR).mkdir(parents=True, exist_ok=True)
    (hosts / MIRROR / "hosts.toml").write_text(f'[host."http://{registry}"]\n  capabilities = ["pull", "resolve"]\n')
    is_v1 = containerd.version < (2, 0)
    images, runtime = (_V1, _V1) if is_v1 else (_IMAGES, _RUNTIME)
    if is_v1:
        containerd.add_settings(_V1, f'sandbox_image = "{pause}"')
    else:
        containerd.add_settings(f"{_IMAGES}.pinned_images", f'sandbox = "{pause}"')
    containerd.add_settings(images, "stats_collect_period = 1")
    containerd.add_settings(f"{images}.registry", f'config_path = "{hosts}"')
    containerd.add_settings(f"{runtime}.cni", f'conf_dir = "{containerd.directory}/cni"')
    containerd.add_settings(f"{runtime}.containerd.runtimes.runc", 'runtime_type = "io.containerd.runc.v2"')
    containerd.add_settings(runtime, "restrict_oom_score_adj = true")  # a root without CAP_SYS_RESOURCE runs the tests
    containerd.add_settings(_NRI, "disable = true")  # its socket is outside the sandbox


def set_snapshotter(containerd: Containerd, name: str) -> None:
    """Make *name* the snapshotter of all pods whose runtime has no other one."""
    table = f"{_V1}.containerd" if containerd.version < (2, 0) else _IMAGES
    setting = rf'(\[{re.escape(table)}\]\n(?:  .*\n)*?  snapshotter = )"\w+"'
    text, count = re.subn(setting, rf'\1"{name}"', containerd.config.read_text())
    assert count == 1, text
    containerd.config.write_text(text)


def add_runtime(containerd: Containerd, name: str, snapshotter: str) -> None:
    """Add a runtime, for a RuntimeClass, whose pods use a snapshotter of their own."""
    plugin = _V1 if containerd.version < (2, 0) else _RUNTIME
    lines = ('runtime_type = "io.containerd.runc.v2"', f'snapshotter = "{snapshotter}"')
    containerd.add_settings(f"{plugin}.containerd.runtimes.{name}", *lines)
    if containerd.version >= (2, 0):
        containerd.add_settings(f"{_IMAGES}.runtime_platforms.{name}", lines[1])  # for pulls
