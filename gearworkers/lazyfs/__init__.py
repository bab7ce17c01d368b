"""The lazy file system: a FUSE layer behind public/ that fetches objects when they are looked up.

fuse_protocol    requests and answers of /dev/fuse as bytes
fuse_connection  reads requests, sends answers, drops those of killed processes
fuse_probe       which FUSE features this kernel has
tree             maps requests to objects: the trap for missing objects, served files for large ones
passthrough      which large files are read past the server
fd_keeper        holds the connection's descriptor while no server runs
contents         the objects behind the tree: what is here, what is fetched
control, client  the control socket, and the calls that other processes make on it
pin_fetch        fetches the objects of pinned images
arrivals         objects that an import announced and has not stored yet
server           puts all of this together (`gear lazyfs`)
"""
