"""Check a GEAR_ROOT and repair it from the remote."""
