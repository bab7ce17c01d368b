"""plugin_gateway: the process that answers the calls of Docker and containerd.

gateway      starts and stops the parts
engines      the engine of each GEAR_ROOT
graphdriver  answers dockerd's graphdriver plugin calls
containerd   answers containerd's snapshotter and differ calls
dispatch     jobs for the workers, or for the gateway's own processes
metrics      Prometheus metrics
sockets      listening Unix sockets
"""
