"""Fetching objects from remotes.

source           the interface of a remote, as fetching sees it
failover         asks the sources in order and verifies their answers
fetcher          the table of downloads: one for each object, shared by all its readers
download         the state machine of one download
download_chunks  the chunks of one download: read, fetched alone, or delivered by batch requests
chunk_table      the state of each chunk, and the callers that wait for chunks
targets          where a download stores its bytes: one whole file, or a sparse file of chunks
partial_files    the directory of large objects that are incomplete; downloads resume after a crash
chunk_index      finds chunks in other large objects of this host
read_ahead       how far to read ahead of a reader
batch            requests for many objects or chunks at once
prefetch         fetches objects before a container opens them
priority_pool    threads that serve readers before background work
delayed_calls    calls functions after a fixed delay
futures          helpers for `concurrent.futures.Future`
stats            counters, and the objects whose last fetch failed
context          the parts that all downloads of one store share
"""
