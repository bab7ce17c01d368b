"""Helpers for `concurrent.futures.Future`: completed futures, and steps that follow a result."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def completed(result: T) -> Future[T]:
    """Return a future that has this result."""
    future: Future[T] = Future()
    future.set_result(result)
    return future


def failed(error: Exception) -> Future[T]:
    """Return a future that has this exception."""
    future: Future[T] = Future()
    future.set_exception(error)
    return future


def then(future: Future[T], step: Callable[[T], Future[U] | U]) -> Future[U]:
    """Return the future of *step*, called with the result of *future* as soon as there is one.

    *step* may return a result or another future. An exception of *future* or *step* becomes the exception of the
    returned future. *step* runs in the thread that completes *future*.
    """
    following: Future[U] = Future()
    future.add_done_callback(lambda done: _take_step(done, step, following))
    return following


def copy_outcome(done: Future[T], target: Future[T]) -> None:
    """Complete *target* with the result or exception of *done*."""
    error = done.exception()
    if error is not None:
        target.set_exception(error)
    else:
        target.set_result(done.result())


def _take_step(done: Future[T], step: Callable[[T], Future[U] | U], following: Future[U]) -> None:
    error = done.exception()
    if error is not None:
        following.set_exception(error)
        return
    try:
        result = step(done.result())
    except Exception as exc:
        following.set_exception(exc)
        return
    if isinstance(result, Future):
        result.add_done_callback(lambda last: copy_outcome(last, following))
    else:
        following.set_result(result)
