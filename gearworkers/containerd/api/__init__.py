"""Messages of containerd's gRPC services. `packaging/protos.py` generates the ``*_pb2`` modules."""
