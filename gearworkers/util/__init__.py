"""Helpers that do not depend on layers or images: files, locks, processes, addresses, system calls."""
