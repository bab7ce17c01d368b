"""plugin_gateway: the process that answers Docker's graphdriver plugin calls.

gateway      its life
graphdriver  the front door for dockerd
dispatch     jobs for the workers, or for processes of its own
metrics      Prometheus metrics
sockets      listening Unix sockets
"""
