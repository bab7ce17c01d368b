"""containerd's API, as far as the gateway, the workers and `gear` use it.

api       the messages: .proto files of our own, and the code generated from them (`make protos`)
client    a client of containerd, and of the gateway's service for `gear`
config    containerd's configuration for gearworkers
"""
