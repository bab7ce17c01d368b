"""The manager (`gear manager`): the object service of a cluster, over HTTP.

`server` listens, limits and stops; `app` puts the calls together; `objects`, `documents` and `nodes` answer them;
`access` knows who may; `tls` has the certificate; `streams` moves bodies at the client's pace; `store` is the way to
what is kept; `openapi` tells others of all this.
"""
