"""The pool of a worker: empty while idle, one process for each task in progress, up to a limit.

A process is a fork of the worker, which has imported all modules, so it starts within milliseconds. Ending it returns
the memory that its jobs have left behind.
"""

from __future__ import annotations

import gc
import logging
import os
from contextlib import suppress
from stat import S_ISSOCK
from typing import Any

from celery import signals
from celery.worker.autoscale import Autoscaler

from gearworkers.util.process import end_with_parent, return_free_memory

IDLE_S = 15.0
"""After this time without a new task, the idle processes end; checked at this interval."""

_STDERR_FD = 2


class IdleScaler(Autoscaler):  # type: ignore[misc] # Celery has no types
    """Celery's autoscaler with IDLE_S.

    It ends no process within IDLE_S after a task, so it cannot hit one that has just received the task.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, keepalive=IDLE_S, **options)


def prepare_pool_processes() -> None:
    """Let each process of a pool prepare itself when it starts, and return memory after each job.

    Keeps the scaling out of the log.
    """
    logging.getLogger(Autoscaler.__module__).setLevel(logging.WARNING)
    signals.worker_process_init.connect(_prepare, weak=False)
    signals.task_postrun.connect(lambda **_: return_free_memory(), weak=False)


def _prepare(**_: object) -> None:
    end_with_parent(os.getppid())
    gc.freeze()  # a collection would write to the pages that the process shares with its parent
    _drop_inherited_sockets()


def _drop_inherited_sockets() -> None:
    """Replace the parent's connections to Redis by /dev/null; standard error may be a socket of systemd's.

    An open copy would hide the end of a connection from Redis, and keep it in the parent's epoll after its end. The
    descriptors stay in use, because objects of the parent's will close them.
    """
    null_fd = os.open(os.devnull, os.O_RDWR)
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        with suppress(OSError):  # the descriptor that read the directory
            if fd > _STDERR_FD and S_ISSOCK(os.fstat(fd).st_mode):
                os.dup2(null_fd, fd, inheritable=False)
    os.close(null_fd)
