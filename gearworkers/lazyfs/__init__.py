"""The lazy file system: a FUSE layer behind public/ that fetches objects when they are looked up.

fuse_protocol    requests and answers of /dev/fuse as bytes
fuse_connection  reads requests, sends answers, drops requests of killed processes
fuse_probe       checks which FUSE features this kernel has
tree             maps requests to objects: the fetch directory for missing objects, files for large ones
passthrough      decides which large files are read without the server
fd_keeper        holds the connection's descriptor while no server runs
contents         the objects behind the tree: stored, arriving or fetched on demand
read_log         logs the reads of large objects, for start-up profiles
control, client  the control socket, and the calls that other processes make on it
pin_fetch        fetches the objects of pinned images
arrivals         hard links to the objects that arrived while incomplete layers are mounted
server           puts all of this together (`python -m gearworkers.lazyfs`, `gear lazyfs`)
"""
