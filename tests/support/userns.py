"""Containers' ids and commands in a user namespace, for tests of mounts that map ids."""

from __future__ import annotations

import subprocess
from pathlib import Path

from gearworkers.layers.idmap import NO_MAPS, IdMaps, parse_ranges, shown_tree
from gearworkers.mounts.idmapped import MappedTree, user_namespace

FIRST_ID = 100_000
"""The host's id of root in the container."""
RANGES = f"0:{FIRST_ID}:65536"
MAPS = IdMaps(parse_ranges(RANGES), parse_ranges(RANGES))


def run_as_root(script: str, directory: Path, maps: IdMaps = MAPS) -> str:
    """Run a shell script in *directory* as root of a user namespace with these maps; return its output, stripped.

    Raises:
        AssertionError: The script failed.
    """
    mapped = shown_tree(directory, NO_MAPS, maps)
    assert isinstance(mapped, MappedTree)
    with user_namespace(mapped.owners) as userns_fd:
        enter = ["nsenter", f"--user=/proc/self/fd/{userns_fd}", "-S", "0", "-G", "0", "sh", "-ec", script]
        done = subprocess.run(enter, cwd=directory, pass_fds=(userns_fd,), capture_output=True, text=True)
    assert done.returncode == 0, f"{script}: {done.stderr}"
    return done.stdout.strip()
