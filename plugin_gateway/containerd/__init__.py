"""containerd's front door: a snapshotter and a differ as proxy plugins over gRPC.

server          the gRPC server: requests, responses, error codes
snapshots       the snapshotter's calls over an engine
snapshot_table  the snapshots' names, parents, kinds and labels, in SQLite
filters         the filters of List
diffs           Apply and Diff, as jobs for the dispatcher
"""
