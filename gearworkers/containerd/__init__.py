"""containerd's API, as far as the gateway and the workers use it.

api       the messages: .proto files of our own, and the code generated from them (`make protos`)
client    calls containerd; stores blobs in its content store
config    the configuration that containerd needs
"""
