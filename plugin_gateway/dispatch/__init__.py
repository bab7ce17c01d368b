"""Heavy calls: offered to Celery workers, done by local processes when no worker claims them."""
