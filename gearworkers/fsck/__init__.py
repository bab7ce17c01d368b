"""Checking a GEAR_ROOT and repairing it from a remote."""
