"""The engine: all operations on one GEAR_ROOT, in one class that every front door and worker uses.

engine    the Engine: apply, diff, changes, sizes, deduplication, checks, garbage collection, push
mounts    mounts of layers, and views of layers without a mount point
recovery  preparation of a GEAR_ROOT, and repairs after a crash or a power cut
root      the GEAR_ROOT of this node's gateway, for its workers

The engine is independent of protocols. Docker's or containerd's names, options and mount counts belong to
`plugin_gateway`.
"""
