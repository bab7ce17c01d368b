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


def require_write(client: Any) -> None:
    """Have Redis refuse now what it would refuse of a task.

    The trial is what kombu does for each task that is taken, for a task that does not exist. So it changes nothing,
    and needs no permission that workers do without.

    Args:
        client: Of redis-py.

    Raises:
        RedisError: What Redis answers, or that it does not.
    """
    client.zadd(kombu_redis.Channel.unacked_index_key, {"": 0}, xx=True)


class _Transport(kombu_redis.Transport):
    connection_errors = (*kombu_redis.Transport.connection_errors, *_REFUSALS)

    def establish_connection(self) -> Any:
        """Connect to a Redis that takes tasks; a refusal is raised as it came, and the caller tries again."""
        connection = super().establish_connection()  # type: ignore[no-untyped-call] # kombu has few types
        try:
            require_write(self._avail_channels[-1].client)
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


def is_refusal(error: Exception) -> bool:
    """Whether Redis has answered, with an error."""
    cause = error.__cause__ or error  # kombu wraps what redis-py raises
    return isinstance(cause, (*_REFUSALS, AuthenticationError))


def why_not_taken(error: Exception) -> str:
    """What keeps Redis from taking a task, for `docker info`."""
    return f"Redis refuses tasks: {error}" if is_refusal(error) else "Redis does not answer"
