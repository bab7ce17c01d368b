"""Celery: the tasks, and the protocol by which a gateway hands a call over to a worker."""
