"""Check that containerd sees the gateway's mounts.

containerd gets the path of a tree that the gateway has mounted. In another mount namespace the path leads to an empty
directory, unless mounts propagate there from the gateway's.

Source: Linux Documentation/filesystems/sharedsubtree.rst; mount_namespaces(7); unix(7), "SO_PEERCRED".
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from gearworkers.errors import GearError, Unavailable, from_os_error
from gearworkers.mounts.mountinfo import propagation_at
from gearworkers.util.check import Check

_NAME = "containerd mounts"
_UCRED = struct.Struct("iII")
_TIMEOUT_S = 3.0


def mount_namespace_check(root: Path, gateway_socket: Path, containerd_socket: Path) -> Check:
    """Check that mounts below *root* propagate from the process on one socket to the process on the other.

    Args:
        root: GEAR_ROOT.
        gateway_socket: On which the gateway listens.
        containerd_socket: On which containerd listens.
    """
    try:
        gateway, containerd = _listener(gateway_socket), _listener(containerd_socket)
        source, target = propagation_at(root, gateway), propagation_at(root, containerd)
    except OSError as exc:
        return Check(_NAME, False, False, str(from_os_error(exc, "compare mount namespaces")), "try again")
    except GearError as exc:
        return Check(_NAME, False, False, str(exc), "start both, and run this in their PID namespace")
    if source.mount_id == target.mount_id:
        return Check(_NAME, True, True, "containerd is in the gateway's mount namespace")
    if source.group and source.group in (target.group, *target.masters):
        return Check(_NAME, True, True, "containerd's mount namespace receives the gateway's mounts")
    found = f"containerd is in another mount namespace, which receives no mounts below {root}: containers see no files"
    advice = f"give both {root} on a mount with shared propagation (mount --make-rshared, bind mounts with rshared)"
    return Check(_NAME, False, True, found, advice)


def _listener(path: Path) -> int:
    """Return the PID of the process that listens on a Unix socket.

    Raises:
        Unavailable: No process listens, or it is in a PID namespace that is invisible from here.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_TIMEOUT_S)
        try:
            client.connect(os.fspath(path))
        except OSError as exc:
            raise Unavailable(f"no process listens on {path} ({exc.strerror or exc})") from exc
        pid: int = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
    if not pid:
        raise Unavailable(f"the process that listens on {path} is in another PID namespace")
    return pid
