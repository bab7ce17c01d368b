"""Remotes: where objects are kept for all nodes. The terms stand in `blobstore`; `factory` opens the configured one.

From the bottom up: `blobstore` (the interface), `encoding` (how blobs are written), `chunking` (where large objects
are cut), `directory`, `bucket`, `s3` and `manager` (the stores), `decorators` (retry, limits, a nearer store),
`buffered` (many small puts become a few), `remote` (verified contents over blobs), `factory` (which of them the
settings ask for), `push` (moves the push queue to the remote).
"""
