"""The engine: everything that works on one GEAR_ROOT, behind one object that every front door and worker uses.

engine    the Engine: apply, diff, changes, sizes, deduplication, checks, garbage, push
mounts    mounts of layers, and views that only their holder sees
recovery  preparation of a GEAR_ROOT, and repairs after a crash or a power cut
root      the GEAR_ROOT that this node's gateway uses, for its workers

It knows no protocol. Docker's or containerd's names, options and mount counts belong to `plugin_gateway`.
"""
