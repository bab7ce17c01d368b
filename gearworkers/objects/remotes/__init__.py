"""Remotes: where objects are kept for all nodes. The terms stand in `blobs`; `open_remote` opens the configured one.

From the bottom up: `blobs` (the interface), `codec` (how blobs are written), `chunking` (where large objects are
cut), `bucket`, `s3` and `manager` (the stores), `decorators` (retry, limits, a nearer store), `remote` (contents over
blobs, verified), `opening` (which of them the settings ask for), `push` (the spool goes to the remote).
"""
