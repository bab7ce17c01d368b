"""containerd's front door: a snapshotter and a differ as proxy plugins over gRPC.

server          the gRPC server: requests, responses, error codes
snapshots       the snapshotter's calls over an engine
snapshot_table  the snapshots' names, parents, kinds and labels, in SQLite
filters         the filters of List
diffs           Apply and Diff, as jobs for the dispatcher
early_apply     layers of an image that are applied before containerd asks for them
image_blobs     the blobs of an image in containerd's content store
content_root    the directory of containerd's content store
door            all of these together, for the gateway
"""
