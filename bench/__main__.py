"""`python -m bench [NAME…]`: run these benchmarks, or all; print a table, then JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from bench.builds import build_steps, chown_tree, save
from bench.containerd_docker import containerd_docker
from bench.containers import read_tree, run_true
from bench.conversions import convert
from bench.frame import Figure, show, warm_memory
from bench.growth import growth
from bench.idle import idle
from bench.imports import import_one, import_parallel, import_shared, load_layers
from bench.lazy import OLD, VERSIONS, lazy, local, received, second, storage
from bench.lazy_pull import lazy_pull, lazy_pull_local, lazy_pull_slow, shared_pull
from bench.many import many
from bench.memory import memory
from bench.reread import reread
from bench.snapshot_calls import snapshot_calls
from bench.unpack import unpack, unpack_one
from tests.support import appimages, sandbox

ROWS: Mapping[str, Callable[[], list[Figure]]] = {
    "import": import_one,
    "shared": import_shared,
    "load": load_layers,
    "parallel": import_parallel,
    "build": build_steps,
    "save": save,
    "run": run_true,
    "read": read_tree,
    "chown": chown_tree,
    "memory": memory,
    "idle": idle,
    "convert": convert,
    "lazy": lazy,
    "local": local,
    "bytes": received,
    "storage": storage,
    "second": second,
    "many": many,
    "reread": reread,
    "unpack": unpack,
    "unpack-one": unpack_one,
    "growth": growth,
    "containerd": containerd_docker,
    "snapshots": snapshot_calls,
    "lazy-pull": lazy_pull,
    "lazy-pull-local": lazy_pull_local,
    "lazy-pull-slow": lazy_pull_slow,
    "shared-pull": shared_pull,
}
_OF_FIRST_VERSION = ("lazy", "local", "bytes", "lazy-pull", "lazy-pull-local", "lazy-pull-slow", "shared-pull")
IMAGES = {
    **dict.fromkeys(_OF_FIRST_VERSION, (OLD,)),
    **dict.fromkeys(("second", "storage"), VERSIONS),
}
"""Versions of the application images that a benchmark needs; made before the sandbox starts, which has no network."""


def main(names: list[str]) -> int:
    """Run the benchmarks in a sandbox; return the exit code. A missed goal is not an error."""
    if unknown := set(names) - set(ROWS):
        print(f"unknown benchmark: {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}", file=sys.stderr)
        return 2
    if not sandbox.is_inside():
        appimages.make(sorted({version for name in names or ROWS for version in IMAGES.get(name, ())}))
        return sandbox.run([sys.executable, "-m", "bench", *names])
    warm_memory()
    figures: list[Figure] = []
    for name in names or ROWS:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        figures += ROWS[name]()
    show(figures)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted")
