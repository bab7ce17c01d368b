"""Tar bytes to entries and back; pure: no file system, no network."""
