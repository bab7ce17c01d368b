"""Heavy calls and maintenance as jobs for the node's workers, or for the gateway's own processes.

dispatcher    publishes a job and waits for its result
pending_job   the states of a job
claim_server  hands each job to the process that claims it first
task_queue    Celery tasks in Redis
local_pool    the gateway's own processes
health        why the gateway does the workers' jobs
maintenance   jobs that no caller waits for
"""
