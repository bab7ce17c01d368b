"""The manager (`gear manager`): the object service of a cluster, over HTTP.

`server` starts and stops it; `api` holds the routes; `objects`, `documents` and `nodes` handle the requests; `uploads`
holds bodies until they are complete; `memory_budget` limits the memory for storing them; `async_remote` accesses the
remote that stores everything; `openapi` describes the calls. Access, TLS and limits come from `http_service`.
"""
