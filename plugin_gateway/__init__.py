"""plugin_gateway: the front door that answers Docker's graphdriver plugin calls."""
