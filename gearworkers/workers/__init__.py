"""The processes that do heavy work: Celery's application and tasks, and the jobs of a node's gateway.

messages    jobs, and the messages between the gateway and a job's process
claim       the job's side of the streams socket
http_body   the caller's connection, which the gateway hands over with a job
execute     runs a job, from its claim to its result
tasks       Celery tasks
celery_app  Celery's application and queues
broker      Redis as the broker
conversion  conversions of images
"""
