"""Docker's graphdriver plugin protocol: the front door for a dockerd with `--storage-driver gear`.

server        the HTTP server on the plugin's socket
connection    a connection of dockerd, shared by the HTTP server and the workers
messages      requests and responses
calls         the calls that the gateway answers itself, and the interface of a driver
threads       the threads in which these calls run
driver        the Gear driver: the calls over an engine
options       `--storage-opt` of dockerd and of containers
mount_counts  users of each layer's mount
"""
