"""Fetching objects from remotes.

source         the interface of a remote, as fetching sees it
failover       asks the sources in order, and verifies their answers
fetcher        the table of downloads: one per object, however many readers wait for it
download       the state machine of one object: its chunks, its states, its waiters
targets        where the bytes of a download go: one whole file, or a sparse file of chunks
partial_files  the directory of large objects that are incomplete; resumed after a crash
chunk_index    finds chunks in other large objects of this host
batch          requests for many objects or chunks at once
prefetch       fetches objects before a container opens them
priority_pool  threads that serve readers before background work
delayed_calls  calls functions after a fixed delay
futures        helpers for `concurrent.futures.Future`
stats          counters, and the objects whose last fetch failed
"""
