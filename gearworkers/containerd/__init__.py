"""containerd's API, as far as the gateway and the workers use it.

api       the messages: .proto files of our own, and the code generated from them (`make protos`)
content   a client that stores blobs in the content store
"""
