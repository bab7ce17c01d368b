"""Remotes: where objects are kept for all nodes. The terms stand in `blobs`; `open_remote` opens the configured one.

From the bottom up: `blobs` (the interface), `codec` (how blobs are written), `chunking` (where large objects are
cut), `directory`, `bucket`, `s3` and `manager` (the stores; `root` and `versions` are parts of them), `decorators`
(retry, limits, a nearer store), `gathered` (many small puts become a few), `remote` (contents over blobs, verified),
`opening` (which of them the settings ask for), `push` (the spool goes to the remote).
"""
