"""``python -m gearworkers.workers import push convert``: run these workers in one tree of processes.

Each worker is a Celery worker with its own queue, connection and pool. This process imports all modules and forks the
workers, which fork their pools, so all of them share the memory of the modules (docs/design/dispatch.md, "Memory").
"""

from __future__ import annotations

import gearworkers.util.lean_structlog  # noqa: F401

# isort: split
import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from billiard.util import get_pdeathsig
from celery import Celery

from gearworkers.errors import GearError
from gearworkers.settings import Settings
from gearworkers.util.log import configure_logging, warn_of_unknown_variables
from gearworkers.util.process import set_name
from gearworkers.workers.celery_app import CONVERT_QUEUE, import_queue, make_worker_app, push_queue
from gearworkers.workers.scaling import prepare_pool_processes
from gearworkers.workers.supervisor import supervise

_NICE = 10
_LOADED_LATE = (
    "billiard.popen_fork",
    "billiard.sharedctypes",
    "billiard.synchronize",
    "celery.app.control",
    "celery.app.events",
    "celery.app.log",
    "celery.apps.worker",
    "celery.backends.redis",
    "celery.concurrency.prefork",
    "celery.events.receiver",
    "celery.worker.consumer.delayed_delivery",
    "celery.worker.pidbox",
    "celery.worker.strategy",
    "kombu.mixins",
    "kombu.transport.redis",
)
"""Modules that Celery would import after the fork; they import the others."""


@dataclass(frozen=True, slots=True)
class _Worker:
    """One worker.

    Args:
        queue: The only queue whose tasks it takes.
        processes: The most processes of its pool.
        nice: Added to the niceness of its processes.
    """

    queue: str
    processes: int
    nice: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM; return the exit status, 1 with one line on stderr after an error."""
    options = _parser().parse_args(arguments)
    try:
        settings = Settings.from_environ()
        configure_logging(settings.log)
        warn_of_unknown_variables()
        workers = {
            "import": _Worker(import_queue(settings.node), settings.worker_processes, 0),
            "push": _Worker(push_queue(settings.node), 1, _NICE),
            "convert": _Worker(CONVERT_QUEUE, settings.worker_processes, _NICE),
        }
        app = _loaded_app(settings)
        names = list(dict.fromkeys(options.workers))
        name = names[0] if len(names) == 1 else supervise(names)
    except GearError as exc:
        print(f"gearworkers.workers: {exc}", file=sys.stderr)
        return 1
    return 0 if name is None else _run(app, name, settings.node, workers[name])


def _loaded_app(settings: Settings) -> Celery:
    """Return the application with all modules that the workers and their jobs need.

    Their objects are exempt from garbage collection, which would write to their pages and so unshare them.
    """
    app = make_worker_app(settings)
    app.loader.init_worker()
    app.finalize()
    prepare_pool_processes()
    for module in _LOADED_LATE:
        import_module(module)
    get_pdeathsig()  # loads cffi's parser of C, which each process of a pool uses when it starts
    if settings.remote.url.startswith("s3://"):
        import_module("gearworkers.remote.s3")
    if settings.effective_containerd_socket is not None:
        import_module("gearworkers.containerd.client")  # gRPC takes memory
    gc.collect()
    gc.freeze()
    return app


def _run(app: Celery, name: str, node: str, worker: _Worker) -> int:
    """Run one worker until SIGTERM; return its exit status."""
    set_name(f"gear-{name}")
    os.nice(worker.nice)
    running = app.Worker(
        hostname=f"{name}@{node}",
        queues=[worker.queue],
        autoscale=(worker.processes, 0),
        loglevel="INFO",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    running.start()
    return running.exitcode or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m gearworkers.workers", description="Run workers of this node until SIGTERM."
    )
    parser.add_argument(
        "workers",
        nargs="+",
        choices=("import", "push", "convert"),
        help="import: layers for Docker and containerd; push: pushes and maintenance; convert: images.",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
