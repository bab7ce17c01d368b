"""Fetching objects from a remote: whole, in chunks, and ahead of time."""
