"""plugin_gateway: the process that answers Docker's graphdriver plugin calls.

gateway      starts and stops the parts
graphdriver  the front door for dockerd
dispatch     jobs for the workers, or for the gateway's own processes
metrics      Prometheus metrics
sockets      listening Unix sockets
"""
