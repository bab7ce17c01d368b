"""Redis as Celery's broker: one that refuses is one that is away.

A Redis may answer with an error for as long as something outside is wrong: a full disk below its AOF (MISCONF), a
failover (READONLY), too few replicas (NOREPLICAS), no memory (OOM), a long script (BUSY), a user without permission
(NOPERM). kombu takes these for mistakes in the call, and Celery ends the worker. Here they are connection errors: the
worker connects again, and again later and later, until Redis takes a write.
"""

from __future__ import annotations

from typing import Any

from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport import redis as kombu_redis
from redis.exceptions import AuthenticationError, InvalidResponse, ResponseError

_REFUSALS = (ResponseError, InvalidResponse)


class _Transport(kombu_redis.Transport):
    connection_errors = (*kombu_redis.Transport.connection_errors, *_REFUSALS)

    def establish_connection(self) -> Any:
        """Connect to a Redis that takes tasks; a refusal is raised as it came, and the caller tries again.

        The trial is what kombu does for each task that is taken, of a task that there is not. So it changes nothing,
        needs no permission beyond what is needed anyway, and is refused whenever that would be.
        """
        connection = super().establish_connection()  # type: ignore[no-untyped-call] # kombu has few types
        channel = self._avail_channels[-1]
        try:
            channel.client.zadd(channel.unacked_index_key, {"": 0}, xx=True)
        except BaseException:
            self.close_connection(connection)  # type: ignore[no-untyped-call]
            raise
        return connection


class _Connection(Connection):
    def get_transport_cls(self) -> type[Any]:
        return _Transport


class RedisBroker(AMQP):  # type: ignore[misc] # Celery has no types
    """What an application is given as `amqp` to speak to Redis in this way."""

    Connection = _Connection


def why_not_taken(error: Exception) -> str:
    """What keeps Redis from taking a task, for `docker info`: it refuses, or it does not answer."""
    cause = error.__cause__ or error  # kombu wraps what redis-py raises
    if isinstance(cause, (*_REFUSALS, AuthenticationError)):
        return f"Redis refuses tasks: {cause}"
    return "Redis does not answer"
