"""Remotes, which keep objects for all nodes. `blobstore` defines the terms; `factory` opens the configured remote.

From the bottom up: `blobstore` (the interface), `encoding` (the format of blobs), `chunking` (cutting large objects);
`directory`, `bucket`, `s3` and `manager` (the kinds of stores); `retry`, `bounded`, `cached` and `buffered`
(decorators around a store); `remote` (verified contents over blobs), `factory` (the stack that the settings name),
`push` (moves the push queue to the remote).
"""
