"""gearworkers: a storage driver for Docker and containerd that stores every distinct file once per host."""

from __future__ import annotations

import os

# gRPC reads this when it is imported. Its fork handlers start threads in a forked child; they abort the child, because
# the child closes the descriptors that it does not need (`cas.writer_process`). No child calls gRPC.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
