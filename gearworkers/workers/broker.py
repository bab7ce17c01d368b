"""Redis as Celery's broker: a refusal counts as a lost connection.

Redis may refuse commands for external reasons: a full disk below its AOF (MISCONF), a failover (READONLY), too few
replicas (NOREPLICAS), no memory (OOM), a long script (BUSY), a user without permission (NOPERM). kombu treats these
errors as programming errors, and Celery ends the worker. Here they are connection errors: the worker reconnects with
growing delays until Redis accepts a write.
"""

from __future__ import annotations

from typing import Any

from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport import redis as kombu_redis
from redis.exceptions import AuthenticationError, InvalidResponse, ResponseError

_REFUSALS = (ResponseError, InvalidResponse)


def require_write(client: Any) -> None:
    """Check that Redis accepts writes, so that a refusal shows now and not at the first task.

    The check is the command that kombu sends for each taken task, for a task that does not exist. So it changes nothing
    and needs no further permission.

    Args:
        client: A client of redis-py.

    Raises:
        RedisError: Redis refuses, or does not answer.
    """
    client.zadd(kombu_redis.Channel.unacked_index_key, {"": 0}, xx=True)


class _Transport(kombu_redis.Transport):
    connection_errors = (*kombu_redis.Transport.connection_errors, *_REFUSALS)

    def establish_connection(self) -> Any:
        """Connect to a Redis that accepts tasks; raise its refusal, after which the caller tries again."""
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
    """The `amqp` argument of an application that treats refusals as lost connections."""

    Connection = _Connection


def is_refusal(error: Exception) -> bool:
    """Return whether Redis has answered with an error."""
    cause = error.__cause__ or error  # kombu wraps the errors of redis-py
    return isinstance(cause, (*_REFUSALS, AuthenticationError))


def refusal_reason(error: Exception) -> str:
    """Return the reason why Redis does not accept tasks, for `docker info`."""
    return f"Redis refuses tasks: {error}" if is_refusal(error) else "Redis does not answer"
