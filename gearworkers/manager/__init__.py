"""The manager (`gear manager`): the object service of a cluster, over HTTP.

`server` listens, limits and stops; `api` puts the calls together; `objects`, `documents` and `nodes` answer them;
`tokens` checks access; `tls` loads the certificate; `pacing` moves bodies at the client's pace; `uploads` holds bodies
until they are whole; `async_remote` reaches the remote that stores everything; `openapi` describes the calls.
"""
